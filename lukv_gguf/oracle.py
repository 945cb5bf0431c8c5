"""What the cache will be needed for: oracle importance, eviction loss, optimality gap.

Importance, after Tang et al., "Predicting Future Utility" (arXiv 2602.08585):

    I_{l,h,j} = max_{k = 1..K_max} mean_{g = 1..G} || A_{l,g,k,j} · v_{l,h,j} · W_O^{(l,g)} ||_2

A is the attention weight that query head g gives to position j at decoding step k, v the value vector
of the KV head h, W_O the slice of the output projection that belongs to g. The mean over the G query
heads that share h stands inside the maximum: at one step, a position is worth what it gives to the
group together. (Outside, a position could add the peaks of different steps.) With ``group="max"`` the
order makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lukv_gguf.errors import LukvError
from lukv_gguf.reference import KVCache, ReferenceModel

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

Objective = Literal["relative", "paper"]
Group = Literal["mean", "max"]
OBJECTIVES: tuple[Objective, ...] = ("relative", "paper")
GROUPS: tuple[Group, ...] = ("mean", "max")


@dataclass(frozen=True)
class Oracle:
    """What full-attention decoding shows.

    Attributes
    ----------
    importance : float32 array [Q, L, H, T]
        Importance of each position of the shared prefix, for each query, layer and KV head.
    answers : list of list of int
        The decoded tokens of each query.
    """

    importance: npt.NDArray[np.float32]
    answers: list[list[int]]


def check_choices(objective: str, group: str) -> None:
    """Raise LukvError for an unknown objective or group reduction."""
    if objective not in OBJECTIVES:
        raise LukvError(f"unknown objective {objective!r}; known objectives: {', '.join(OBJECTIVES)}")
    if group not in GROUPS:
        raise LukvError(f"unknown group reduction {group!r}; known: {', '.join(GROUPS)}")


def decode_oracle(
    model: ReferenceModel,
    prefix: KVCache,
    suffixes: Sequence[Sequence[int]],
    n_new: int,
    *,
    objective: Objective = "relative",
    group: Group = "mean",
    end_tokens: Collection[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Oracle:
    """Let the model answer queries with full attention, and measure what it reads.

    Parameters
    ----------
    prefix
        Cache of the shared context, T tokens.
    suffixes
        Tokens of the Q queries after the context.
    n_new
        K_max, the most decoding steps of a query.
    objective
        ``paper``: importance as above. ``relative``: divided by the mean norm of the residual stream
        that enters the layer at the query's decoding steps. The norm grows with depth and the next
        norm layer divides it away, so without this the early layers count for too little.
    group
        How the query heads of a KV head are combined: ``mean`` or ``max``.

    Raises
    ------
    LukvError
        Unknown objective or group, or suffixes that cannot be decoded.
    """
    check_choices(objective, group)
    recorder = _ImportanceRecorder(model, prefix, len(suffixes), group)
    answers = model.decode_batch(prefix, suffixes, n_new, recorder, end_tokens=end_tokens, progress=progress)
    importance = recorder.peak
    if objective == "relative":
        importance /= (recorder.norm_sum / recorder.n_step)[:, :, None, None]
    return Oracle(importance.cpu().numpy(), answers)


def value_output_norms(model: ReferenceModel, prefix: KVCache, layer: int) -> Tensor:
    """||v_{l,h,j} · W_O^{(l,g)}||_2 of each position: Tensor [n_head_kv, n_group, T]."""
    weight = model.output_weight(layer)
    norms = [
        [torch.linalg.vector_norm(values @ per_query_head, dim=-1) for per_query_head in per_head]
        for values, per_head in zip(prefix.values[layer], weight)
    ]
    return torch.stack([torch.stack(per_head) for per_head in norms])


class _ImportanceRecorder:
    """A `DecodeObserver` that keeps the running maximum, never the attention of single steps."""

    def __init__(self, model: ReferenceModel, prefix: KVCache, n_query: int, group: Group) -> None:
        config = model.config
        self._group = group
        self._n_group = config.n_group
        self._value_norms = [value_output_norms(model, prefix, i) for i in range(config.n_layer)]
        shape = (n_query, config.n_layer, config.n_head_kv, prefix.n_token)
        self.peak = torch.zeros(shape, device=model.device)
        self.norm_sum = torch.zeros(n_query, config.n_layer, device=model.device)
        self.n_step = torch.zeros(n_query, config.n_layer, device=model.device)

    def __call__(self, layer: int, rows: Tensor, attention: Tensor, residual_norm: Tensor) -> None:
        norms = self._value_norms[layer]
        seen = attention[:, :, 0] * norms[:, 0]
        for g in range(1, self._n_group):
            if self._group == "mean":
                seen.addcmul_(attention[:, :, g], norms[:, g])
            else:
                seen = torch.maximum(seen, attention[:, :, g] * norms[:, g])
        if self._group == "mean":
            seen /= self._n_group
        peak = self.peak[:, layer]
        if len(rows) == len(peak):  # every query still decodes: no need to gather
            torch.maximum(peak, seen, out=peak)
        else:
            peak[rows] = torch.maximum(peak[rows], seen)
        self.norm_sum[rows, layer] += residual_norm
        self.n_step[rows, layer] += 1


def loss_curve(ranked_importance: FloatArray) -> FloatArray:
    """Eviction loss L(b) = Σ_{i > b} I_{rank i} for b = 0 ... T.

    Parameters
    ----------
    ranked_importance : array [..., T]
        Importance in rank order, best first.

    Returns
    -------
    array [..., T + 1]
        L(0) is the whole importance, L(T) is 0.

    References
    ----------
    Tang et al., arXiv 2602.08585, eviction loss of a metric.
    """
    tail = np.cumsum(ranked_importance[..., ::-1], axis=-1, dtype=np.float64)[..., ::-1]
    return np.concatenate((tail, np.zeros((*tail.shape[:-1], 1))), axis=-1)


def optimality_gap(importance: FloatArray, ranking: IntArray, kept: int) -> FloatArray:
    """Δ(π, π*, b) = L(M^π)(b) - L(M^*)(b): what a ranking loses beyond the best one, per head.

    Parameters
    ----------
    importance : array [..., T]
    ranking : int array, broadcastable to [..., T]
        Positions, best first.
    kept : int
        b, in 0 ... T.

    Returns
    -------
    array [...]
        At least 0, in units of the importance.

    Raises
    ------
    LukvError
        `kept` is out of range.
    """
    n_position = importance.shape[-1]
    if not 0 <= kept <= n_position:
        raise LukvError(f"a head cannot keep {kept} of {n_position} positions")
    kept_positions = np.broadcast_to(ranking[..., :kept], (*importance.shape[:-1], kept))
    got = np.take_along_axis(importance, kept_positions, axis=-1).sum(axis=-1, dtype=np.float64)
    first_kept = n_position - kept
    largest = np.partition(importance, min(first_kept, n_position - 1), axis=-1)[..., first_kept:]
    best = largest.sum(axis=-1, dtype=np.float64)
    return np.maximum(best - got, 0.0)
