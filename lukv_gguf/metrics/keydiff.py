"""KeyDiff: keep the keys that differ most from the average key."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lukv_gguf.metrics.base import LayerState, Metric


class KeyDiff(Metric):
    """s_j = -cos(k_j, mean over i of k_i / ||k_i||), on the keys after RoPE.

    References
    ----------
    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364.
    """

    name = "keydiff"
    summary = "the keys that differ most from the mean key"
    cost = "T d"
    native = True

    def score(self, state: LayerState) -> Tensor:
        unit_keys = normalize(state.keys.to(torch.float32), dim=-1)
        anchor = normalize(unit_keys.mean(dim=-2, keepdim=True), dim=-1)
        return -(unit_keys * anchor).sum(dim=-1)
