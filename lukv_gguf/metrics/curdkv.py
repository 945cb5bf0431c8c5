"""CurDKV: keep the cells with leverage in both keys and values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lukv_gguf.metrics.base import LayerState, Metric, Needs


class CurDKV(Metric):
    """Product of the squared norms of key and value, each as a share of its sum over a block of cells.

    The squared norms are what a Gaussian projection of keys and values has in expectation, so they stand for the
    paper's approximate leverage scores without its random matrix. Shares of blocks keep the choice local.

    Parameters: ``block``, cells of a block; 0 for shares of the whole head.

    References
    ----------
    Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition", arXiv 2509.15038;
    kvpress, ``CURPress``.
    """

    name = "curdkv"
    summary = "long keys with long values, relative to their neighbours (leverage)"
    cost = "T d"
    native = True
    defaults: ClassVar = {"block": 16}

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def score(self, state: LayerState) -> Tensor:
        assert state.values is not None
        return self._shares(state.keys) * self._shares(state.values)

    def _shares(self, vectors: Tensor) -> Tensor:
        squares = vectors.to(torch.float32).square().sum(dim=-1)
        n_cells = squares.shape[-1]
        block = int(self.params["block"]) or n_cells
        blocks = pad(squares, (0, -n_cells % block)).unflatten(-1, (-1, block))
        return (blocks / blocks.sum(dim=-1, keepdim=True)).flatten(-2)[..., :n_cells]
