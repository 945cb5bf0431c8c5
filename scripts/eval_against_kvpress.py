"""Native LU-KV against kvpress: the same weights, contexts, questions, metric (KeyDiff) and budgets.

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5 gguf==0.19.0 torch==2.13.0
    python scripts/eval_against_kvpress.py MODEL.gguf --profile PROFILE.npz --kvpress kvpress-env/bin/python

kvpress evicts once after the prompt and hides what is evicted, so its counterpart here is the policy ``prefill``; ``capacity``
never holds more cells than the ratio. Weights are dequantised there and multiplied as they are here, in float32 against
llama.cpp's kernels: the full caches of both sides say how much that alone changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import suites
from lukv_gguf.evaluate.methods import FULL, Tables, grid
from lukv_gguf.evaluate.results import Result, summarise
from lukv_gguf.evaluate.run import Plan, evaluate
from lukv_gguf.evaluate.session import Options
from lukv_gguf.evaluate.store import Record, Store
from lukv_gguf.evaluate.tasks import Sample, tokenize
from lukv_gguf.reference.tokenizer import Tokenizer

METRIC = "keydiff"
METHODS = (FULL, "uniform", "lukv")
PEER = "kvpress"  # takes the place of the policy in the results


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--profile", type=click.Path(path_type=Path), required=True)
@click.option("--kvpress", "python", type=click.Path(path_type=Path), required=True, help="Python of kvpress's environment.")
@click.option("--suite", type=click.Choice(["smoke", "ruler"]), default="smoke", show_default=True)
@click.option("--tasks", default="", help="Only these of its tasks, separated by commas.  [default: all]")
@click.option("--ratio", default=0.2, show_default=True)
@click.option("--length", default=1024, show_default=True)
@click.option("-n", "n_context", default=8, show_default=True, help="Contexts of each task.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", "n_threads", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("kvpress-eval"), show_default=True,
              help="Keeps the answers of both sides.")
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, profile: Path, python: Path, suite: str, tasks: str, ratio: float, length: int, n_context: int,
         seed: int, n_threads: int, output: Path, as_json: bool) -> None:
    """Ask both sides the same, and print both."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin stall as soon as anything else wants the cores
    try:
        results = compare(model, profile, python, suite, tasks, ratio, length, n_context, seed, n_threads, output)
    except LukvError as error:
        raise SystemExit(f"eval_against_kvpress: error: {error}") from None
    if as_json:
        print(json.dumps({"model": model.name, "results": results}))
        return
    names = list(dict.fromkeys(one["task"] for one in results))
    table = Table("cache", "policy", *names, title=f"{model.name}, {METRIC}, {ratio:.0%} of the cache, {length} tokens")
    for method, policy in dict.fromkeys((one["method"], one["policy"]) for one in results):
        row = {one["task"]: one for one in results if (one["method"], one["policy"]) == (method, policy)}
        cells = [f"{row[name]['score']:.2f} [{row[name]['interval'][0]:.2f}, {row[name]['interval'][1]:.2f}]" for name in names]
        table.add_row(method, policy or "native", *cells)
    Console().print(table)


def compare(model: Path, profile: Path, python: Path, suite: str, tasks: str, ratio: float, length: int, n_context: int,
            seed: int, n_threads: int, output: Path) -> list[Result]:
    """Results of both sides; the peer's have the policy ``kvpress``."""
    tables = Tables(model, profile)
    with Tokenizer(model) as tokenizer:
        chosen = [name for name in suites.tasks(suite) if not tasks or name in tasks.split(",")]
        samples = suites.samples(suite, chosen, tokenizer, [length], n_context, seed, None)
        plan = Plan(grid(METHODS, [METRIC], [ratio], ["prefill", "capacity"], ["f16"]), samples, seed=seed, options=Options(n_threads))
        with Store(output / "answers.jsonl") as store, Progress(console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task("native")
            records = evaluate(
                plan, model, tables, tokenizer, store, output,
                lambda what, done, total: bars.update(bar, description=what, completed=done, total=total),
            )  # fmt: skip
        answers = ask_kvpress(model, tables, python, ratio, n_threads, samples, tokenizer)
        for method, of_method in answers.items():
            records += peer_records(method, of_method, samples, tokenizer, records)
    return summarise(records, model.stem)


def ask_kvpress(model: Path, tables: Tables, python: Path, ratio: float, n_threads: int, samples: list[Sample],
                tokenizer: Any) -> dict[str, list[list[list[int]]]]:
    """Run the peer in its own environment; tokens by method, context and question."""
    table = tables.table("lukv", METRIC)
    at = int(np.abs(table.profile_ratios - ratio).argmin())
    methods = {name: None if name == FULL else (1.0 - tables.table(name, METRIC).profile_budget[at]).tolist() for name in METHODS}
    prompts = [tokenize(tokenizer, sample) for sample in samples]
    request = {
        "model": str(model.resolve()), "methods": methods, "ratio": ratio, "sink": table.sink, "recent": table.recent,
        "n_threads": n_threads, "end_tokens": sorted(tokenizer.end_tokens),
        "prompts": [
            {"prefix": prompt.prefix, "suffixes": prompt.suffixes, "n_answer": sample.n_answer}
            for prompt, sample in zip(prompts, samples)
        ],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "prompts.json"), Path(folder, "answers.json")
        paths[0].write_text(json.dumps(request))
        try:
            done = subprocess.run([python, Path(__file__).with_name("kvpress_answers.py"), *paths])
        except OSError as error:
            raise LukvError(f"cannot run {python}: {error.strerror}") from None
        if done.returncode:
            raise LukvError("kvpress failed; see above")
        return json.loads(paths[1].read_text())


def peer_records(method: str, answers: list[list[list[int]]], samples: list[Sample], tokenizer: Any,
                 native: list[Record]) -> list[dict[str, Any]]:
    """The peer's answers, scored as the native ones are."""
    like = {(r["task"], r["context"], r["question"]): r for r in native if r["method"] == method}
    work = {"kv_bytes": 0, "n_read": 0, "read_seconds": 0.0, "n_generated": 0, "generate_seconds": 0.0}
    records = []
    for sample, of_sample in zip(samples, answers):
        for number, (question, tokens) in enumerate(zip(sample.questions, of_sample)):
            answer = tokenizer.decode(tokens)
            record = {**like[sample.task, sample.index, number], **work, "policy": PEER, "answer": answer}
            records.append({**record, "score": sample.score_answer(answer, question)})
    return records


if __name__ == "__main__":
    main()
