"""Two metrics that share a budget."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.expectedattention import ExpectedAttention
from lukv_gguf.metrics.keydiff import KeyDiff
from lukv_gguf.metrics.kvzip import KVZip


class KeyDiffAnd(Metric):
    """A share of a budget for the best cells by KeyDiff, the rest for the best others by another metric.

    What stands out among the keys, and what is attended to, are different cells: KeyDiff keeps a number in a page of prose and
    loses a sentence of it, attention the other way round.

    Parameters: ``share``, KeyDiff's part of a budget; those of the other metric. Beside KeyDiff, ExpectedAttention ranks
    better, and for less, by the mean query alone (``covariance`` and ``vnorm`` 0).
    """

    name = KeyDiff.name
    cost = "T d, and that of the other metric"
    bases: ClassVar = {
        ExpectedAttention.name: {"share": 0.75, "covariance": 0, "vnorm": 0},
        KVZip.name: {"share": 0.5},
    }
    """The other metrics, and the defaults of their parameters beside KeyDiff."""

    def __init__(self, other: type[Metric], **params: float) -> None:
        self.name = f"{KeyDiff.name}-{other.name}"  # type: ignore[misc]
        self.defaults, self.minima = {**other.defaults, **self.bases[other.name]}, other.minima  # type: ignore[misc]
        self.native, self.policies = other.native, other.policies  # type: ignore[misc]
        super().__init__(**params)
        if self.params["share"] > 1:
            raise LukvError(f"metric {self.name}: share must be a number of at most 1, is {self.params['share']:g}")
        self._metrics = (KeyDiff(), other(**{name: self.params[name] for name in other.defaults}))
        self.summary = f"a share by {KeyDiff.name}, the rest by {other.name}"  # type: ignore[misc]

    @property
    def needs(self) -> Needs:
        return Needs.union(metric.needs for metric in self._metrics)

    def score(self, state: LayerState) -> Tensor:
        share = float(np.float32(self.params["share"]))  # as the file has it
        return in_turns(*(metric.score(state) for metric in self._metrics), state, share)


def in_turns(first: Tensor, second: Tensor, state: LayerState, share: float = 0.5) -> Tensor:
    """Scores [H, T] of a choice by two others: the first one has a share of the budget, one half if nothing is said.

    What a budget keeps grows with it, one cell at a time. The order in which cells come in is the ranking, so one ranking
    holds for every budget. Protected cells are first in both parts.
    """
    rows = [_turns(*both, share) for both in zip(_ranked(first, state), _ranked(second, state))]
    return torch.from_numpy(np.stack(rows)).to(state.keys.device)


def _ranked(scores: Tensor, state: LayerState) -> list[list[int]]:
    """Cells of each head in the order of their scores, protected ones first."""
    scores = scores.masked_fill(state.is_protected, float("inf"))
    return scores.argsort(dim=-1, descending=True, stable=True).tolist()


def _turns(first: list[int], second: list[int], share: float) -> np.ndarray:
    """Scores that rank cells as they enter the choice when the budget grows: minus the number of earlier ones. [T].

    With a budget of b, the best floor(share * b) of `first` are chosen, and the best others of `second`. One more lets in
    the next of `first`, if that number grows, or, if that one is there already, the next of `second` in its place.
    """
    scores = np.empty(len(first), np.float32)
    others = iter(second)
    taken: set[int] = set()
    for n_before in range(len(first)):
        n_first = math.floor(share * n_before)
        cell = first[n_first] if math.floor(share * (n_before + 1)) > n_first else None
        if cell is None or cell in taken:
            cell = next(i for i in others if i not in taken)
        taken.add(cell)
        scores[cell] = -n_before
    return scores
