"""CapKV: keep the cells whose values add most to what a head can say."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.expectedattention import future_queries


class CapKV(Metric):
    """Leverage scores s_i = w_i v_i · A⁻¹ v_i with A = I + Σ w_i v_i v_iᵀ, mean over the group.

    w_i = exp(τ cos(k_i, μ)), relative to the largest w of the head, and μ the mean query at the next positions. The
    paper takes the dot product of k and μ; cosines keep the exponent bounded, as in kvpress's ``CapPress``. Protected
    tokens at the start add nothing to A.

    Parameters: ``tau``, τ; ``future``, positions that the rotation of μ averages over; ``epsilon``, added to w in A.

    References
    ----------
    Tang et al., "Rethinking KV Cache Eviction via a Unified Information-Theoretic Objective", arXiv 2604.25975.
    """

    name = "capkv"
    summary = "the values that add most to the head's capacity (leverage)"
    cost = "G T d²"
    native = True
    defaults: ClassVar = {"tau": 5.0, "future": 512, "epsilon": 1e-6}
    minima: ClassVar = {"future": 1}

    @property
    def needs(self) -> Needs:
        return Needs(values=True, query_mean=True, n_future=int(self.params["future"]))

    def score(self, state: LayerState) -> Tensor:
        assert state.values is not None
        values = state.values.to(torch.float32)[:, None]
        anchor = normalize(future_queries(state), dim=-1)
        cosines = (normalize(state.keys.to(torch.float32), dim=-1)[:, None] @ anchor[..., None])[..., 0]
        cosines = cosines.masked_fill(state.is_sink, float("-inf"))
        weights = (self.params["tau"] * (cosines - cosines.amax(dim=-1, keepdim=True))).exp()
        in_capacity = (weights + self.params["epsilon"]).masked_fill(state.is_sink, 0.0)
        capacity = torch.eye(values.shape[-1], device=values.device) + (values * in_capacity[..., None]).mT @ values
        leverage = (values.mT * torch.linalg.solve(capacity, values.mT)).sum(dim=-2)
        return (weights * leverage).mean(dim=1)
