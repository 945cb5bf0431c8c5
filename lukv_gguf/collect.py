"""What metrics need of a layer, taken while the reference model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lukv_gguf.metrics import LayerState, Needs
from lukv_gguf.replay import Replay

if TYPE_CHECKING:
    from lukv_gguf.reference import KVCache, ReferenceModel
    from lukv_gguf.reference.model import _Layer as Layer

_SCORE_CELLS = 1 << 24  # attention scores that exist at one time


@dataclass(frozen=True)
class Collector:
    """Takes from a layer what metrics ask for, and nothing else.

    Attributes
    ----------
    needs
        Of all metrics together.
    sink, recent
        Protected tokens at the start and at the end.
    """

    needs: Needs
    sink: int = 0
    recent: int = 0

    @torch.inference_mode()
    def __call__(self, model: ReferenceModel, index: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> LayerState:
        """The state of a layer after a whole prompt of T tokens.

        Parameters
        ----------
        q, k, v : Tensor [heads, T, d]
            Queries and keys after RoPE, and values.
        """
        needs, n_token = self.needs, q.shape[1]
        mean = covariance = rotation = sums = norms = None
        if needs.query_mean:
            mean, covariance = query_statistics(layer, q, self.sink, needs.query_covariance)
            rotation = future_rotation(layer, n_token, needs.n_future, q.shape[-1], q.device)
        if needs.attention_sums:
            sums = attention_sums(model, layer, q, k)
        if needs.output_norms:
            norms = output_norms(v, model._output_weight(layer))
        return LayerState(
            keys=k,
            values=v if needs.values else None,
            plain_keys=plain_keys(layer, k, torch.arange(n_token, device=k.device)) if needs.plain_keys else None,
            queries=q[:, max(0, n_token - needs.window) :].clone() if needs.window else None,
            query_mean=mean,
            query_covariance=covariance,
            future_rotation=rotation,
            output_norms=norms,
            attention_sums=sums,
            layer=index,
            sink=self.sink,
            recent=self.recent,
            attention_scale=model.config.attention_scale,
            attention_cap=model.config.attention_cap,
        )


def plain_keys(layer: Layer, k: Tensor, positions: Tensor) -> Tensor:
    """Keys [H, T, d] of tokens at these positions as they were before RoPE."""
    if layer.rope is None:
        return k
    return layer.rope.unrotate(k.transpose(0, 1), layer.rope.at(positions)).transpose(0, 1)


def query_statistics(layer: Layer, q: Tensor, sink: int, covariance: bool) -> tuple[Tensor, Tensor | None]:
    """Mean [n_head, d] and covariance [n_head, d, d] of queries [n_head, T, d] before RoPE, without the first `sink`."""
    q = q[:, min(sink, q.shape[1] - 1) :]
    if layer.rope is not None:
        positions = torch.arange(q.shape[1], device=q.device) + (sink if q.shape[1] else 0)
        q = layer.rope.unrotate(q.transpose(0, 1), layer.rope.at(positions)).transpose(0, 1)
    mean = q.mean(dim=1)
    if not covariance:
        return mean, None
    centred = q - mean[:, None]
    return mean, centred.mT @ centred / q.shape[1]


def future_rotation(layer: Layer, n_past: int, n_future: int, d_key: int, device: torch.device) -> Tensor:
    """Mean of the rotations of positions n_past ... n_past + n_future - 1: [d, d]."""
    if layer.rope is None:
        return torch.eye(d_key, device=device)
    return layer.rope.mean_rotation(torch.arange(n_past, n_past + n_future), d_key)


def attention_sums(model: ReferenceModel, layer: Layer, q: Tensor, k: Tensor) -> Tensor:
    """Attention that each of T tokens receives from all of them: [n_head, T]."""
    n_head, n_token, _ = q.shape
    keys = k.repeat_interleave(model.config.n_group, 0)
    total = torch.zeros(n_head, n_token, device=q.device)
    position = torch.arange(n_token, device=q.device)
    for part in position.split(max(1, _SCORE_CELLS // (n_head * n_token))):
        total += model._attention_weights(layer, q[:, part], keys, part, position).sum(dim=1)
    return total


def output_norms(values: Tensor, weight: Tensor) -> Tensor:
    """||v W_O||_1 of values [H, T, d] behind weights [H, G, d, n_embd]: [H, G, T]."""
    return torch.stack([torch.stack([(v @ w).abs().sum(dim=-1) for w in group]) for v, group in zip(values, weight)])


def replay_layer(
    model: ReferenceModel, layer: Layer, x: Tensor, k: Tensor, v: Tensor, replay: Replay, sink: int
) -> tuple[Tensor, Tensor]:
    """Carry a replay through one layer, behind a context of T tokens.

    Parameters
    ----------
    x : Tensor [n, n_embd]
        Residual stream of the replay's tokens.
    k, v : Tensor [H, T, d]
        Keys and values of the context.
    sink
        Protected tokens at the start, which take part in the softmax.

    Returns
    -------
    attention : Tensor [H, end - start]
        The largest attention of each cell of the part, over the group and the replay's tokens.
    x : Tensor [n, n_embd]
        The residual stream behind the layer.
    """
    config, n_own = model.config, len(x)
    offsets = torch.arange(n_own, device=x.device)
    q, own_k, own_v = model._project(layer, x, k.shape[1] + offsets)
    own_k, own_v = own_k.transpose(0, 1), own_v.transpose(0, 1)
    start, end, n_sink = replay.start, replay.end, min(sink, replay.start)

    # positions only say what is hidden: the sinks and the part come before the replay
    scored_keys = torch.cat([k[:, :n_sink], k[:, start:end], own_k], dim=1).repeat_interleave(config.n_group, 0)
    key_positions = torch.cat([torch.full((n_sink + end - start,), -1, device=x.device), offsets])
    peak = torch.zeros(config.n_head_kv, end - start, device=x.device)
    attended = []
    for part in offsets.split(max(1, _SCORE_CELLS // (config.n_head * (k.shape[1] + n_own)))):
        weights = model._attention_weights(layer, q[part].transpose(0, 1), scored_keys, part, key_positions)
        of_part = weights[..., n_sink : n_sink + end - start].amax(dim=1)
        torch.maximum(peak, of_part.view(config.n_head_kv, -1, end - start).amax(dim=1), out=peak)
        attended.append(model._attend(layer, q[None, part], part[None], (k, v), (own_k[None], own_v[None]))[0][0])
    return peak, model._finish_layer(layer, x, torch.cat(attended))


@torch.inference_mode()
def reconstruct(model: ReferenceModel, cache: KVCache, replays: Sequence[Replay], sink: int) -> list[Tensor]:
    """Let the model repeat a cached context of T tokens: each layer's attention to it, [H, T]; 0 outside the parts."""
    found = [torch.zeros(k.shape[:2], device=k.device) for k in cache.keys]
    for replay in replays:
        x = model._embed(torch.tensor(replay.tokens))
        for i, layer in enumerate(model._layers):
            peak, x = replay_layer(model, layer, x, cache.keys[i], cache.values[i], replay, sink)
            found[i][:, replay.start : replay.end] = peak
    return found
