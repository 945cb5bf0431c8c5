"""SnapKV: keep what the last queries attend to, and its neighbours."""

from __future__ import annotations

from torch import Tensor

from lukv_gguf.metrics.attention import WindowMetric


class SnapKV(WindowMetric):
    """Mean of the attention of the last w queries; parameters as of `WindowMetric`.

    The paper lets each query head choose; the mean over the group is what its authors recommend for grouped-query
    attention, and what kvpress does.

    References
    ----------
    Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation", arXiv 2404.14469.
    """

    name = "snapkv"
    summary = "what the last queries attend to, and its neighbours"
    cost = "w G T d"
    native = True

    def indicator(self, attention: Tensor) -> Tensor:
        return attention.mean(dim=2)
