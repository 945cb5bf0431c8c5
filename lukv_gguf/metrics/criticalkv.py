"""CriticalKV: a metric's choice, corrected by what a value does to the output."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.cake import Cake
from lukv_gguf.metrics.expectedattention import ExpectedAttention
from lukv_gguf.metrics.h2o import H2O
from lukv_gguf.metrics.shares import in_turns
from lukv_gguf.metrics.snapkv import SnapKV


class CriticalKV(Metric):
    """One half of a budget for the best cells by another metric, the other half by its score times ||v W_O||_1.

    Parameters: those of the other metric; ``epsilon``, added to its score before the product.

    References
    ----------
    Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
    arXiv 2502.03805; kvpress, ``CriticalKVPress``.
    """

    name = "criticalkv"
    cost = "that of the other metric, and G d n_embd for every token read"
    bases: ClassVar = (Cake.name, ExpectedAttention.name, H2O.name, SnapKV.name)

    def __init__(self, base: type[Metric], **params: float) -> None:
        # the norm of W_O's product takes the place of that of the value
        plain = {"vnorm": 0} if "vnorm" in base.defaults else {}
        self.name = f"{CriticalKV.name}-{base.name}"  # type: ignore[misc]
        self.defaults = {**base.defaults, **plain, "epsilon": 1e-4}  # type: ignore[misc]
        self.minima = base.minima  # type: ignore[misc]
        self.native = base.native  # type: ignore[misc]
        super().__init__(**params)
        of_base = {name: self.params[name] for name in base.defaults if name != "epsilon"}
        self._base = base(**of_base)
        self.summary = f"what {base.name} chooses, one half of it weighed by what a value does to the output"  # type: ignore[misc]

    @property
    def needs(self) -> Needs:
        return Needs.union([self._base.needs, Needs(output_norms=True)])

    def carry(self, state: LayerState) -> Tensor:
        return self._base.carry(state)

    def score(self, state: LayerState) -> Tensor:
        assert state.output_norms is not None
        score = self._base.score(state)
        product = (score + self.params["epsilon"]) * state.output_norms.mean(dim=1)
        return in_turns(score, product, state)
