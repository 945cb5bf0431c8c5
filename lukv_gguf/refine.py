"""Budgets refined on the model's own loss: gradient descent on the divergence from the full cache.

The budgets that `profile.solve_budgets` finds are optimal for a sum over heads. What a head's loss does to the model's
output, and what other heads make up for, is not in that sum. Here the model repeats parts of the calibration text, once
from the full cache and once from an evicted one, and the budgets follow the gradient of KL(full || evicted). Repeating
needs every part of the text, and needs no questions.

Eviction is made smooth for it: a head of budget b gives the position at rank i of T the weight

    sigmoid((log b - log(i / T)) / s)

in its softmax. With s towards 0 this is what the cache does; s falls from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import expit, logit
from torch import Tensor
from torch.nn import functional as F

from lukv_gguf.allocation import scale_factor
from lukv_gguf.errors import LukvError
from lukv_gguf.reference import KVCache, ReferenceModel
from lukv_gguf.reference.model import _Layer
from lukv_gguf.replay import Replay

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_PART = 96
"""Tokens of a part that is repeated."""
_BATCH = 2  # parts of a step
_RATE = 0.3  # of Adam, on the logarithms of the budgets
_SOFTNESS = (0.5, 0.1)  # s of the first and of the last step
_SMALLEST = 1e-4  # budgets below are not told apart, so that their logarithms stay finite


def refine_budgets(
    model: ReferenceModel,
    cache: KVCache,
    replays: Sequence[Replay],
    ranking: IntArray,
    n_protected: int,
    budget: FloatArray,
    n_step: int,
    *,
    budgeted: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Let budgets follow the gradient of KL(full || evicted) on parts of the context that the model repeats.

    Parameters
    ----------
    model
        With all its weights in memory.
    cache
        Keys and values of the context, T tokens.
    replays
        Requests to repeat its parts (`replay.make_replays`).
    ranking : int array [L, H, T]
        Positions, best first, the `n_protected` that are never evicted before all others.
    budget : array [L, H]
        Where to start: kept fractions. Their mean over budgeted layers stays as it is.
    n_step
        Steps of Adam, each on a few of the parts, at least one. The result is the mean of the second half of them.
    budgeted : bool array [L], optional
        Layers that take part; the others keep everything.

    Returns
    -------
    array [L, H]
        Kept fractions, as in `budget`.

    Raises
    ------
    LukvError
        The model's predictions are not numbers.
    """
    budgeted = np.ones(len(budget), dtype=bool) if budgeted is None else budgeted
    device, n_token = model.device, cache.n_token
    keys, values = ([t.clone() for t in tensors] for tensors in (cache.keys, cache.values))  # autograd takes no inference tensors
    rank = _ranks(ranking)
    distance = torch.from_numpy(np.log((rank + 1) / n_token)).float().to(device)
    distance[torch.from_numpy(rank < n_protected).to(device)] = float("-inf")

    ratio = float(budget[budgeted].mean())
    start = np.clip(_start(budget[budgeted], ratio), _SMALLEST, 1.0)
    logs = torch.tensor(np.log(start), dtype=torch.float32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=_RATE, betas=(0.8, 0.95))
    generator = np.random.default_rng(0)
    n_batch = min(_BATCH, len(replays))
    order: list[int] = []
    settled = []
    softness = np.geomspace(*_SOFTNESS, n_step)
    for step in range(n_step):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, 2.0 * (1.0 - step / n_step))
        if len(order) < n_batch:
            order = generator.permutation(len(replays)).tolist()
        batch, order = [replays[i] for i in order[:n_batch]], order[n_batch:]

        fractions = _at_ratio(logs.exp(), ratio)
        gates: list[Tensor | None] = [None] * len(budget)
        for i, of_layer in zip(np.flatnonzero(budgeted), fractions):
            gates[i] = F.logsigmoid((of_layer.clamp(min=_SMALLEST).log()[:, None] - distance[i]) / softness[step])
        with torch.no_grad():
            full = _repeat(model, keys, values, batch, [None] * len(budget)).log_softmax(dim=-1)
        evicted = _repeat(model, keys, values, batch, gates).log_softmax(dim=-1)
        loss = F.kl_div(evicted, full, log_target=True, reduction="sum") / len(full)
        if not loss.isfinite():
            raise LukvError("the model's predictions are not numbers, so budgets cannot be refined: --refine 0")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= n_step // 2:
            settled.append(_at_ratio(logs.detach().exp(), ratio).cpu().numpy())
        if progress is not None:
            progress(step + 1, n_step)
    result = np.array(budget, dtype=np.float64)
    result[budgeted] = np.mean(settled, axis=0)
    return result


@torch.no_grad()
def divergence(
    model: ReferenceModel,
    cache: KVCache,
    replays: Sequence[Replay],
    ranking: IntArray,
    n_protected: int,
    budgets: Sequence[FloatArray],
) -> list[float]:
    """KL(full || evicted) where each head really keeps its budget, for each of the budgets: nats per token.

    Parameters as of `refine_budgets`; an evicted cache keeps `n_protected` positions at least.
    """
    rank, total = _ranks(ranking), np.zeros(len(budgets))
    for replay in replays:
        full = _repeat(model, cache.keys, cache.values, [replay], [None] * len(rank)).log_softmax(dim=-1)
        for i, budget in enumerate(budgets):
            kept = np.maximum(np.rint(budget * cache.n_token), n_protected)
            gates = torch.zeros(rank.shape, device=model.device)
            gates[torch.from_numpy(rank >= kept[..., None]).to(model.device)] = float("-inf")
            evicted = _repeat(model, cache.keys, cache.values, [replay], list(gates)).log_softmax(dim=-1)
            total[i] += float(F.kl_div(evicted, full, log_target=True, reduction="sum"))
    return (total / sum(replay.end - replay.start for replay in replays)).tolist()


def shift_odds(budgets: FloatArray, ratios: FloatArray, at: int, refined: FloatArray) -> FloatArray:
    """Carry what was refined at one ratio over to the others.

    The odds b / (1 - b) of each head are multiplied by the same factor at every ratio, and those of all heads by one
    more, so that the mean stays the ratio. What `refine_budgets` starts from is what they are multiplied in.

    Parameters
    ----------
    budgets : array [n, L, H]
        Kept fractions, as solved.
    ratios : array [n]
        The means that they have to have.
    at
        Index of the ratio that was refined.
    refined : array [L, H]
        The budgets there.

    Returns
    -------
    array [n, L, H]
        Row `at` is `refined`, but for rounding. A head's budget mostly grows with the ratio, but need not.
    """
    start = _logit(_start(budgets, ratios[:, None, None]))
    shifted = start + _logit(refined) - start[at]
    common = [brentq(lambda c: expit(row + c).mean() - ratio, -40.0, 40.0) for row, ratio in zip(shifted, ratios)]
    return expit(shifted + np.reshape(common, (-1, 1, 1)))


def _start(budget: FloatArray, ratio: npt.ArrayLike) -> FloatArray:
    """Budgets away from 0 and 1, where there is no gradient."""
    return 0.9 * budget + 0.1 * np.asarray(ratio)


def _logit(x: FloatArray) -> FloatArray:
    return logit(np.clip(x, _SMALLEST, 1.0 - _SMALLEST))


def _at_ratio(fractions: Tensor, ratio: float) -> Tensor:
    """Fractions scaled so that their mean is the ratio; none is above 1."""
    scaled = fractions
    for _ in range(8):  # what the largest cannot take goes to the others; the gradient of one at 1 shrinks, and does not vanish
        scaled = (scaled * (ratio / scaled.mean())).clamp(max=1.0)
    factor = scale_factor(fractions.detach().cpu().double().numpy(), ratio)
    return scaled + ((fractions * factor).clamp(max=1.0) - scaled).detach()


def _ranks(ranking: IntArray) -> IntArray:
    """The place of each position in its head's ranking [L, H, T]."""
    rank = np.empty_like(ranking)
    np.put_along_axis(rank, ranking, np.broadcast_to(np.arange(ranking.shape[-1]), ranking.shape), axis=-1)
    return rank


def _repeat(
    model: ReferenceModel, keys: list[Tensor], values: list[Tensor], batch: Sequence[Replay], gates: Sequence[Tensor | None]
) -> Tensor:
    """Logits [n, n_vocab] that predict the parts of all replays, each behind the same gated context."""
    width = max(len(replay.tokens) for replay in batch)
    tokens = torch.tensor([[*replay.tokens, *[0] * (width - len(replay.tokens))] for replay in batch])
    x = model._embed(tokens)
    offsets = torch.arange(width, device=model.device)
    for i, layer in enumerate(model._layers):
        x = _layer_behind(model, layer, keys[i], values[i], offsets, x, gates[i])
    rows = [
        of_replay[len(replay.tokens) - (replay.end - replay.start) - 1 : len(replay.tokens) - 1]
        for replay, of_replay in zip(batch, x)
    ]
    return model._to_logits(torch.cat(rows))


def _layer_behind(
    model: ReferenceModel, layer: _Layer, keys: Tensor, values: Tensor, offsets: Tensor, x: Tensor, gate: Tensor | None
) -> Tensor:
    """One layer over rows of tokens [N, n, n_embd], behind a context [H, T, d] with gates [H, T] (logarithms)."""
    config = model.config
    n_row, n_own = x.shape[:2]
    n_token = keys.shape[1]
    q, own_keys, own_values = model._project(layer, x, n_token + offsets)
    q = q.view(n_row, n_own, config.n_head_kv, config.n_group, -1).permute(2, 0, 1, 3, 4).flatten(2, 3)
    hidden = [model._hidden(layer, n_token + offsets, torch.arange(n_token, device=x.device)) if layer.windowed else None]
    hidden.append(model._hidden(layer, offsets, offsets))
    out = _GatedAttention.apply(
        q * config.attention_scale,
        own_keys.permute(2, 0, 1, 3),
        own_values.permute(2, 0, 1, 3),
        gate,
        keys,
        values,
        [None if t is None else t.repeat_interleave(config.n_group, 0) for t in hidden],
        config.attention_cap,
    )
    out = out.view(config.n_head_kv, n_row, n_own, config.n_group, -1).permute(1, 2, 0, 3, 4)
    return model._finish_layer(layer, x.flatten(0, 1), out.reshape(n_row * n_own, -1)).view_as(x)


class _GatedAttention(torch.autograd.Function):
    """Attention of rows of queries to a gated context and to their own tokens, one head and row at a time.

    The weights are not kept: the backward pass computes them again. There is no gradient for the context.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        q: Tensor,  # [H, N, n * G, d], scaled
        own_keys: Tensor,  # [H, N, n, d]
        own_values: Tensor,
        gate: Tensor | None,  # [H, T], logarithms
        keys: Tensor,  # [H, T, d]
        values: Tensor,
        hidden: tuple[Tensor | None, Tensor],  # from each query, of the context [n * G, T] and its own tokens [n * G, n]
        cap: float,
    ) -> Tensor:
        out = q.new_empty(*q.shape[:-1], values.shape[-1])
        for h, r in np.ndindex(q.shape[:2]):
            head = _Head(h, r, q, own_keys, own_values, gate, keys, values, hidden, cap)
            out[h, r] = head.weights()[0] @ head.values
        ctx.save_for_backward(q, own_keys, own_values, gate, keys, values, *hidden, out)
        ctx.cap = cap
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, own_keys, own_values, gate, keys, values, *hidden, out = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, own_keys, own_values)]
        grad_gate = None if gate is None else torch.zeros_like(gate)
        inner = (grad * out).sum(dim=-1, keepdim=True)
        n_token = keys.shape[1]
        for h, r in np.ndindex(q.shape[:2]):
            head = _Head(h, r, q, own_keys, own_values, gate, keys, values, hidden, ctx.cap)
            weights, slope = head.weights()
            of_scores = (grad[h, r] @ head.values.T).sub_(inner[h, r]).mul_(weights)
            if grad_gate is not None:
                grad_gate[h] += of_scores[:, :n_token].sum(dim=0)
            if slope is not None:
                of_scores *= slope
            grads[0][h, r] = of_scores @ head.keys
            grads[1][h, r] = of_scores[:, n_token:].T @ q[h, r]
            grads[2][h, r] = weights[:, n_token:].T @ grad[h, r]
        return *grads, grad_gate, None, None, None, None


class _Head:
    """A KV head of one row: what its n * G queries attend to, [T + n, d]."""

    def __init__(
        self,
        h: int,
        r: int,
        q: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        gate: Tensor | None,
        keys: Tensor,
        values: Tensor,
        hidden: Sequence[Tensor | None],
        cap: float,
    ) -> None:
        self._q, self._gate, self._hidden, self._cap = q[h, r], None if gate is None else gate[h], hidden, cap
        self._n_token = keys.shape[1]
        self.keys = torch.cat([keys[h], own_keys[h, r]])
        self.values = torch.cat([values[h], own_values[h, r]])

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Attention weights [n * G, T + n], and the slope of the cap if there is one."""
        scores, slope = self._q @ self.keys.T, None
        if self._cap:
            slope = 1.0 - (scores / self._cap).tanh_() ** 2
            scores.div_(self._cap).tanh_().mul_(self._cap)
        far, near = scores[:, : self._n_token], scores[:, self._n_token :]
        if self._gate is not None:
            far += self._gate
        for part, hidden in zip((far, near), self._hidden):
            if hidden is not None:
                part.masked_fill_(hidden, float("-inf"))
        return scores.softmax(dim=-1), slope
