"""Profiles: the record, one self-describing file for all metrics of a run, and the curves of the LU-KV project.

A profile file is a NumPy archive (``.npz``, no pickled objects):

| array | shape | meaning |
| --- | --- | --- |
| ``description`` | | JSON: format, version, metrics with parameters, sink, recent, provenance |
| ``ratios`` | [n] | kept fractions of the whole cache, ascending |
| ``budgeted`` | [L] | layers whose cache is shared out (not those with a sliding window) |
| ``METRIC.budget`` | [n, L, H] | Φ: kept fraction per head |
| ``METRIC.gap`` | [L, H] | optimality gap, share of the head's importance |
| ``METRIC.marginal`` | [L, H, T] | importance of the position at each rank, mean over queries |
| ``METRIC.scores`` | [L, H, T] | the metric's score at each rank |
| ``METRIC.query_budget`` | [Q, n, L, H] | Φ of each query |

The last three are missing where a profile was made from a curve.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lukv_gguf import __version__, allocation
from lukv_gguf.allocation import apply_floor_and_blend
from lukv_gguf.errors import UNREADABLE_RECORD, LukvError, reading
from lukv_gguf.gguf_header import replacing
from lukv_gguf.metadata import MEAN_TOLERANCE

FORMAT, VERSION = "lukv-profile", 1
GRID_RATIOS = np.arange(1, 100) / 100.0  # also those of the LU-KV project's curves
GAP_RATIO = 0.2  # the kept fraction at which a profile reports the optimality gap
ALLOCATIONS = ("lukv", "uniform", "pyramidkv", "adakv")
_OPTIONAL = ("marginal", "scores", "query_budget")


FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Budgets of a model for one metric.

    Attributes
    ----------
    metric, metric_params, sink, recent
        What the budgets were solved for; they hold for nothing else. `sink` and `recent` are the
        protected tokens at the start and at the end.
    ratios : array [n]
        Kept fractions of the whole cache, ascending.
    budget : array [n, L, H]
        Φ: kept fraction per head, as solved or refined. The mean of ``budget[i]`` is ``ratios[i]``.
    gap : array [L, H]
        Optimality gap of the metric where every head keeps `GAP_RATIO`, as a share of the head's total
        importance; mean over queries.
    provenance
        How the profile came about.
    budgeted : bool array [L]
        Layers whose cache can be shared out. The others, with a sliding window, hold no more than that; their rows of
        `budget` are the ratio.
    marginal : float32 array [L, H, T], optional
        Importance of the position at each rank, d(i); mean over queries.
    scores : float32 array [L, H, T], optional
        The metric's score at each rank; infinite for protected tokens.
    query_budget : float32 array [Q, n, L, H], optional
        The budgets of each query, of which `budget` is the mean unless it was refined.
    """

    metric: str
    metric_params: Mapping[str, float]
    sink: int
    recent: int
    ratios: FloatArray
    budget: FloatArray
    gap: FloatArray
    provenance: Mapping[str, str]
    budgeted: npt.NDArray[np.bool_] = field(default=None)  # type: ignore[assignment]
    marginal: npt.NDArray[np.float32] | None = None
    scores: npt.NDArray[np.float32] | None = None
    query_budget: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.budgeted is None:
            object.__setattr__(self, "budgeted", np.ones(self.budget.shape[1], dtype=bool))

    def allocated(self, name: str) -> Profile:
        """The same with the budgets of another allocation: one of `ALLOCATIONS`.

        Raises
        ------
        LukvError
            No such allocation, or the profile has no scores to allocate by.
        """
        if name == "lukv":
            return self
        n_layer, n_head_kv = int(self.budgeted.sum()), self.budget.shape[2]
        if name == "uniform":
            table = allocation.uniform(self.ratios, n_layer, n_head_kv)
        elif name == "pyramidkv":
            table = allocation.pyramid_kv(self.ratios, n_layer, n_head_kv)
        elif name == "adakv":
            if self.scores is None:
                raise LukvError("this profile holds no scores, which adakv needs; profile the model again")
            table = allocation.ada_kv(self.scores[self.budgeted], self.ratios)
        else:
            raise LukvError(f"unknown allocation {name!r}; known: {', '.join(ALLOCATIONS)}")
        budget = np.broadcast_to(self.ratios[:, None, None], self.budget.shape).copy()
        budget[:, self.budgeted] = table
        provenance = {key: text for key, text in self.provenance.items() if not key.startswith("refine_")}
        return replace(self, budget=budget, provenance=provenance)

    def budgets(self, floor: float = 0.0, blend: float = 0.0) -> FloatArray:
        """Budgets to use: Φ blended with uniform, with a floor.

        Returns
        -------
        array [n, L, H]
            The mean of entry i is ``ratios[i]``.

        Raises
        ------
        LukvError
            `floor` or `blend` is not in [0, 1].
        """
        return apply_floor_and_blend(self.budget, self.ratios, floor, blend)

    def budget_at(self, ratio: float, floor: float = 0.0, blend: float = 0.0) -> FloatArray:
        """Budget for any ratio, linear between the grid's, empty at 0 and full at 1.

        Returns
        -------
        array [L, H]
            Its mean is `ratio`.

        Raises
        ------
        LukvError
            `ratio` is not in (0, 1], or `floor` or `blend` not in [0, 1].
        """
        if not 0.0 < ratio <= 1.0:
            raise LukvError(f"ratio must lie in (0, 1], not {ratio:g}")
        shape = (1, *self.budget.shape[1:])
        grid = np.concatenate(([0.0], self.ratios, [1.0]))
        table = np.concatenate((np.zeros(shape), self.budget, np.ones(shape)))
        right = int(np.clip(np.searchsorted(grid, ratio), 1, len(grid) - 1))
        weight = (ratio - grid[right - 1]) / (grid[right] - grid[right - 1])
        between = (1.0 - weight) * table[right - 1] + weight * table[right]
        return apply_floor_and_blend(np.clip(between, 0.0, 1.0), ratio, floor, blend)


def save_profiles(path: str | Path, profiles: Mapping[str, Profile]) -> None:
    """Write the profiles of one run, by the metric's name, in place of `path` once the file is complete.

    Raises
    ------
    LukvError
        It cannot be written.
    """
    first = next(iter(profiles.values()))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "layers": first.budget.shape[1],
        "heads_kv": first.budget.shape[2],
        "metrics": {name: dict(profile.metric_params) for name, profile in profiles.items()},
        "sink": first.sink,
        "recent": first.recent,
        "provenance": {
            "profiled_with": f"lukv-gguf {__version__}",
            "profiled_on": datetime.date.today().isoformat(),
            **first.provenance,
        },
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "description": np.array(json.dumps(description, indent=1)),
        "ratios": first.ratios,
        "budgeted": first.budgeted,
    }
    for name, profile in profiles.items():
        for field in ("budget", "gap", *_OPTIONAL):
            if getattr(profile, field) is not None:
                arrays[f"{name}.{field}"] = np.asarray(getattr(profile, field), np.float32)
    with replacing(Path(path)) as file:
        np.savez_compressed(file, **arrays)


def load_profiles(path: str | Path) -> dict[str, Profile]:
    """Read and check a profile file.

    Returns
    -------
    dict of Profile
        By the metric's name.

    Raises
    ------
    LukvError
        It cannot be read, is no profile, is damaged, or is of a later version.
    """
    with reading(path, "profile"), np.load(path, allow_pickle=False) as file:
        description = json.loads(str(file["description"]))
        if description["format"] != FORMAT:
            raise ValueError("another format")
        if description["version"] != VERSION:
            raise LukvError(f"{path}: profile of version {description['version']}, this program knows {VERSION}; update it")
        return {name: _read_profile(name, description, file) for name in description["metrics"]}


def choose_profile(path: str | Path, metric: str | None) -> Profile:
    """The profile for a metric, or the only one of a file.

    Raises
    ------
    LukvError
        The file has none for it, or several to choose from.
    """
    profiles = load_profiles(path)
    if metric is None and len(profiles) == 1:
        return next(iter(profiles.values()))
    if metric not in profiles:
        problem = "holds several metrics" if metric is None else f"holds nothing for the metric {metric}"
        raise LukvError(f"{path}: {problem}; choose one with --metric: {', '.join(profiles)}")
    return profiles[metric]


def export_curve(path: str | Path, profile: Profile) -> None:
    """Write Φ as the LU-KV project stores it: ``.npy``, [99, L, H], pruned fractions at 1 % ... 99 % pruned.

    Raises
    ------
    LukvError
        It cannot be written.

    References
    ----------
    kvpress's ``LUKVPress`` and the curves of https://github.com/baidu-baige/LU-KV.
    """
    kept = np.stack([profile.budget_at(1.0 - pruned) for pruned in GRID_RATIOS])
    with replacing(Path(path)) as file:
        np.save(file, 1.0 - kept)


def import_curve(
    path: str | Path, metric: str, metric_params: Mapping[str, float], sink: int, recent: int, model: str
) -> Profile:
    """A profile from a curve of the LU-KV project; the reverse of `export_curve`.

    Parameters
    ----------
    metric, metric_params, sink, recent
        What the curve was made for: the file does not say.
    model
        Name of the model, for the provenance.

    Raises
    ------
    LukvError
        It cannot be read, or is no such curve.
    """
    try:
        curve = np.load(path, allow_pickle=False)
    except OSError as error:
        raise LukvError(f"cannot read {path}: {error.strerror or 'not a curve'}") from None
    except UNREADABLE_RECORD:
        raise LukvError(f"{path}: not a NumPy array without objects") from None
    if not isinstance(curve, np.ndarray) or curve.ndim != 3 or len(curve) != 99 or curve.dtype.kind != "f":
        found = f"{curve.dtype} {list(curve.shape)}" if isinstance(curve, np.ndarray) else "several arrays"
        raise LukvError(f"{path}: a curve holds floats [99, layers, KV heads], this file {found}")
    budget = 1.0 - curve[::-1].astype(np.float64)
    _check_budget(f"{path}: the curve", budget, GRID_RATIOS)
    return Profile(
        metric=metric,
        metric_params=dict(metric_params),
        sink=sink,
        recent=recent,
        ratios=GRID_RATIOS,
        budget=budget,
        gap=np.full(budget.shape[1:], np.nan),
        provenance={"profiled_model": model, "curve": Path(path).name},
    )


def _read_profile(name: str, description: Mapping[str, Any], file: Mapping[str, npt.NDArray[Any]]) -> Profile:
    n_layer, n_head_kv = int(description["layers"]), int(description["heads_kv"])
    ratios, budget, gap = (file[key].astype(np.float64) for key in ("ratios", f"{name}.budget", f"{name}.gap"))
    shape = (len(ratios), n_layer, n_head_kv)
    optional = {field: file[f"{name}.{field}"] for field in _OPTIONAL if f"{name}.{field}" in file}
    found = {"budget": budget.shape, "gap": gap.shape, "budgeted": file["budgeted"].shape}
    wanted = {"budget": shape, "gap": shape[1:], "budgeted": shape[1:2]}
    for field, array in optional.items():
        found[field] = array.shape[1:] if field == "query_budget" else array.shape[:-1]
        wanted[field] = shape if field == "query_budget" else shape[1:]
    if found != wanted:
        raise ValueError(f"arrays of {name} do not fit together")
    if not len(ratios) or not (np.all(ratios > 0) and np.all(ratios <= 1) and np.all(np.diff(ratios) > 0)):
        raise ValueError("ratios must ascend in (0, 1]")
    _check_budget(f"budget of {name}", budget, ratios)
    return Profile(
        metric=name,
        metric_params={key: value for key, value in description["metrics"][name].items()},
        sink=int(description["sink"]),
        recent=int(description["recent"]),
        ratios=ratios,
        budget=budget,
        gap=gap,
        provenance={key: str(value) for key, value in description["provenance"].items()},
        budgeted=file["budgeted"].astype(bool),
        **optional,
    )


def _check_budget(what: str, budget: npt.NDArray[np.float64], ratios: npt.NDArray[np.float64]) -> None:
    if not np.all((budget >= -1e-6) & (budget <= 1.0 + 1e-6)):  # false for NaN
        raise LukvError(f"{what} holds values outside [0, 1]")
    np.clip(budget, 0.0, 1.0, out=budget)
    far = np.abs(budget.mean(axis=(1, 2)) - ratios)
    if far.max() > MEAN_TOLERANCE:
        at = int(far.argmax())
        raise LukvError(
            f"{what} keeps {budget[at].mean():.3f} on average where it should keep {ratios[at]:.3f}"
        )
