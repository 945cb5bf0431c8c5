"""Questions about a document, answered by llama-cli from the full cache and with LU-KV.

    python scripts/demo.py MODEL-lukv.gguf

The document has more than 4,000 tokens. Each question is a run of llama-cli of its own, which reads the document first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
from rich.console import Console
from rich.table import Table

from lukv_gguf import runtime
from lukv_gguf.errors import LukvError

DATA = Path(__file__).resolve().parent / "data"
N_QUESTIONS = 3
TIMINGS = re.compile(r"\[ Prompt: ([\d.]+) t/s \| Generation: ([\d.]+) t/s \]")


@dataclass(frozen=True)
class Answer:
    """What one run of llama-cli said and took."""

    text: str
    kv_mib: float
    peak_mib: float
    prompt_tps: float
    decode_tps: float


def ask(model: Path, question: str, *overrides: str) -> Answer:
    """Let llama-cli read the document and answer one question.

    Raises
    ------
    LukvError
        It failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        prompt, log, said = Path(temporary, "prompt.txt"), Path(temporary, "log.txt"), Path(temporary, "said.txt")
        prompt.write_text((DATA / "document.txt").read_text().strip() + f"\n\n{question}")
        command = [runtime.program("llama-cli"), "-m", model, "-f", prompt, "-c", "8192", "-n", "40", "--temp", "0"]
        command += ["-t", str(os.cpu_count() or 1), "--single-turn", "--simple-io", "--no-display-prompt"]
        command += ["--log-verbosity", "4", "--log-file", log]
        for override in overrides:
            command += ["--override-kv", override]
        with said.open("w") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        text = said.read_text(errors="replace")
        logged = log.read_text(errors="replace") if log.exists() else ""
    timings = TIMINGS.search(text)
    if process.returncode or timings is None:
        errors = [line for line in (logged + text).splitlines() if "error" in line.lower() or "failed" in line.lower()]
        raise LukvError(f"llama-cli failed: {errors[0].strip() if errors else text.strip()[-300:]}")
    return Answer(
        text=" ".join(text[: timings.start()].rpartition("... (truncated)")[2].split()),  # after the echoed prompt
        kv_mib=max(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", logged))),
        peak_mib=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        prompt_tps=float(timings[1]),
        decode_tps=float(timings[2]),
    )


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(model: Path) -> None:
    """Ask MODEL about a document, with LU-KV off and on."""
    items = json.loads((DATA / "document_questions.json").read_text())[:N_QUESTIONS]
    console = Console(highlight=False)
    full, lukv = [], []
    for item in items:
        console.print(f"\n[bold]{item['question']}[/]  [dim](the document: {item['answer']})[/]")
        try:
            full.append(ask(model, item["question"], "lukv.enabled=bool:false"))
            console.print(f"  full cache  {full[-1].text}", markup=False)
            lukv.append(ask(model, item["question"]))
            console.print(f"  LU-KV       {lukv[-1].text}", markup=False)
        except LukvError as error:
            raise SystemExit(f"demo: error: {error}") from None

    table = Table("", "full cache", "LU-KV", title="llama-cli, context 8192")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [("KV cache, MiB", "kv_mib", 1), ("peak memory, MiB", "peak_mib", 0),
            ("reading, tokens/s", "prompt_tps", 1), ("generating, tokens/s", "decode_tps", 1)]
    for label, field, digits in rows:
        means = [fmean(getattr(answer, field) for answer in side) for side in (full, lukv)]
        table.add_row(label, *(f"{mean:.{digits}f}" for mean in means))
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
