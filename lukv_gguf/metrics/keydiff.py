"""KeyDiff: keep the keys that differ most from the average key."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lukv_gguf.metrics.base import LayerState, Metric, Needs


class KeyDiff(Metric):
    """s_j = -cos(k_j, mean over i of k_i / ||k_i||), on the keys after RoPE.

    The mean is that of all tokens read so far. In a bounded cache the cells that are left are those that differ most from
    it, so a mean of these alone, as in the paper, drifts away with every commit: the sum is kept beside the cells.

    References
    ----------
    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364.
    """

    name = "keydiff"
    summary = "the keys that differ most from the mean key"
    cost = "T d"
    native = True

    @property
    def needs(self) -> Needs:
        return Needs(key_sum=True)

    def score(self, state: LayerState) -> Tensor:
        unit_keys = normalize(state.keys.to(torch.float32), dim=-1)
        direction = unit_keys.mean(dim=-2) if state.key_sum is None else state.key_sum
        anchor = normalize(direction, dim=-1)[:, None]
        return -(unit_keys * anchor).sum(dim=-1)
