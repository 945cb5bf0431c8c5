"""Needle questions for several metrics, under both policies: what scoring chunk by chunk costs against scoring once.

    lukv-gguf profile MODEL.gguf -o PROFILE --metric snapkv,expectedattention
    python scripts/eval_metrics.py MODEL.gguf PROFILE --metric snapkv --metric expectedattention [--ratio 0.2] [--scorer SCORER]

Every question is asked after its context was cached. The score is the share of right numbers; uniform budgets and those of
the profile (with the default blend) beside each other.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from lukv_gguf import metrics
from lukv_gguf.embed import build_metadata
from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.needles import Method, ask, make_contexts
from lukv_gguf.metadata import embed
from lukv_gguf.profile_file import choose_profile
from lukv_gguf.reference.tokenizer import Tokenizer
from lukv_gguf.scorer import load_scorer


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--metric", "texts", multiple=True, required=True, help="NAME[:PARAM=VALUE]…, may be given again.")
@click.option("--scorer", "scorer_path", type=click.Path(path_type=Path), help="Weights of the metric foresight.")
@click.option("--ratio", default=0.2, show_default=True)
@click.option("--allocation", "allocations", multiple=True, default=["uniform", "lukv"], show_default=True)
@click.option("--policy", "policies", multiple=True, default=["prefill", "capacity"], show_default=True)
@click.option("--contexts", "n_contexts", default=8, show_default=True)
@click.option("--needles", "n_needles", default=3, show_default=True, help="Questions per context.")
@click.option("--tokens", "n_tokens", default=1200, show_default=True, help="Length of a context.")
@click.option("--ubatch", "n_ubatch", default=256, show_default=True, help="Tokens that are scored together under capacity.")
@click.option("--threads", "n_threads", default=2, show_default=True)
@click.option("--full/--no-full", default=True, show_default=True, help="Also ask the full cache.")
def main(model: Path, profile: Path, texts: list[str], scorer_path: Path | None, ratio: float, allocations: list[str], policies: list[str],
         n_contexts: int, n_needles: int, n_tokens: int, n_ubatch: int, n_threads: int, full: bool) -> None:
    """Print one JSON object for each method."""
    try:
        scorer = None if scorer_path is None else load_scorer(scorer_path)
        with Tokenizer(model) as tokenizer:
            contexts = list(make_contexts(tokenizer.encode, n_contexts, n_needles, n_tokens))
        with tempfile.TemporaryDirectory(dir=profile.parent) as folder:
            methods = [Method("full", model, {})] if full else []
            for i, (text, name) in enumerate((text, name) for text in texts for name in allocations):
                metric = metrics.parse(text, scorer)
                found = choose_profile(profile, metric.name).allocated(name)
                found = replace(found, metric_params=metric.params)
                weights = scorer if metric.trained else None
                meta = build_metadata(found, ratio=ratio, policy=metric.policies[0], allocation=name, scorer=weights)
                path = Path(folder) / f"{i}.gguf"
                embed(model, path, meta)
                methods += [
                    Method(f"{text}, {name}, {policy}", path, {"lukv.policy": policy}, int(metric.needs.chunk))
                    for policy in policies
                    if policy in metric.policies
                ]
            for method in methods:
                right = np.concatenate(ask(method, contexts, n_ubatch=n_ubatch, n_threads=n_threads))
                click.echo(json.dumps({"method": method.name, "right": float(right.mean()), "questions": len(right)}))
    except LukvError as error:
        raise SystemExit(f"eval_metrics: error: {error}") from None


if __name__ == "__main__":
    main()
