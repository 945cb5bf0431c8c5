"""Other ways from what a profile measured to budgets, as profile files for `lukv-gguf eval --methods lukv:profile=FILE`.

    python scripts/ablate_profile.py PROFILE.npz -o FOLDER [--metric keydiff]

Written are `curves.npz` (the queries' gains are averaged before one solve), `q75.npz` and `q90.npz` (each head gets what
75 or 90 % of the queries ask for at most, then all are scaled to the ratio), `root.npz` (the square roots of the budgets,
scaled to the ratio). Refinement is left out of all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from lukv_gguf.allocation import concave_envelope, greedy_counts, scale_factor
from lukv_gguf.errors import LukvError
from lukv_gguf.profile_file import FloatArray, Profile, choose_profile, save_profiles


def from_mean_gains(profile: Profile) -> FloatArray:
    """One solve on the mean of the queries' gains: [n, L, H]."""
    gains = profile.marginal[profile.budgeted].astype(np.float64)
    n_layer, n_head_kv, n_position = gains.shape
    totals = np.rint(profile.ratios * n_layer * n_head_kv * n_position).astype(np.int64)
    relaxed = concave_envelope(gains).reshape(n_layer * n_head_kv, n_position)
    budget = profile.budget.copy()
    budget[:, profile.budgeted] = greedy_counts(relaxed, totals).reshape(-1, n_layer, n_head_kv) / n_position
    return budget


def from_quantile(profile: Profile, quantile: float) -> FloatArray:
    """A quantile of the queries' budgets, scaled to each ratio; heads that would exceed 1 leave the rest to others: [n, L, H]."""
    return _scaled(profile, np.quantile(profile.query_budget[:, :, profile.budgeted].astype(np.float64), quantile, axis=0))


def _scaled(profile: Profile, wanted: FloatArray) -> FloatArray:
    budget = profile.budget.copy()
    for i, ratio in enumerate(profile.ratios):
        positive = np.maximum(wanted[i], 1e-9)
        budget[i, profile.budgeted] = np.minimum(1.0, scale_factor(positive, ratio) * positive)
    return budget


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--metric", help="Which of its metrics.  [default: the only one]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="Folder.  [default: this one]")
def main(path: Path, metric: str | None, output: Path) -> None:
    """Write variants of a profile."""
    try:
        profile = choose_profile(path, metric)
        if profile.marginal is None or profile.query_budget is None:
            raise LukvError(f"{path}: holds no measurements, only budgets")
        output.mkdir(parents=True, exist_ok=True)
        provenance = {key: text for key, text in profile.provenance.items() if not key.startswith("refine_")}
        profile = replace(profile, budget=profile.query_budget.mean(axis=0).astype(np.float64), provenance=provenance)
        variants = {
            "curves": from_mean_gains(profile),
            "q75": from_quantile(profile, 0.75),
            "q90": from_quantile(profile, 0.90),
            "root": _scaled(profile, np.sqrt(profile.budget[:, profile.budgeted])),
        }
        for name, budget in variants.items():
            save_profiles(output / f"{name}.npz", {profile.metric: replace(profile, budget=budget)})
            print(f"{output / name}.npz: at 20 % {np.round(np.quantile(budget[19 * len(budget) // 99], [0, 0.25, 0.5, 0.75, 1]), 3)}")
    except LukvError as error:
        raise SystemExit(f"ablate_profile: error: {error}") from None


if __name__ == "__main__":
    main()
