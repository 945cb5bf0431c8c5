"""Needle questions to a model: the full cache, uniform budgets and LU-KV, under both policies.

    python scripts/eval_needles.py MODEL-lukv.gguf [--ratio 0.2] [--contexts 12] [--needles 3] [--tokens 1400]

Every question is asked after its context was cached. The score is the share of right numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.needles import Method, ask, make_contexts
from lukv_gguf.metadata import read_metadata
from lukv_gguf.reference.tokenizer import Tokenizer


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--plain", type=click.Path(path_type=Path), help="The model without a table, for the uniform budgets.")
@click.option("--ratio", default=0.2, show_default=True)
@click.option("--contexts", "n_contexts", default=12, show_default=True)
@click.option("--needles", "n_needles", default=3, show_default=True, help="Questions per context.")
@click.option("--tokens", "n_tokens", default=1400, show_default=True, help="Length of a context.")
@click.option("--policy", "policies", multiple=True, default=["prefill", "capacity"], show_default=True)
@click.option("--ubatch", "n_ubatch", default=512, show_default=True)
@click.option("--threads", "n_threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, plain: Path | None, ratio: float, n_contexts: int, n_needles: int, n_tokens: int,
         policies: list[str], n_ubatch: int, n_threads: int, seed: int, as_json: bool) -> None:
    """Ask needle questions to MODEL, which carries a LU-KV table."""
    try:
        if read_metadata(model) is None:
            raise LukvError(f"{model} has no LU-KV table: embed one first (lukv-gguf embed)")
        contexts = list(make_contexts(Tokenizer(model).encode, n_contexts, n_needles, n_tokens, seed))
        methods = [Method("full", model, {"lukv.enabled": False})]
        for policy in policies:
            overrides = {"lukv.ratio": ratio, "lukv.policy": policy}
            if plain is not None:
                methods.append(Method(f"uniform, {policy}", plain, overrides))
            methods.append(Method(f"LU-KV, {policy}", model, overrides))
        records = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for method in methods:
                task = progress.add_task(method.name, total=n_contexts)
                right = ask(method, contexts, n_ubatch=n_ubatch, n_threads=n_threads,
                            progress=lambda done, _: progress.update(task, completed=done))
                flat = np.concatenate(right)
                records.append({"method": method.name, "ratio": ratio if method.name != "full" else 1.0,
                                "score": float(flat.mean()), "n": len(flat)})
    except LukvError as error:
        raise SystemExit(f"eval_needles: error: {error}") from None
    if as_json:
        print(json.dumps({"model": model.name, "tokens": n_tokens, "results": records}))
        return
    table = Table("method", "ratio", "right", "questions", title=f"{model.name}, contexts of {n_tokens} tokens")
    for record in records:
        table.add_row(record["method"], f"{record['ratio']:.2f}", f"{record['score']:.2f}", str(record["n"]))
    Console().print(table)


if __name__ == "__main__":
    main()
