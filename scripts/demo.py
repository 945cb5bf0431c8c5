"""Questions about a document, answered by llama-cli from the full cache and with LU-KV.

    python scripts/demo.py MODEL-lukv.gguf

The document has more than 4,000 tokens; the model reads it once and answers one question after another.
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

import click
from rich.console import Console
from rich.table import Table

from lukv_gguf import runtime
from lukv_gguf.errors import LukvError

DATA = Path(__file__).resolve().parent / "data"
N_QUESTIONS = 3
TIMINGS = re.compile(r"\[ Prompt: ([\d.]+) t/s \| Generation: ([\d.]+) t/s \]")


@dataclass(frozen=True)
class Side:
    """What one run of llama-cli said and took."""

    answers: list[str]
    kv_mib: float
    peak_mib: float
    prompt_tps: float
    decode_tps: float


def run(model: Path, questions: list[str], *overrides: str) -> Side:
    """Let llama-cli read the document and answer the questions.

    Raises
    ------
    LukvError
        It failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        prompt, log = Path(temporary, "prompt.txt"), Path(temporary, "log.txt")
        prompt.write_text((DATA / "document.txt").read_text().strip() + f"\n\n{questions[0]}")
        command = [runtime.program("llama-cli"), "-m", model, "-f", prompt, "-c", "8192", "-n", "40", "--temp", "0"]
        command += ["-t", str(os.cpu_count() or 1), "--simple-io", "--no-display-prompt"]
        command += ["--log-verbosity", "4", "--log-file", log]
        for override in overrides:
            command += ["--override-kv", override]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            process.stdin.write("".join(f"{question}\n" for question in [*questions[1:], "/exit"]))
            process.stdin.close()
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        logged = log.read_text(errors="replace") if log.exists() else ""
    timings = [tuple(map(float, match)) for match in TIMINGS.findall(said)]
    if process.returncode or len(timings) != len(questions):
        errors = [line for line in (logged + said).splitlines() if "error" in line.lower() or "failed" in line.lower()]
        raise LukvError(f"llama-cli failed: {errors[0].strip() if errors else said.strip()[-300:]}")

    parts = [part for part in TIMINGS.split(said)[::3]][: len(questions)]
    parts[0] = parts[0].rpartition(questions[0])[2]
    return Side(
        answers=[" ".join(part.replace("\n> ", " ").split()) for part in parts],
        kv_mib=max(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", logged))),
        peak_mib=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        prompt_tps=timings[0][0],
        decode_tps=sum(decode for _, decode in timings) / len(timings),
    )


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(model: Path) -> None:
    """Ask MODEL about a document, with LU-KV off and on."""
    items = json.loads((DATA / "document_questions.json").read_text())[:N_QUESTIONS]
    questions = [item["question"] for item in items]
    console = Console(highlight=False)
    try:
        console.print("reading a document of 4,400 tokens, with the full cache …", style="dim")
        full = run(model, questions, "lukv.enabled=bool:false")
        console.print("the same with LU-KV …", style="dim")
        lukv = run(model, questions)
    except LukvError as error:
        raise SystemExit(f"demo: error: {error}") from None

    for i, item in enumerate(items):
        console.print(f"\n[bold]{item['question']}[/]  [dim](the document: {item['answer']})[/]")
        console.print(f"  full cache  {full.answers[i]}", markup=False)
        console.print(f"  LU-KV       {lukv.answers[i]}", markup=False)

    table = Table("", "full cache", "LU-KV", title="llama-cli, context 8192")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [("KV cache, MiB", "kv_mib", 1), ("peak memory, MiB", "peak_mib", 0),
            ("reading, tokens/s", "prompt_tps", 1), ("generating, tokens/s", "decode_tps", 1)]
    for label, field, digits in rows:
        table.add_row(label, f"{getattr(full, field):.{digits}f}", f"{getattr(lukv, field):.{digits}f}")
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
