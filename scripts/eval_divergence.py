"""What an eviction does to the full cache's own answers: KL(full || evicted), teacher-forced, in the reference model.

    python scripts/eval_divergence.py MODEL.gguf --profile PROFILE.npz [--profile ...] [--tasks ...] [--device cuda]

Each context of RULER's tasks is read once and evicted at once (policy prefill), by each metric of the profiles and with its
budgets. A right or wrong answer is one bit of a context; this is a number for every token, so few contexts tell metrics apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lukv_gguf import defaults, metrics
from lukv_gguf.allocation import uniform
from lukv_gguf.collect import Collector, reconstruct
from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import ruler
from lukv_gguf.evaluate.tasks import Sample, tokenize
from lukv_gguf.metrics import Metric, Needs
from lukv_gguf.profile import IntArray, default_dtype, find_device, rank, score_layer
from lukv_gguf.profile_file import Profile, load_profiles
from lukv_gguf.reference import KVCache, ReferenceModel, Tokenizer
from lukv_gguf.refine import divergence
from lukv_gguf.replay import Replay, make_replays

UNTIL = 64  # tokens of an answer


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", type=click.Path(path_type=Path), multiple=True, required=True, help="May be given again.")
@click.option("--ratio", default=defaults.RATIO, show_default=True)
@click.option("--tasks", default="niah_multikey_2,niah_multikey_3,niah_multivalue,niah_single_3,vt,fwe,cwe,qa_1,qa_2", show_default=True)
@click.option("--length", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("-n", "n", type=click.IntRange(min=1), default=2, show_default=True, help="Contexts of each task.")
@click.option("--seed", type=click.IntRange(min=0), default=777, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    model_path: Path, profiles: tuple[Path, ...], ratio: float, tasks: str, length: int, n: int, seed: int, device: str
) -> None:
    """Print a table: metrics and budgets down, tasks across; nats per token, the mean over questions."""
    try:
        names = tasks.split(",")
        if unknown := sorted({*names} - {*ruler.tasks()}):
            raise LukvError(f"unknown task {unknown[0]!r}; known: {', '.join(ruler.tasks())}")
        entries = [entry for path in profiles for entry in load_profiles(path).values()]
        if len({entry.metric for entry in entries}) < len(entries):
            raise LukvError("two profiles for one metric: give one of them")
        if len({(entry.sink, entry.recent) for entry in entries}) > 1:
            raise LukvError("the profiles protect different tokens (sink, recent): they cannot be compared")
        chosen = [metrics.get(entry.metric, **entry.metric_params) for entry in entries]
        place = find_device(device)
        model = ReferenceModel.load(model_path, dtype=default_dtype(place), device=place)
        wanted = (model.config.n_layer, model.config.n_head_kv)
        for entry in entries:
            if entry.budget.shape[1:] != wanted:
                raise LukvError(f"a profile for {entry.budget.shape[1:]} layers and heads, the model has {wanted}")
        if length > model.config.n_context_train:
            raise LukvError(f"the model was trained with {model.config.n_context_train} tokens, not with {length}: --length")
        rows: dict[str, dict[str, list[float]]] = {}
        with Tokenizer(model_path) as tokenizer:
            samples = [sample for name in names for sample in ruler.make_samples(name, tokenizer, length, n, seed)]
            for sample in track(samples, "contexts", console=Console(stderr=True)):
                for row, values in _of_sample(model, tokenizer, sample, entries, chosen, ratio):
                    rows.setdefault(row, {}).setdefault(sample.task, []).extend(values)
        table = Table("KL, nats per token", *(name.removeprefix("niah_") for name in names), "mean")
        for row, of_tasks in rows.items():
            means = [float(np.mean(of_tasks.get(name, [np.nan]))) for name in names]  # no answer, no number
            table.add_row(row, *(f"{mean:.3f}" for mean in (*means, np.mean(means))))
        Console().print(table)
    except LukvError as error:
        raise SystemExit(f"eval_divergence: error: {error}") from None


def _of_sample(
    model: ReferenceModel, tokenizer: Tokenizer, sample: Sample, entries: list[Profile], chosen: list[Metric], ratio: float
) -> Iterator[tuple[str, list[float]]]:
    prompt = tokenize(tokenizer, sample)
    sink, recent = entries[0].sink, entries[0].recent
    cache, rankings = _read(model, tokenizer, prompt.prefix, chosen, sink, recent)
    answers = model.decode_batch(cache, prompt.suffixes, min(UNTIL, sample.n_answer), end_tokens=tokenizer.end_tokens)
    given = [Replay([*suffix, *answer], 0, len(answer)) for suffix, answer in zip(prompt.suffixes, answers) if answer]
    for entry, metric, ranking in zip(entries, chosen, rankings):
        budgets = {"uniform": uniform(ratio, *ranking.shape[:2]), "profile": entry.budget_at(ratio)}
        found = [divergence(model, cache, [replay], ranking, sink + recent, list(budgets.values())) for replay in given]
        for name, values in zip(budgets, zip(*found)):
            yield f"{metric.name}, {name}", list(values)


def _read(
    model: ReferenceModel, tokenizer: Tokenizer, prefix: list[int], chosen: list[Metric], sink: int, recent: int
) -> tuple[KVCache, list[IntArray]]:
    """The cache of a context, and the ranking by each metric."""
    needs = Needs.union(metric.needs for metric in chosen)
    collector, states = Collector(needs, sink, recent), []
    cache = model.prefill(prefix, observer=lambda *layer: states.append(collector(*layer)))
    if needs.reconstruction:
        found = reconstruct(model, cache, make_replays(tokenizer, prefix, needs.chunk), sink)
        states = [replace(state, reconstruction=of_layer) for state, of_layer in zip(states, found)]
    scores = [torch.stack([score_layer(metric, state) for state in states]).float().cpu().numpy() for metric in chosen]
    return cache, [rank(of_metric, sink, recent)[0] for of_metric in scores]


if __name__ == "__main__":
    main()
