"""ExpectedAttention: keep what future queries will attend to, if they are like the past ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric, Needs


class ExpectedAttention(Metric):
    """Softmax over the cells of log E[exp(q · k)] for a Gaussian q, mean over the group, times ||v||.

    With μ and Σ of the queries before RoPE, R the mean rotation of the next positions and s the attention scale,
    log E[exp(s q · k)] = s k · Rμ + s²/2 k · RΣRᵀk. The score is (softmax + epsilon) · ||v||. Protected tokens at the
    start take part neither in the statistics nor in the softmax.

    Parameters: ``future``, positions that R averages over; ``epsilon``; ``covariance`` and ``vnorm``, 0 to leave that
    factor out.

    References
    ----------
    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arXiv 2510.00636; kvpress, ``ExpectedAttentionPress``. The default epsilon is that of the LU-KV project.
    """

    name = "expectedattention"
    summary = "what queries like the past ones will attend to, times the length of the value"
    cost = "G T d²"
    native = True
    defaults: ClassVar = {"future": 512, "epsilon": 0.02, "covariance": 1, "vnorm": 1}
    minima: ClassVar = {"future": 1}

    @property
    def needs(self) -> Needs:
        return Needs(
            values=bool(self.params["vnorm"]),
            query_mean=True,
            query_covariance=bool(self.params["covariance"]),
            n_future=int(self.params["future"]),
        )

    def score(self, state: LayerState) -> Tensor:
        n_head_kv, n_cells, d_key = state.keys.shape
        keys = state.keys.to(torch.float32)[:, None]
        scores = state.scale * (keys @ future_queries(state)[..., None])[..., 0]
        if self.params["covariance"]:
            assert state.query_covariance is not None and state.future_rotation is not None
            covariance = state.future_rotation @ state.query_covariance @ state.future_rotation.T
            covariance = covariance.view(n_head_kv, -1, d_key, d_key)
            scores = scores + state.scale**2 / 2 * ((keys @ covariance) * keys).sum(dim=-1)
        weights = scores.masked_fill(state.is_sink, float("-inf")).softmax(dim=-1).mean(dim=1)
        if not self.params["vnorm"]:
            return weights
        assert state.values is not None
        return (weights + self.params["epsilon"]) * torch.linalg.vector_norm(state.values, dim=-1, dtype=torch.float32)


def future_queries(state: LayerState) -> Tensor:
    """The mean query at the next positions, Rμ: [H, G, d]."""
    assert state.query_mean is not None and state.future_rotation is not None
    mean = state.query_mean @ state.future_rotation.T
    return mean.view(state.keys.shape[0], -1, state.keys.shape[-1])
