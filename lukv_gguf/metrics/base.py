"""What a metric may see of a layer, what it asks for, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lukv_gguf.errors import LukvError

Params = Mapping[str, float | int]


@dataclass(frozen=True)
class Needs:
    """What a metric reads besides the keys and positions of the cells. Nothing else is collected for it.

    Attributes
    ----------
    values : bool
        The values of the cells.
    window : int
        w, how many of the last queries.
    query_mean, query_covariance : bool
        Statistics of all queries before RoPE, and the rotation that brings them to future positions.
    n_future : int
        How many future positions that rotation averages over.
    output_norms : bool
        ||v W_O||_1 of each cell.
    attention_sums : bool
        The attention that each cell has received.
    reconstruction : bool
        The attention that each cell receives while the model repeats its context: a second pass.
    chunk : int
        Tokens that it repeats at a time.
    past : bool
        What earlier commits of a bounded cache said about each cell.
    plain_keys : bool
        The keys before RoPE.
    key_sum : bool
        The sum of all keys that a bounded cache has seen, those of evicted cells too.
    """

    values: bool = False
    window: int = 0
    query_mean: bool = False
    query_covariance: bool = False
    n_future: int = 0
    output_norms: bool = False
    attention_sums: bool = False
    reconstruction: bool = False
    chunk: int = 0
    past: bool = False
    plain_keys: bool = False
    key_sum: bool = False

    @classmethod
    def union(cls, needs: Iterable[Needs]) -> Needs:
        """What several metrics need together: the larger of each entry."""
        found = list(needs)
        return cls(**{f.name: max((getattr(n, f.name) for n in found), default=f.default) for f in fields(cls)})

    def names(self) -> list[str]:
        """The entries that are set, with their size where they have one."""
        return [
            f.name if value is True else f"{f.name} {value}" for f in fields(self) if (value := getattr(self, f.name))
        ]


@dataclass(frozen=True)
class LayerState:
    """One layer's cache, as a metric may use it. Cells are in the order of their positions.

    H KV heads, G query heads for each of them, T cells of a head.

    Attributes
    ----------
    keys : Tensor [H, T, d]
        Keys after RoPE.
    values : Tensor [H, T, d_value], optional
    plain_keys : Tensor [H, T, d], optional
        Keys before RoPE.
    queries : Tensor [H * G, w, d], optional
        Queries of the last w tokens, after RoPE. Fewer if there were not as many.
    query_mean : Tensor [H * G, d], optional
        Mean of the queries before RoPE, without those of the first `sink` tokens.
    query_covariance : Tensor [H * G, d, d], optional
        Their covariance.
    future_rotation : Tensor [d, d], optional
        Mean of the rotations of the next positions; it multiplies a query before RoPE from the left.
    output_norms : Tensor [H, G, T], optional
        ||v W_O||_1 with the slice of the output projection that belongs to each query head.
    attention_sums : Tensor [H * G, T], optional
        Attention that each cell has received from all queries so far.
    reconstruction : Tensor [H, T], optional
        The largest attention that each cell received while the model repeated its context.
    key_sum : Tensor [H, d], optional
        Sum over the tokens read so far of k / ||k||, the keys after RoPE; by default over those that are here.
    past : Tensor [H, T], optional
        What earlier commits said about each cell, 0 for new ones: see `Metric.carry`. By default all cells are new.
    positions : int Tensor [T], optional
        By default 0 ... T - 1.
    n_past : int, optional
        Tokens read so far, by default T. The last query has the position n_past - 1.
    layer, head : int
        Index of the layer, and of the first KV head of these.
    sink, recent : int
        Protected tokens at the start and at the end.
    attention_scale : float, optional
        Factor on the attention scores, by default 1 / sqrt(d).
    attention_cap : float
        Soft cap of the attention scores, c · tanh(x / c); 0 for none.
    """

    keys: Tensor
    values: Tensor | None = None
    plain_keys: Tensor | None = None
    queries: Tensor | None = None
    query_mean: Tensor | None = None
    query_covariance: Tensor | None = None
    future_rotation: Tensor | None = None
    output_norms: Tensor | None = None
    attention_sums: Tensor | None = None
    reconstruction: Tensor | None = None
    key_sum: Tensor | None = None
    past: Tensor | None = None
    positions: Tensor | None = None
    n_past: int | None = None
    layer: int = 0
    head: int = 0
    sink: int = 0
    recent: int = 0
    attention_scale: float | None = None
    attention_cap: float = 0.0

    @property
    def n_tokens(self) -> int:
        """Tokens read so far."""
        return self.keys.shape[1] if self.n_past is None else self.n_past

    @property
    def cell_positions(self) -> Tensor:
        """Positions of the cells, int64 [T]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.keys.shape[1], device=self.keys.device)

    @property
    def scale(self) -> float:
        """Factor on the attention scores."""
        return self.keys.shape[-1] ** -0.5 if self.attention_scale is None else self.attention_scale

    @property
    def is_sink(self) -> Tensor:
        """Which cells are protected at the start, bool [T]."""
        return self.cell_positions < self.sink

    @property
    def is_protected(self) -> Tensor:
        """Which cells are protected, bool [T]."""
        return self.is_sink | (self.cell_positions >= self.n_tokens - self.recent)


class Metric(ABC):
    """An intra-head metric π: it ranks the positions of each head by a score, higher = keep.

    A subclass sets the class attributes and implements `score`; the registry finds it by its name.

    Attributes
    ----------
    name : str
    summary : str
        What it keeps, in one line.
    cost : str
        What scoring the T cells of a head costs; d is the size of a head, G the queries that share it.
    native : bool
        Whether the native cache has it. Without, it ranks in profiles and nowhere else.
    trained : bool
        Whether it needs a scorer that was trained for the model.
    policies : tuple of str
        Policies of the native cache that it works with.
    defaults : mapping
        Its parameters. The type of a default, int or float, is the type of the parameter.
    minima : mapping
        The least value of a parameter; 0 where nothing is said.

    Parameters
    ----------
    **params
        Overrides of `defaults`.

    Raises
    ------
    LukvError
        A parameter that the metric does not have, or a value that makes no sense.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str]
    native: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    policies: ClassVar[tuple[str, ...]] = ("capacity", "prefill")
    defaults: ClassVar[Params] = {}
    minima: ClassVar[Params] = {}

    def __init__(self, **params: float) -> None:
        unknown = sorted(set(params) - set(self.defaults))
        if unknown:
            known = ", ".join(sorted(self.defaults)) or "none"
            raise LukvError(f"metric {self.name} has no parameter {', '.join(unknown)} (it has: {known})")
        self.params: dict[str, float | int] = dict(self.defaults)
        for name, value in params.items():
            self.params[name] = self._checked(name, value)

    def _checked(self, name: str, value: float) -> float | int:
        kind, least = type(self.defaults[name]), self.minima.get(name, 0)
        if not least <= value < 2**31 or (kind is int and value != int(value)):  # NaN too
            number = "a whole number" if kind is int else "a number"
            raise LukvError(f"metric {self.name}: {name} must be {number} of at least {least}, is {value:g}")
        return kind(value)

    @property
    def weights_digest(self) -> str:
        """A hash of the weights of a trained metric."""
        return ""

    @property
    def needs(self) -> Needs:
        """What it reads besides keys and positions."""
        return Needs()

    def check_model(self, n_layer: int, n_head_kv: int, d_key: int, d_value: int) -> None:
        """Raise LukvError if it cannot score the heads of such a model."""

    @abstractmethod
    def score(self, state: LayerState) -> Tensor:
        """Score of each cell, [H, T], float32. Those of protected cells do not matter."""

    def carry(self, state: LayerState) -> Tensor:
        """What `LayerState.past` will be at the next commit, [H, T], for a metric that needs it."""
        raise NotImplementedError
