"""What budgets lose when the model repeats its calibration text: KL(full || evicted) with real eviction.

    python scripts/eval_refinement.py MODEL.gguf --profile PROFILE.npz [--ratio 0.2 ...]

The profile is one of `lukv-gguf profile MODEL.gguf -o PROFILE.npz` with the default text, refined, for a metric of keys and
values (keydiff, knorm). It holds the budgets from before the refinement, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from lukv_gguf import calibration, defaults, metrics
from lukv_gguf.allocation import apply_floor_and_blend, uniform
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import Needs
from lukv_gguf.profile import default_dtype, find_device, rank_positions
from lukv_gguf.profile_file import FloatArray, choose_profile
from lukv_gguf.reference import ReferenceModel, Tokenizer
from lukv_gguf.refine import N_PART, divergence
from lukv_gguf.replay import make_replays


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.option("--profile", "profile_path", type=click.Path(path_type=Path), required=True)
@click.option("--ratio", "ratios", type=float, multiple=True, default=[defaults.RATIO], help="May be given again.")
@click.option("--parts", default=8, show_default=True, help="Parts of the text to repeat, evenly spread.")
@click.option("--device", default="cpu", show_default=True)
def main(model_path: Path, profile_path: Path, ratios: tuple[float, ...], parts: int, device: str) -> None:
    """Print a table: allocations down, ratios across."""
    try:
        profile = choose_profile(profile_path, None)
        if profile.query_budget is None or "refine_steps" not in profile.provenance:
            raise LukvError(f"{profile_path}: not a refined profile with its measurements")
        place = find_device(device)
        model = ReferenceModel.load(model_path, dtype=default_dtype(place), device=place)
        found_shape, wanted_shape = profile.budget.shape[1:], (model.config.n_layer, model.config.n_head_kv)
        if found_shape != wanted_shape:
            raise LukvError(f"{profile_path}: made for {found_shape} layers and heads, the model has {wanted_shape}")
        metric = metrics.get(profile.metric, **profile.metric_params)
        if replace(metric.needs, values=False, key_sum=False) != Needs():
            raise LukvError(f"the metric {metric.name} needs more than keys and values, which is not implemented here")
        context, _ = calibration.load_default()
        with Tokenizer(model_path) as tokenizer:
            before, _ = tokenizer.frame_user_message()
            prefix = tokenizer.begin_tokens(before + context)[: int(profile.provenance["context_tokens"])]
            replays = make_replays(tokenizer, prefix, N_PART, model.config.n_context_train)
        replays = [replays[i] for i in np.linspace(0, len(replays) - 1, min(parts, len(replays))).astype(int)]
        cache = model.prefill(prefix)
        ranking = rank_positions(metric, cache, profile.sink, profile.recent)

        columns = [int(np.abs(profile.ratios - ratio).argmin()) for ratio in ratios]
        budgets: dict[str, list[FloatArray]] = {}
        for i in columns:
            ratio, refined = profile.ratios[i], profile.budget[i]
            solved = profile.query_budget[:, i].mean(axis=0).astype(np.float64)
            of_ratio = {
                "uniform": uniform(ratio, *refined.shape),
                "solved": solved,
                f"solved, floor {defaults.FLOOR}, blend {defaults.BLEND}": apply_floor_and_blend(
                    solved, ratio, defaults.FLOOR, defaults.BLEND
                ),
                "refined": refined,
                f"refined, floor {defaults.REFINED_FLOOR}": apply_floor_and_blend(refined, ratio, defaults.REFINED_FLOOR),
            }
            for name, budget in of_ratio.items():
                budgets.setdefault(name, []).append(budget)
        flat = [budget for row in budgets.values() for budget in row]
        found = iter(divergence(model, cache, replays, ranking, profile.sink + profile.recent, flat))
        table = Table("KL, nats per token", *(f"ratio {profile.ratios[i]:g}" for i in columns))
        for name, row in budgets.items():
            table.add_row(name, *(f"{next(found):.3f}" for _ in row))
        Console().print(table)
    except LukvError as error:
        raise SystemExit(f"eval_refinement: error: {error}") from None


if __name__ == "__main__":
    main()
