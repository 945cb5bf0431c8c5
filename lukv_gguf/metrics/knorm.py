"""K-norm: keep the shortest keys."""

from __future__ import annotations

import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric


class KNorm(Metric):
    """s_j = -||k_j||.

    References
    ----------
    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
    """

    name = "knorm"
    summary = "the shortest keys"
    cost = "T d"
    native = True

    def score(self, state: LayerState) -> Tensor:
        return -torch.linalg.vector_norm(state.keys, dim=-1, dtype=torch.float32)
