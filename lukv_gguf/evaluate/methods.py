"""The ways to hold the cache that are compared, and the file that selects one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lukv_gguf import defaults, metadata
from lukv_gguf.embed import blank_profile, build_metadata, profile_of
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import read_header
from lukv_gguf.metadata import LukvMetadata
from lukv_gguf.profile_file import ALLOCATIONS, Profile, choose_profile, load_profiles

FULL = "full"
NAMES = (FULL, *ALLOCATIONS)
REPEATING = ("kvzip", "keydiff-kvzip")
"""Metrics that evict only after the context was repeated; by their names, since the registry of metrics needs torch."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid. The full cache has no metric and no policy, and the ratio 1."""

    method: str
    metric: str
    ratio: float
    policy: str
    kv_type: str

    @property
    def is_full(self) -> bool:
        """Whether nothing is evicted."""
        return self.method == FULL

    def overrides(self) -> dict[str, Any]:
        """What selects it, given a file with the method's table."""
        if self.is_full:
            return {"lukv.enabled": False}
        return {"lukv.enabled": True, "lukv.ratio": float(self.ratio), "lukv.policy": self.policy}


def grid(
    methods: Sequence[str],
    metrics: Sequence[str],
    ratios: Sequence[float],
    policies: Sequence[str],
    kv_types: Sequence[str],
) -> list[Cell]:
    """All combinations that there are, the full cache once for each type of K and V and always: the others are compared with it."""
    cells = [Cell(FULL, "", 1.0, "", kv_type) for kv_type in kv_types]
    for kv_type, metric, policy, method, ratio in product(kv_types, metrics, policies, methods, ratios):
        if method != FULL and (metric not in REPEATING or policy == "prefill"):
            cells.append(Cell(method, metric, ratio, policy, kv_type))
    return cells


@dataclass(frozen=True)
class Method:
    """A method with its parameters, as named on the command line: ``lukv``, ``lukv:blend=0+floor=0.2``.

    Attributes
    ----------
    allocation
        One of `NAMES`.
    floor, blend
        As of `embed.embed_model`.
    profile
        A profile file of its own, where the run's is not meant.
    """

    allocation: str
    floor: float | None = None
    blend: float | None = None
    profile: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read a name; LukvError for one that makes no sense."""
        name, _, rest = text.partition(":")
        if name not in NAMES:
            raise LukvError(f"unknown method {name!r}; known: {', '.join(NAMES)}")
        fields: dict[str, Any] = {}
        for part in rest.split("+") if rest else []:
            key, _, value = part.partition("=")
            if key not in ("floor", "blend", "profile") or not value:
                raise LukvError(f"method {text!r}: expected floor=, blend= or profile= with a value, found {part!r}")
            try:
                fields[key] = Path(value) if key == "profile" else float(value)
            except ValueError:
                raise LukvError(f"method {text!r}: {key} must be a number") from None
        if name == FULL and fields:
            raise LukvError("the full cache has no parameters")
        return cls(name, **fields)


class Tables:
    """Tables of all methods and metrics for one model, and where they come from.

    Parameters
    ----------
    model
        The GGUF file, with or without a table.
    profile
        A profile file; without it, only what the file's own table and the model's shape give.
    given
        Metrics to their names with parameters, where those are not the defaults: for budgets that need no profile.
    """

    def __init__(self, model: Path, profile: Path | None, given: Mapping[str, str] | None = None) -> None:
        self.model, self.profile = model, profile
        self._given = given or {}
        self._embedded = metadata.read_metadata(model)
        self._shape = metadata.model_shape(read_header(model))
        self._profiles = load_profiles(profile) if profile is not None else {}
        for one in self._profiles.values():
            self._check_shape(one, str(profile))

    def missing(self, methods: Sequence[str], metrics: Sequence[str]) -> list[str]:
        """Metrics that need a profile which is not there."""
        found = []
        for metric, method in product(metrics, map(Method.parse, methods)):
            has_own = self._has_own(metric) and method.allocation == "lukv"
            needs = method.allocation in ("lukv", "adakv") and method.profile is None and not has_own
            if needs and metric not in self._profiles and metric not in found:
                found.append(metric)
        return found

    def metrics(self) -> list[str]:
        """Those of the profile, or of the file's table, or the default one."""
        if self._profiles:
            return list(self._profiles)
        return [self._embedded.metric if self._embedded is not None else defaults.METRIC]

    def provenance(self, metric: str) -> Mapping[str, str]:
        """What the profile says about itself."""
        return self._profiles[metric].provenance if metric in self._profiles else {}

    def table(self, name: str, metric: str) -> LukvMetadata:
        """The table of a method.

        Raises
        ------
        LukvError
            It needs a profile that is not there.
        """
        method = Method.parse(name)
        profile = self._profile_for(method, metric)
        if method.allocation != "lukv":
            profile = profile.allocated(method.allocation)
        own = self._embedded
        scorer = own.scorer if own is not None and own.metric == metric else None
        return build_metadata(
            profile, floor=method.floor, blend=method.blend, allocation=method.allocation, scorer=scorer
        )

    def _profile_for(self, method: Method, metric: str) -> Profile:
        if method.profile is not None:
            profile = choose_profile(method.profile, metric)
            self._check_shape(profile, str(method.profile))
            return profile
        if metric in self._profiles:
            return self._profiles[metric]
        if self._has_own(metric):
            return profile_of(self._embedded, self.model.stem)
        if method.allocation in ("uniform", "pyramidkv"):
            from lukv_gguf import metrics  # torch: slow to import

            return blank_profile(metrics.parse(self._given.get(metric, metric)), self._shape, {})
        raise LukvError(
            f"{method.allocation} with {metric} needs a profile: lukv-gguf profile {self.model} --metric {metric}"
        )

    def _has_own(self, metric: str) -> bool:
        own = self._embedded
        return own is not None and own.metric == metric and own.provenance.get("allocation", "lukv") == "lukv"

    def _check_shape(self, profile: Profile, path: str) -> None:
        found = profile.budget.shape[1:]
        if found != self._shape:
            ours, theirs = metadata.shape_text(*found), metadata.shape_text(*self._shape)
            raise LukvError(f"{path}: made for a model of {ours}, {self.model} has {theirs}")


class TableFile:
    """A copy of a model whose table is exchanged: only the budgets are written again where nothing else differs.

    Parameters
    ----------
    model, folder
        The model, and a folder for the copy, which `close` removes.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.path = folder / model.name
        self._current: LukvMetadata | None = None

    def select(self, table: LukvMetadata) -> None:
        """Make the file carry a table."""
        if self._current is not None and _same_but_budgets(self._current, table):
            header = read_header(self.path)
            with self.path.open("r+b") as file:
                for key, budget in (
                    (metadata.KEY_BUDGET, table.budget),
                    (metadata.KEY_PROFILE_BUDGET, table.profile_budget),
                ):
                    file.seek(header.pairs[key].value_start + 12)  # behind the type and the number of its elements
                    file.write(np.ascontiguousarray(budget, "<f4").tobytes())
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            metadata.embed(self._model, self.path, table)
        self._current = table

    def close(self) -> None:
        """Remove the copy, with all shards."""
        shutil.rmtree(self._folder, ignore_errors=True)


def table_key(table: LukvMetadata | None) -> str:
    """A hash of what a table makes the cache do; empty for none."""
    if table is None:
        return ""
    text = repr((table.metric, sorted(table.metric_params.items()), table.sink, table.recent))
    digest = hashlib.sha256(text.encode() + (table.scorer.digest.encode() if table.scorer is not None else b""))
    for array in (table.profile_ratios, table.profile_budget):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _same_but_budgets(a: LukvMetadata, b: LukvMetadata) -> bool:
    def rest(meta: LukvMetadata) -> Mapping[str, Any]:
        return {
            "ratio": meta.ratio, "metric": meta.metric, "params": dict(meta.metric_params), "sink": meta.sink,
            "recent": meta.recent, "ratios": meta.profile_ratios.tolist(),
            "scorer": meta.scorer.digest if meta.scorer is not None else None,
        }  # fmt: skip

    return rest(a) == rest(b)
