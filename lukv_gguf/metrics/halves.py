"""Metrics that share a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.expectedattention import ExpectedAttention
from lukv_gguf.metrics.keydiff import KeyDiff
from lukv_gguf.metrics.kvzip import KVZip


class KeyDiffAnd(Metric):
    """One half of a budget for the best cells by KeyDiff, the other half for the best others by another metric.

    What stands out among the keys, and what is attended to, are different cells: KeyDiff keeps a number in a page of prose and
    loses a sentence of it, attention the other way round.

    Parameters: those of the other metric.
    """

    name = KeyDiff.name
    cost = "T d, and that of the other metric"
    bases: ClassVar = (f"criticalkv-{ExpectedAttention.name}", ExpectedAttention.name, KVZip.name)

    def __init__(self, other: Callable[..., Metric], **params: float) -> None:
        of_other = other()
        self.name = f"{KeyDiff.name}-{of_other.name}"  # type: ignore[misc]
        self.defaults, self.minima = of_other.defaults, of_other.minima  # type: ignore[misc]
        self.native, self.policies = of_other.native, of_other.policies  # type: ignore[misc]
        self.summary = f"one half by {KeyDiff.name}, one half by {of_other.name}"  # type: ignore[misc]
        super().__init__(**params)
        self._metrics = (KeyDiff(), other(**self.params))

    @property
    def needs(self) -> Needs:
        return Needs.union(metric.needs for metric in self._metrics)

    def rankings(self, state: LayerState) -> list[Tensor]:
        return [ranking for metric in self._metrics for ranking in metric.rankings(state)]

    def score(self, state: LayerState) -> Tensor:
        return in_turns(self.rankings(state), state)


def in_turns(rankings: list[Tensor], state: LayerState) -> Tensor:
    """Scores [H, T] of a choice by several others: each chooses one half of what those before it left, the last one the rest.

    What a budget keeps grows with it, one cell at a time. The order in which cells come in is the ranking, so one ranking
    holds for every budget. Protected cells are first in all of them.
    """
    ranked = [_ranked(scores, state) for scores in rankings]
    return torch.from_numpy(np.stack([_turns(head) for head in zip(*ranked)])).to(state.keys.device)


def _ranked(scores: Tensor, state: LayerState) -> list[list[int]]:
    """Cells of each head in the order of their scores, protected ones first."""
    scores = scores.masked_fill(state.is_protected, float("inf"))
    return scores.argsort(dim=-1, descending=True, stable=True).tolist()


def _turns(orders: tuple[list[int], ...]) -> np.ndarray:
    """Scores that rank cells as they enter the choice when the budget grows: minus the number of earlier ones. [T].

    With a budget of b, the best floor(b / 2) of the first order are chosen, and so on with the others and what is left. One
    more lets in the next of one order. Where a later order had that one, it gets its own next in its place.
    """
    scores = np.empty(len(orders[0]), np.float32)
    others = [iter(order) for order in orders]
    owner: dict[int, int] = {}
    for n_before in range(len(orders[0])):
        turn = _next_turn(n_before, len(orders))
        while True:
            cell = next(i for i in others[turn] if owner.get(i, len(orders)) > turn)
            turn, owner[cell] = owner.get(cell, len(orders)), turn
            if turn == len(orders):
                break
        scores[cell] = -n_before
    return scores


def _next_turn(budget: int, n: int) -> int:
    """Which of n orders a budget that grows by one lets choose."""
    for turn in range(n - 1):
        if budget % 2:
            return turn
        budget -= budget // 2
    return n - 1
