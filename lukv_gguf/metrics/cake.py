"""CAKE: keep what the last queries attend to much, or now more and now less."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lukv_gguf.metrics.attention import WindowMetric


class Cake(WindowMetric):
    """Mean + γ · variance of the attention of the last w queries; parameters as of `WindowMetric`, and ``gamma``, γ.

    This is CAKE's eviction indicator. Its preference of layers (entropy and shift) is an allocation, and LU-KV another.
    The variance is the unbiased one; γ and the pooling are those of the authors' experiments.

    References
    ----------
    Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491.
    """

    name = "cake"
    summary = "what the last queries attend to much, or now more and now less (mean and variance)"
    cost = "w G T d"
    native = True
    defaults: ClassVar = {"window": 32, "kernel": 5, "carry": 0, "gamma": 200.0}
    minima: ClassVar = {"window": 2, "kernel": 1}

    @property
    def ceiling(self) -> float:
        return 1.0 + 0.5 * self.params["gamma"]  # the variance of two numbers in [0, 1] is at most a half

    def indicator(self, attention: Tensor) -> Tensor:
        mean = attention.mean(dim=2)
        return mean + self.params["gamma"] * attention.var(dim=2) if attention.shape[2] > 1 else mean
