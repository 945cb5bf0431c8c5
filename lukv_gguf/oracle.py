"""What the cache will be needed for: oracle importance, eviction loss, optimality gap.

Importance, after Tang et al., "Predicting Future Utility" (arXiv 2602.08585):

    I_{l,h,j} = max_{k = 1..K_max} mean_{g = 1..G} || A_{l,g,k,j} · v_{l,h,j} · W_O^{(l,g)} ||_2

A is the attention weight that query head g gives to position j at decoding step k, v the value vector
of the KV head h, W_O the slice of the output projection that belongs to g. The mean over the G query
heads that share h stands inside the maximum: at one step, a position is worth what it gives to the
group together. (Outside, a position could add the peaks of different steps.) With ``group="max"`` the
order makes no difference.

There are two ways to it. `decode_oracle` lets the reference model answer, token by token, with all its
weights in memory. `teacher_force` takes answers that are known already, from the deployed model, and
carries context, questions and answers through one layer after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lukv_gguf.collect import Collector, replay_layer
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Needs
from lukv_gguf.reference import KVCache, ReferenceModel
from lukv_gguf.replay import Replay

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


@dataclass
class ResidualStreams:
    """Where a pass through the layers stands; enough to go on with it later.

    Attributes
    ----------
    layer : int
        Layers passed.
    prefix : Tensor [T, n_embd]
        The residual stream of the shared context.
    queries : Tensor [N, n_embd]
        That of the queries' own tokens, one query after the other, and then of the replays.
    """

    layer: int
    prefix: Tensor
    queries: Tensor


@dataclass
class MeasuredLayer:
    """What one layer of a pass shows.

    Attributes
    ----------
    state : LayerState
        The shared context, as far as the metrics ask for it.
    importance : Tensor [Q, H, T], float32
    streams : ResidualStreams
        The residual streams behind the layer.
    """

    state: LayerState
    importance: Tensor
    streams: ResidualStreams


@torch.inference_mode()
def teacher_force(
    model: ReferenceModel,
    prefix: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    n_new: int,
    *,
    objective: Objective = "relative",
    group: Group = "mean",
    collector: Collector | None = None,
    replays: Sequence[Replay] = (),
    start: ResidualStreams | None = None,
) -> Iterator[MeasuredLayer]:
    """Measure importance on known answers, in one pass through the layers.

    Each layer is used once, so a streamed model is read from the disk once. The attention of the shared
    context is computed once, and the queries attend to it as suffixes.

    Parameters
    ----------
    prefix
        Tokens of the shared context, T of them.
    suffixes, answers
        The further tokens of each query, at least one, and what the model answered, without an end token.
    n_new
        K_max, the most decoding steps of an answer. One that is shorter was ended by a step of its own.
    objective, group
        See `decode_oracle`.
    collector
        Takes what `MeasuredLayer.state` holds.
    replays
        Parts of the context that the model repeats, for metrics that look at that.
    start
        Where an earlier pass stood.

    Yields
    ------
    MeasuredLayer
        One for each layer that was not passed before.

    Raises
    ------
    LukvError
        Unknown objective or group, or tokens that the model does not have.
    """
    check_choices(objective, group)
    n_step = [min(n_new, len(answer) + 1) for answer in answers]
    sequences = [[*suffix, *answer[: n - 1]] for suffix, answer, n in zip(suffixes, answers, n_step)]
    if not suffixes or not all(len(suffix) for suffix in suffixes):
        raise LukvError("importance needs at least one suffix, and one token or more in each")
    collector = collector or Collector(Needs())
    for tokens in (prefix, *sequences, *(replay.tokens for replay in replays)):
        model._check_tokens(tokens)
    lengths = [len(sequence) for sequence in sequences]
    prefix_positions = torch.arange(len(prefix), device=model.device)
    offsets = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    if start is None:
        packed = [token for tokens in (*sequences, *(replay.tokens for replay in replays)) for token in tokens]
        start = ResidualStreams(0, model._embed(torch.tensor(prefix)), model._embed(torch.tensor(packed)))
    x_prefix = start.prefix
    x_queries, *x_replays = start.queries.split([sum(lengths), *(len(replay.tokens) for replay in replays)])

    for i in range(start.layer, model.config.n_layer):
        layer = model._layers[i]
        q, k, v, x_prefix = model._prefill_layer(layer, x_prefix, prefix_positions)
        state = collector(model, i, layer, q, k, v)
        norms = _value_norms(v, model._output_weight(layer))
        residual_norms = torch.linalg.vector_norm(x_queries, dim=-1).split(lengths)
        own = [t.split(lengths) for t in model._project(layer, x_queries, len(prefix) + offsets)]
        attended, peaks = [], []
        for query, own_q, own_k, own_v, at, n in zip(range(len(lengths)), *own, offsets.split(lengths), n_step):
            own_cache = own_k.transpose(0, 1)[None], own_v.transpose(0, 1)[None]
            out, attention = model._attend(layer, own_q[None], at[None], (k, v), own_cache)
            attended.append(out[0])
            steps = attention.view(len(k), len(own_q), -1, len(prefix))[:, -n:]
            peak = _contribution(steps.transpose(0, 1), norms, group).amax(dim=0)
            if objective == "relative":
                peak = peak / residual_norms[query][-n:].mean()
            peaks.append(peak)
        x_queries = model._finish_layer(layer, x_queries, torch.cat(attended))
        if replays:
            reconstruction = torch.zeros(k.shape[:2], device=k.device)
            for r, replay in enumerate(replays):
                found, x_replays[r] = replay_layer(model, layer, x_replays[r], k, v, replay, collector.sink)
                reconstruction[:, replay.start : replay.end] = found
            state = dataclasses.replace(state, reconstruction=reconstruction)
        streams = ResidualStreams(i + 1, x_prefix, torch.cat([x_queries, *x_replays]))
        yield MeasuredLayer(state, torch.stack(peaks), streams)


def value_output_norms(model: ReferenceModel, prefix: KVCache, layer: int) -> Tensor:
    """||v_{l,h,j} · W_O^{(l,g)}||_2 of each position: Tensor [n_head_kv, n_group, T]."""
    return _value_norms(prefix.values[layer], model.output_weight(layer))


def _value_norms(values: Tensor, weight: Tensor) -> Tensor:
    """Norms of `values` [H, T, d] behind `weight` [H, G, d, n_embd].

    ||v W||² = v (W Wᵀ) vᵀ, and W Wᵀ is far smaller than v W for all positions.
    """
    gram = weight @ weight.transpose(-1, -2)
    squared = ((values[:, None] @ gram) * values[:, None]).sum(dim=-1)
    return squared.clamp_(min=0.0).sqrt_()


def _contribution(attention: Tensor, norms: Tensor, group: Group) -> Tensor:
    """||A v W_O|| over the query heads of a KV head: [n, H, G, T] times [H, G, T] to [n, H, T]."""
    n_group = attention.shape[2]
    seen = attention[:, :, 0] * norms[:, 0]
    for g in range(1, n_group):
        if group == "mean":
            seen.addcmul_(attention[:, :, g], norms[:, g])
        else:
            seen = torch.maximum(seen, attention[:, :, g] * norms[:, g])
    return seen / n_group if group == "mean" else seen


class _ImportanceRecorder:
    """A `DecodeObserver` that keeps the running maximum, never the attention of single steps."""

    def __init__(self, model: ReferenceModel, prefix: KVCache, n_query: int, group: Group) -> None:
        config = model.config
        self._group = group
        self._value_norms = [value_output_norms(model, prefix, i) for i in range(config.n_layer)]
        shape = (n_query, config.n_layer, config.n_head_kv, prefix.n_token)
        self.peak = torch.zeros(shape, device=model.device)
        self.norm_sum = torch.zeros(n_query, config.n_layer, device=model.device)
        self.n_step = torch.zeros(n_query, config.n_layer, device=model.device)

    def __call__(self, layer: int, rows: Tensor, attention: Tensor, residual_norm: Tensor) -> None:
        seen = _contribution(attention, self._value_norms[layer], self._group)
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
