"""ForesightKV's supervised half: keep what a small trained network expects to be needed."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, silu

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics.attention import window_attention
from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.keydiff import KeyDiff
from lukv_gguf.scorer import METRIC, Scorer, shape_text

_LEAST_ATTENTION = 1e-7
_LEAST_SQUARE = 1e-12


class Foresight(Metric):
    """s = o · silu(W x + b) + c · f, with a network (W, b, o, c) for each head.

    x joins the features f of a cell, its key before RoPE and its value, both divided by their root mean square. The
    features: the cosine of KeyDiff, the logarithms of ||k||, of ||v||, and of the attention of the last w queries
    (mean; mean pooled over neighbouring cells; root mean square), each over the group and the window, and that of one
    plus the tokens since. `lukv_gguf.train_scorer` trains it.

    The paper's second half, which goes on from there with reinforcement learning (GRPO), is not here.

    Parameters: ``window``, w; ``kernel``, cells that are pooled, an odd number. Those of the training.

    References
    ----------
    Dong et al., "ForesightKV: Optimizing KV Cache Eviction for Reasoning Models by Learning Long-Term Contribution",
    arXiv 2602.03203: Golden Eviction and its distillation.
    """

    name = METRIC
    summary = "what a network trained on future attention expects to be needed (needs --scorer)"
    cost = "w G T d + n T d, with n hidden units"
    native = True
    trained = True
    defaults: ClassVar = {"window": 32, "kernel": 5}
    minima: ClassVar = {"window": 1, "kernel": 1}

    def __init__(self, scorer: Scorer | None = None, **params: float) -> None:
        super().__init__(**{**(scorer.params if scorer else {}), **params})
        if self.params["kernel"] % 2 == 0:
            raise LukvError(f"metric {self.name}: kernel must be odd, is {self.params['kernel']}")
        if scorer is not None and self.params != dict(scorer.params):
            raise LukvError(f"metric {self.name}: the scorer was trained with {dict(scorer.params)}, not {self.params}")
        self.scorer = scorer

    @property
    def needs(self) -> Needs:
        return Needs(values=True, plain_keys=True, window=int(self.params["window"]))

    @property
    def weights_digest(self) -> str:
        return self._scorer().digest

    def check_model(self, n_layer: int, n_head_kv: int, d_key: int, d_value: int) -> None:
        shape = n_layer, n_head_kv, d_key, d_value
        if self._scorer().shape != shape:
            raise LukvError(f"the scorer is for {shape_text(*self._scorer().shape)}, the model has {shape_text(*shape)}")

    def score(self, state: LayerState) -> Tensor:
        scorer, heads = self._scorer(), slice(state.head, state.head + state.keys.shape[0])
        weights = [
            torch.from_numpy(array[state.layer, heads].copy()).to(state.keys.device)
            for array in (scorer.input, scorer.bias, scorer.output, scorer.skip)
        ]
        return network(*weights, self.inputs(state))

    def inputs(self, state: LayerState) -> Tensor:
        """x of each cell: [H, T, F + d_key + d_value], float32."""
        assert state.values is not None and state.plain_keys is not None
        keys, values = state.keys.to(torch.float32), state.values.to(torch.float32)
        attention = window_attention(state).flatten(1, 2)
        mean = attention.mean(dim=1)
        kernel = int(self.params["kernel"])
        features = [
            -KeyDiff().score(replace(state, key_sum=None)),  # of the cells that are here, as in the training
            _log_norm(keys),
            _log_norm(values),
            (mean + _LEAST_ATTENTION).log(),
            (avg_pool1d(mean, kernel, stride=1, padding=kernel // 2) + _LEAST_ATTENTION).log(),
            (attention.square().mean(dim=1).sqrt() + _LEAST_ATTENTION).log(),
            (state.n_tokens - state.cell_positions).to(torch.float32).log().expand_as(mean),
        ]
        vectors = [normalize(t.to(torch.float32), dim=-1) * t.shape[-1] ** 0.5 for t in (state.plain_keys, values)]
        return torch.cat([torch.stack(features, dim=-1), *vectors], dim=-1)

    def _scorer(self) -> Scorer:
        if self.scorer is None:
            raise LukvError("the metric foresight needs a scorer: train one (lukv-gguf train-scorer) and give it with --scorer")
        return self.scorer


def network(weight: Tensor, bias: Tensor, output: Tensor, skip: Tensor, x: Tensor) -> Tensor:
    """Scores [H, T] of inputs [H, T, F + d_key + d_value]; the weights as in `Scorer`, of the heads of one layer."""
    hidden = silu(x @ weight.mT + bias[:, None])
    return (hidden @ output[..., None] + x[..., : skip.shape[-1]] @ skip[..., None])[..., 0]


def _log_norm(vectors: Tensor) -> Tensor:
    return (vectors.square().sum(dim=-1) + _LEAST_SQUARE).log() / 2
