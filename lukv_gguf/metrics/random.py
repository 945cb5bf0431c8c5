"""Random: a baseline that looks at nothing, and says the same everywhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric

_MASK = 0xFFFFFFFF


class Random(Metric):
    """A hash of seed, layer, head and position as a number in [0, 1): 24 bits, so that float32 holds them all.

    A token has the same score whenever it is asked for. The hash is the 32-bit finalizer of MurmurHash3 (public domain),
    applied once for each of the four numbers.
    """

    name = "random"
    summary = "tokens by a hash of their position, a baseline"
    cost = "T"
    native = True
    defaults: ClassVar = {"seed": 0}

    def score(self, state: LayerState) -> Tensor:
        positions = state.cell_positions.to(torch.int64)
        rows = []
        for head in range(state.head, state.head + state.keys.shape[0]):
            hashed = torch.full_like(positions, int(self.params["seed"]))
            for number in (state.layer, head, positions):
                hashed = _mix((_mix(hashed) + number) & _MASK)
            rows.append((hashed >> 8).to(torch.float32) / 2**24)
        return torch.stack(rows)


def _mix(x: Tensor) -> Tensor:
    """Finalizer of MurmurHash3 on 32-bit numbers."""
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK
    return x ^ (x >> 16)
