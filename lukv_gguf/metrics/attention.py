"""Attention of the last queries over the cells: what the window metrics share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics.base import LayerState, Metric, Needs


def window_attention(state: LayerState) -> Tensor:
    """Attention weights of the last w queries over the cells of their head: [H, G, w, T], float32.

    The softmax runs over the cells that exist and that the query may see, over all cells where it may see none. Without
    any query there is one that gives nothing.
    """
    assert state.queries is not None
    n_head_kv, n_cells, _ = state.keys.shape
    n_window = state.queries.shape[1]
    if not n_window:
        return torch.zeros(n_head_kv, len(state.queries) // n_head_kv, 1, n_cells, device=state.keys.device)
    queries = state.queries.to(torch.float32).unflatten(0, (n_head_kv, -1))
    scores = queries @ state.keys.to(torch.float32).transpose(-1, -2)[:, None] * state.scale
    if state.attention_cap:
        scores = (scores / state.attention_cap).tanh() * state.attention_cap
    query_positions = torch.arange(state.n_tokens - n_window, state.n_tokens, device=state.keys.device)
    hidden = state.cell_positions > query_positions[:, None]
    hidden &= ~hidden.all(dim=-1, keepdim=True)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)


class WindowMetric(Metric):
    """A metric on the attention of the last w queries.

    The tokens of the window itself come first, later ones before earlier ones: no attention says enough about them. What
    the window says about the others is average-pooled over neighbouring cells, then the mean over the group is taken.

    A bounded cache scores at every commit, with the queries before it, and what these do not look at goes for good.

    Parameters: ``window``, w; ``kernel``, cells that are pooled, an odd number; ``carry`` 1 for the largest of what this and
    earlier windows said about a cell.
    """

    defaults: ClassVar = {"window": 32, "kernel": 5, "carry": 0}
    minima: ClassVar = {"window": 1, "kernel": 1}

    def __init__(self, **params: float) -> None:
        super().__init__(**params)
        if self.params["kernel"] % 2 == 0:
            raise LukvError(f"metric {self.name}: kernel must be odd, is {self.params['kernel']}")

    @property
    def needs(self) -> Needs:
        return Needs(window=int(self.params["window"]), past=bool(self.params["carry"]))

    def score(self, state: LayerState) -> Tensor:
        age = self._age(state).to(torch.float32)
        newness = self.ceiling + 1.0 - age / self.params["window"]
        return self.carry(state) + torch.where(age < self.params["window"], newness, 0.0)

    def carry(self, state: LayerState) -> Tensor:
        kernel, outside = int(self.params["kernel"]), self._age(state) >= self.params["window"]
        seen = self.indicator(window_attention(state))[..., outside]
        found = torch.zeros(state.keys.shape[:2], device=state.keys.device)
        if seen.shape[-1]:
            found[:, outside] = avg_pool1d(seen, kernel, stride=1, padding=kernel // 2).mean(dim=1)
        return torch.maximum(found, state.past) if self.params["carry"] and state.past is not None else found

    @staticmethod
    def _age(state: LayerState) -> Tensor:
        return state.n_tokens - 1 - state.cell_positions

    @property
    def ceiling(self) -> float:
        """What no indicator exceeds."""
        return 1.0

    def indicator(self, attention: Tensor) -> Tensor:
        """What the attention [H, G, w, T] of the window says about each cell, [H, G, T]."""
        raise NotImplementedError
