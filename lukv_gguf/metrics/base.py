"""What a metric sees of a layer, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lukv_gguf.errors import LukvError


@dataclass(frozen=True)
class LayerState:
    """One layer's cache, as a metric may use it.

    Attributes
    ----------
    keys : Tensor [n_head_kv, T, d_head]
        Keys after RoPE.
    values : Tensor [n_head_kv, T, d_head], optional
    queries : Tensor [n_head, w, d_head], optional
        Queries of the last w tokens, after RoPE.
    """

    keys: Tensor
    values: Tensor | None = None
    queries: Tensor | None = None


class Metric(ABC):
    """An intra-head metric π: it ranks the positions of each head by a score, higher = keep.

    A subclass sets `name` and `defaults` and implements `score`; the registry finds it by its name.

    Parameters
    ----------
    **params
        Overrides of `defaults`.

    Raises
    ------
    LukvError
        A parameter that the metric does not have.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, float]] = {}

    def __init__(self, **params: float) -> None:
        unknown = sorted(set(params) - set(self.defaults))
        if unknown:
            known = ", ".join(sorted(self.defaults)) or "none"
            raise LukvError(f"metric {self.name} has no parameter {', '.join(unknown)} (it has: {known})")
        self.params: dict[str, float] = {**self.defaults, **params}

    @abstractmethod
    def score(self, state: LayerState) -> Tensor:
        """Score of each position, [n_head_kv, T], float32."""
