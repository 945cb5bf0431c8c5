"""The reference model: prefill, logits, and batched decoding that shows its attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lukv_gguf.errors import LukvError
from lukv_gguf.reference.config import ModelConfig
from lukv_gguf.reference.gguf_file import GGUFFile
from lukv_gguf.reference.rope import RotaryEmbedding

_MLP_ROWS = 1024  # tokens that pass the MLP together: bounds its memory for long prompts
_SCORE_CELLS = 1 << 24  # attention scores that exist at one time while suffixes are read

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


@dataclass
class KVCache:
    """Keys after RoPE and values of one sequence, layer by layer.

    Attributes
    ----------
    keys : list of Tensor [n_head_kv, T, d_key], float32
    values : list of Tensor [n_head_kv, T, d_value], float32
    """

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def n_token(self) -> int:
        """T, the tokens held."""
        return self.keys[0].shape[1]


class PrefillObserver(Protocol):
    """Sees every layer of a prompt."""

    def __call__(self, model: ReferenceModel, index: int, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Look at one layer: queries and keys after RoPE, and values, [heads, T, d]."""


class DecodeObserver(Protocol):
    """Sees every layer of every decoding step."""

    def __call__(self, layer: int, rows: Tensor, attention: Tensor, residual_norm: Tensor) -> None:
        """Look at one layer of one step.

        Parameters
        ----------
        layer
            Index of the layer.
        rows : int Tensor [n_row]
            The queries that are still decoding, as indices into the suffixes.
        attention : Tensor [n_row, n_head_kv, n_group, T]
            Their attention weights over the shared prefix. The rest, up to 1, went to the query's own
            tokens. A buffer: do not keep it.
        residual_norm : Tensor [n_row]
            L2 norm of the residual stream that enters the layer.
        """


@dataclass
class _Norm:
    weight: Tensor | None
    bias: Tensor | None


@dataclass
class _Mlp:
    """Weights of an MLP, or of several experts along a first dimension; gate and up are stacked into one matrix."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.gate_up.shape[-2] == 2 * self.down.shape[-1]


@dataclass
class _Layer:
    """Weights of one block; query, key and value are stacked into one matrix."""

    windowed: bool
    rope: RotaryEmbedding | None
    attn_norm: _Norm | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_output: Tensor
    attn_output_bias: Tensor | None
    attn_post_norm: _Norm | None
    ffn_norm: _Norm | None
    mlp: _Mlp | None
    router: Tensor | None
    experts: _Mlp | None
    shared_router: Tensor | None
    ffn_post_norm: _Norm | None


class _StreamedLayers(Sequence[_Layer]):
    """The layers of a model, each dequantised when it is asked for and kept nowhere."""

    def __init__(self, load: Callable[[int], _Layer], n_layer: int) -> None:
        self._load = load
        self._n_layer = n_layer

    def __len__(self) -> int:
        return self._n_layer

    def __getitem__(self, index: int) -> _Layer:  # type: ignore[override]
        if not 0 <= index < self._n_layer:
            raise IndexError(index)
        return self._load(index)


class ReferenceModel:
    """A decoder-only transformer of a supported family, in plain torch.

    The residual stream, norms and attention are float32; the weights, and the activations that they
    multiply, have the dtype that the model was loaded with. Make one with `ReferenceModel.load`.

    `oracle.teacher_force` and `bounded.BoundedDecoder` walk through its layers themselves, with the
    methods for parts of a layer.
    """

    def __init__(self, file: GGUFFile, dtype: torch.dtype, device: torch.device, stream: bool = False) -> None:
        self.config = ModelConfig.from_gguf(file)
        self.device = device
        self.dtype = dtype
        self._file = file
        interleaved = self.config.family.interleaved_rope
        self._rope = RotaryEmbedding(self.config.rope, interleaved, self._frequency_divisors(), device)
        self._window_rope = self._rope
        if self.config.window_rope != self.config.rope:
            self._window_rope = RotaryEmbedding(self.config.window_rope, interleaved, None, device)
        layers = _StreamedLayers(self._load_layer, self.config.n_layer)
        self._layers: Sequence[_Layer] = layers if stream else list(layers)
        self._output_norm = self._norm_of("output_norm")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        stream: bool = False,
    ) -> ReferenceModel:
        """Load a model from a GGUF file, dequantised.

        Parameters
        ----------
        path
            The GGUF file; of a split model, the first shard.
        dtype
            Type of the weights: ``torch.float32``, or ``torch.bfloat16`` for half the memory.
        device
            Where it computes.
        stream
            Hold one layer at a time: it is read again whenever it is needed.

        Raises
        ------
        LukvError
            The file cannot be read, or the model in it is not supported.
        """
        return cls(GGUFFile(path), dtype, torch.device(device), stream)

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._file.shape("token_embd.weight")[0]

    @property
    def has_long_rope(self) -> bool:
        """Whether LongRoPE's factors for an extended context are in use, as in llama.cpp with a long enough context."""
        extended = self.config.n_context_train > self.config.rope.n_context_original
        return extended and self._file.has_tensor("rope_factors_long.weight")

    def output_weight(self, layer: int) -> Tensor:
        """W_O of a layer, one slice per query head: [n_head_kv, n_group, d_value, n_embd], float32."""
        return self._output_weight(self._layers[layer])

    def _output_weight(self, layer: _Layer) -> Tensor:
        config = self.config
        heads = layer.attn_output.to(torch.float32).T
        return heads.reshape(config.n_head_kv, config.n_group, config.d_value, config.n_embd)

    @torch.inference_mode()
    def prefill(
        self, tokens: Sequence[int], progress: Progress | None = None, observer: PrefillObserver | None = None
    ) -> KVCache:
        """Read a prompt.

        It runs layer by layer over the whole prompt with fused attention, so that besides the cache
        only a few [T, n_embd] tensors exist. An observer sees them as they come.

        Raises
        ------
        LukvError
            No tokens, or one outside the vocabulary.
        """
        cache = KVCache([], [])
        self._run(tokens, progress, cache, observer)
        return cache

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits at every position: [T, n_vocab], float32."""
        return self._to_logits(self._run(tokens))

    @torch.inference_mode()
    def decode_batch(
        self,
        prefix: KVCache,
        suffixes: Sequence[Sequence[int]],
        n_new: int,
        observer: DecodeObserver | None = None,
        *,
        end_tokens: Collection[int] = (),
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Continue several suffixes of one shared prefix greedily, in lockstep.

        A decoding step is a pass that chooses a token. The first one therefore takes a suffix's last
        token as its input, and a query has at least one step.

        Parameters
        ----------
        prefix
            Cache of the tokens that all queries share.
        suffixes
            The further tokens of each query, at least one each.
        n_new
            K_max, the most steps of a query. It ends earlier at one of `end_tokens`.
        observer
            Sees the attention over the prefix at every step and layer.

        Returns
        -------
        list of list of int
            The new tokens of each query, without the end token.

        Raises
        ------
        LukvError
            No suffix, an empty one, or a token outside the vocabulary.
        """
        if not suffixes or not all(len(suffix) for suffix in suffixes):
            raise LukvError("decoding needs at least one suffix, and one token or more in each")
        for suffix in suffixes:
            self._check_tokens(suffix)
        lengths = torch.tensor([len(suffix) for suffix in suffixes], device=self.device)
        own = _SuffixCache.empty(self.config, len(suffixes), int(lengths.max()) + n_new, self.device)
        self._read_suffixes(prefix, own, [suffix[:-1] for suffix in suffixes])

        answers: list[list[int]] = [[] for _ in suffixes]
        rows = torch.arange(len(suffixes), device=self.device)
        tokens = torch.tensor([suffix[-1] for suffix in suffixes])
        offsets = lengths - 1
        for step in range(n_new):
            chosen = self._decode_step(prefix, own, rows, tokens, offsets, observer)
            going = torch.tensor([token not in end_tokens for token in chosen.tolist()], device=self.device)
            for row, token, goes_on in zip(rows.tolist(), chosen.tolist(), going.tolist()):
                if goes_on:
                    answers[row].append(token)
            if progress is not None:
                progress(step + 1, n_new)
            if not going.any():
                break
            if not going.all():
                rows, chosen, offsets = rows[going], chosen[going], offsets[going]
                own.select(going)
            tokens, offsets = chosen, offsets + 1
        return answers

    # One pass over a whole sequence

    def _run(
        self,
        tokens: Sequence[int],
        progress: Progress | None = None,
        cache: KVCache | None = None,
        observer: PrefillObserver | None = None,
    ) -> Tensor:
        self._check_tokens(tokens)
        x = self._embed(torch.tensor(tokens))
        positions = torch.arange(len(tokens))
        for i, layer in enumerate(self._layers):
            q, k, v, x = self._prefill_layer(layer, x, positions)
            if cache is not None:
                cache.keys.append(k)
                cache.values.append(v)
            if observer is not None:
                observer(self, i, layer, q, k, v)
            if progress is not None:
                progress(i + 1, len(self._layers))
        return x

    def _prefill_layer(self, layer: _Layer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer over a whole prompt: queries, keys and values [heads, T, d], and the residual stream after it."""
        q, k, v = (t.transpose(0, 1).contiguous() for t in self._project(layer, x, positions))
        heads = (k.repeat_interleave(self.config.n_group, 0), v.repeat_interleave(self.config.n_group, 0))
        attended = self._attend_causally(layer, q, *heads)
        return q, k, v, self._finish_layer(layer, x, attended.transpose(0, 1).flatten(1))

    def _attend_causally(self, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a prompt to itself, all [n_head, T, d]. Fused, except where scores are capped."""
        scale, n_token = self.config.attention_scale, q.shape[1]
        if not layer.windowed and not self.config.attention_cap:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
        position = torch.arange(n_token, device=self.device)
        outputs = []
        for part in _slices(n_token, max(1, _SCORE_CELLS // (q.shape[0] * n_token))):
            outputs.append(self._attention_weights(layer, q[:, part], k, position[part], position) @ v)
        return torch.cat(outputs, dim=1)

    def _attention_weights(
        self, layer: _Layer, q: Tensor, k: Tensor, query_position: Tensor, key_position: Tensor
    ) -> Tensor:
        """Attention weights [n_head, n_query, n_key] of queries and keys [n_head, n, d] at these positions."""
        scores = self._cap(q @ k.transpose(1, 2) * self.config.attention_scale)
        return scores.masked_fill_(self._hidden(layer, query_position, key_position), float("-inf")).softmax(dim=-1)

    def _hidden(self, layer: _Layer, query: Tensor, key: Tensor) -> Tensor:
        """Which keys a query may not see, by their positions: broadcasts [..., n_query] with [n_key]."""
        ahead = query[..., None] - key
        hidden = ahead < 0
        return hidden | (ahead >= self.config.window) if layer.windowed else hidden

    def _cap(self, scores: Tensor) -> Tensor:
        return _soft_cap(scores, self.config.attention_cap)

    # Queries that share a prefix

    def _read_suffixes(self, prefix: KVCache, own: _SuffixCache, suffixes: Sequence[Sequence[int]]) -> None:
        """Fill the suffix caches. Padding is on the right: no real token sees it, and decoding overwrites it."""
        width = max(len(suffix) for suffix in suffixes)
        if width == 0:
            return
        padded = torch.tensor([[*suffix, *[0] * (width - len(suffix))] for suffix in suffixes])
        offsets = torch.arange(width, device=self.device)
        rows_at_once = max(1, _SCORE_CELLS // (width * self.config.n_head * prefix.n_token))
        x = self._embed(padded)
        for i, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, prefix.n_token + offsets)
            own.keys[i][:, :, :width] = k.transpose(1, 2)
            own.values[i][:, :, :width] = v.transpose(1, 2)
            attended = torch.cat(
                [
                    self._attend(
                        layer,
                        q[rows],
                        offsets.expand(len(q[rows]), -1),
                        (prefix.keys[i], prefix.values[i]),
                        (own.keys[i][rows], own.values[i][rows]),
                    )[0]
                    for rows in _slices(len(q), rows_at_once)
                ]
            )
            x = self._finish_layer(layer, x, attended)

    def _decode_step(
        self,
        prefix: KVCache,
        own: _SuffixCache,
        rows: Tensor,
        tokens: Tensor,
        offsets: Tensor,
        observer: DecodeObserver | None,
    ) -> Tensor:
        every_row = torch.arange(len(rows), device=self.device)
        x = self._embed(tokens)[:, None]
        for i, layer in enumerate(self._layers):
            residual_norm = torch.linalg.vector_norm(x[:, 0], dim=-1)
            q, k, v = self._project(layer, x, (prefix.n_token + offsets)[:, None])
            own.keys[i][every_row, :, offsets] = k[:, 0]
            own.values[i][every_row, :, offsets] = v[:, 0]
            far, near = (prefix.keys[i], prefix.values[i]), (own.keys[i], own.values[i])
            attended, weights = self._attend(layer, q, offsets[:, None], far, near)
            if observer is not None:
                observer(i, rows, weights.transpose(0, 1), residual_norm)
            x = self._finish_layer(layer, x, attended)
        return self._to_logits(x[:, 0]).argmax(dim=-1)

    def _attend(
        self,
        layer: _Layer,
        q: Tensor,
        offsets: Tensor,
        prefix: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attention of each query's tokens over the shared prefix and its own tokens.

        `q` is [n_row, n_token, n_head, d_key], `offsets` [n_row, n_token] counts positions from the end of the
        prefix, `prefix` holds keys and values [n_head_kv, T, d], `own` [n_row, n_head_kv, width, d]. Returns the
        heads' outputs [n_row, n_token, n_head * d_value], and the weights over the prefix
        [n_head_kv, n_row, n_token * n_group, T].
        """
        config = self.config
        n_row, n_token = q.shape[:2]
        n_query = n_token * config.n_group
        grouped = q.reshape(n_row, n_token, config.n_head_kv, config.n_group, config.d_key)
        grouped = grouped.permute(2, 0, 1, 3, 4).reshape(config.n_head_kv, n_row * n_query, config.d_key)
        grouped = grouped * config.attention_scale
        own_keys, own_values = own[0].transpose(0, 1), own[1].transpose(0, 1)
        n_prefix, width = prefix[0].shape[1], own_keys.shape[2]

        # All rows share the prefix: one matrix product per KV head instead of one per row and head.
        far = self._cap(torch.bmm(grouped, prefix[0].transpose(1, 2)))
        if layer.windowed:
            hidden = self._hidden(layer, n_prefix + offsets, torch.arange(n_prefix, device=self.device))
            hidden = hidden.repeat_interleave(config.n_group, dim=1).view(n_row * n_query, n_prefix)
            far = far.masked_fill_(hidden, float("-inf"))
        near = self._cap(grouped.view(config.n_head_kv, n_row, n_query, -1) @ own_keys.transpose(2, 3))
        hidden = self._hidden(layer, offsets, torch.arange(width, device=self.device))
        hidden = hidden.repeat_interleave(config.n_group, dim=1)
        near = near.masked_fill_(hidden, float("-inf")).view(config.n_head_kv, n_row * n_query, -1)

        # A softmax over both parts without joining them: the joint maximum and sum, then a division.
        peak = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
        far = far.sub_(peak).exp_()
        near = near.sub_(peak).exp_()
        total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
        far = far.div_(total)
        near = near.div_(total).view(config.n_head_kv, n_row, n_query, -1)
        out = torch.bmm(far, prefix[1]).view(config.n_head_kv, n_row, n_query, -1) + near @ own_values
        out = out.view(config.n_head_kv, n_row, n_token, config.n_group, config.d_value)
        out = out.permute(1, 2, 0, 3, 4).reshape(n_row, n_token, -1)
        return out, far.view(config.n_head_kv, n_row, n_query, -1)

    # Parts of a layer

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens of any shape; only their rows are dequantised."""
        distinct, places = tokens.cpu().unique(return_inverse=True)
        rows = self._file.rows("token_embd.weight", distinct.tolist()).to(self.device)
        return rows[places.to(self.device)] * self.config.embedding_scale

    def _project(self, layer: _Layer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after RoPE, and values: [..., n_token, heads, d]."""
        config = self.config
        qkv = self._linear(self._norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias)
        sizes = [config.n_head * config.d_key, config.n_head_kv * config.d_key, config.n_head_kv * config.d_value]
        q, k, v = qkv.split(sizes, dim=-1)
        q = self._head_norm(q.unflatten(-1, (config.n_head, config.d_key)), layer.q_norm)
        k = self._head_norm(k.unflatten(-1, (config.n_head_kv, config.d_key)), layer.k_norm)
        v = v.unflatten(-1, (config.n_head_kv, config.d_value))
        if layer.rope is not None:
            rotation = layer.rope.at(positions)
            q, k = layer.rope.rotate(q, rotation), layer.rope.rotate(k, rotation)
        return q, k, v

    def _finish_layer(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        written = self._linear(attended, layer.attn_output, layer.attn_output_bias)
        after = x + self.config.residual_scale * self._norm(written, layer.attn_post_norm)
        if self.config.family.parallel_mlp:
            return after + torch.cat([self._ffn(layer, rows) for rows in x.split(_MLP_ROWS)])
        return torch.cat([rows + self._ffn(layer, rows) for rows in after.split(_MLP_ROWS)])

    def _ffn(self, layer: _Layer, x: Tensor) -> Tensor:
        x = self._norm(x, layer.attn_norm if self.config.family.parallel_mlp else layer.ffn_norm)
        out = torch.zeros_like(x)
        if layer.router is not None and layer.experts is not None:
            out = self._mix_experts(layer.experts, layer.router, x)
        if layer.mlp is not None:
            dense = self._mlp(x, layer.mlp)
            if layer.shared_router is not None:
                dense = dense * (x * layer.shared_router).sum(dim=-1, keepdim=True).sigmoid()
            out = out + dense
        return self.config.residual_scale * self._norm(out, layer.ffn_post_norm)

    def _mix_experts(self, experts: _Mlp, router: Tensor, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, router).softmax(dim=-1).topk(self.config.n_expert_used, dim=-1)
        if self.config.family.normalized_experts:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        rows, weights, chosen = x.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2)
        out = torch.zeros_like(rows)
        for i in chosen.unique().tolist():
            row, rank = (chosen == i).nonzero(as_tuple=True)
            expert = _Mlp(experts.gate_up[i], experts.down[i])
            out.index_add_(0, row, self._mlp(rows[row], expert) * weights[row, rank, None])
        return out.view_as(x)

    def _mlp(self, x: Tensor, mlp: _Mlp) -> Tensor:
        inner = self._linear(x, mlp.gate_up, mlp.gate_up_bias)
        gate, up = inner.chunk(2, dim=-1) if mlp.gated else (inner, None)
        gate = F.silu(gate) if self.config.family.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self._linear(gate if up is None else gate * up, mlp.down, mlp.down_bias)

    def _norm(self, x: Tensor, norm: _Norm | None) -> Tensor:
        if norm is None:
            return x
        if self.config.family.norm == "layer":
            return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, self.config.norm_eps)
        return F.rms_norm(x, (x.shape[-1],), norm.weight, self.config.norm_eps)

    def _head_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Norm of queries or keys [..., heads, d]: of each head, or of all together if the weight covers them flat."""
        if weight is None:
            return x
        if weight.dim() == 1 and len(weight) != x.shape[-1]:
            return self._norm(x.flatten(-2), _Norm(weight, None)).view_as(x)
        return self._norm(x, _Norm(None, None)) * weight

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x.to(weight.dtype), weight).to(torch.float32)
        return y if bias is None else y + bias

    @cached_property
    def _output(self) -> Tensor:
        with torch.inference_mode(False):  # whoever asks first: autograd cannot use what inference mode makes
            return self._weight("output.weight" if self._file.has_tensor("output.weight") else "token_embd.weight")

    def _to_logits(self, x: Tensor) -> Tensor:
        bias = self._file.tensor("output.bias").to(self.device) if self._file.has_tensor("output.bias") else None
        logits = self._linear(self._norm(x, self._output_norm), self._output, bias) * self.config.logit_scale
        return _soft_cap(logits, self.config.logit_cap)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise LukvError("a prompt needs at least one token")
        if min(tokens) < 0 or max(tokens) >= self.n_vocab:
            raise LukvError(f"a token lies outside the vocabulary of {self.n_vocab}")

    # Loading

    def _load_layer(self, index: int) -> _Layer:
        prefix, config = f"blk.{index}.", self.config
        fused = self._file.has_tensor(prefix + "attn_qkv.weight")
        names = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
        windowed = config.windowed[index]
        return _Layer(
            windowed=windowed,
            rope=(self._window_rope if windowed else self._rope) if config.has_rope[index] else None,
            attn_norm=self._norm_of(prefix + "attn_norm", optional=config.family.architecture == "olmo2"),
            qkv=self._stacked(prefix, names),
            qkv_bias=self._biases(prefix, names),
            q_norm=self._vector(prefix + "attn_q_norm.weight", optional=True),
            k_norm=self._vector(prefix + "attn_k_norm.weight", optional=True),
            attn_output=self._weight(prefix + "attn_output.weight"),
            attn_output_bias=self._biases(prefix, ("attn_output",)),
            attn_post_norm=self._norm_of(prefix + "post_attention_norm", optional=True),
            ffn_norm=self._norm_of(prefix + "ffn_norm", optional=True),
            mlp=self._load_mlp(prefix, "_shexp" if config.n_expert else "", optional=config.n_expert > 0),
            router=self._vector(prefix + "ffn_gate_inp.weight", optional=not config.n_expert),
            experts=self._load_mlp(prefix, "_exps") if config.n_expert else None,
            shared_router=self._vector(prefix + "ffn_gate_inp_shexp.weight", optional=True),
            ffn_post_norm=self._norm_of(prefix + "post_ffw_norm", optional=True),
        )

    def _load_mlp(self, prefix: str, suffix: str, optional: bool = False) -> _Mlp | None:
        if optional and not self._file.has_tensor(f"{prefix}ffn_up{suffix}.weight"):
            return None
        gate, up, down = (f"ffn_{name}{suffix}" for name in ("gate", "up", "down"))
        names = (gate, up) if self._file.has_tensor(f"{prefix}{gate}.weight") else (up,)
        return _Mlp(
            gate_up=self._stacked(prefix, names),
            down=self._weight(f"{prefix}{down}.weight"),
            gate_up_bias=self._biases(prefix, names),
            down_bias=self._biases(prefix, (down,)),
        )

    def _stacked(self, prefix: str, names: Sequence[str]) -> Tensor:
        """Matrices over each other: they read the same input."""
        return torch.cat([self._weight(f"{prefix}{name}.weight") for name in names], dim=-2)

    def _weight(self, name: str) -> Tensor:
        return self._file.tensor(name, self.dtype).to(self.device)

    def _vector(self, name: str, optional: bool = False) -> Tensor | None:
        """A tensor that stays in single precision."""
        if optional and not self._file.has_tensor(name):
            return None
        return self._file.tensor(name).to(self.device)

    def _norm_of(self, name: str, optional: bool = False) -> _Norm | None:
        weight = self._vector(name + ".weight", optional)
        return None if weight is None else _Norm(weight, self._vector(name + ".bias", optional=True))

    def _biases(self, prefix: str, names: Sequence[str]) -> Tensor | None:
        """The biases of stacked projections. A layer has all of them or none."""
        if not any(self._file.has_tensor(f"{prefix}{name}.bias") for name in names):
            return None
        return torch.cat([self._file.tensor(f"{prefix}{name}.bias") for name in names]).to(self.device)

    def _frequency_divisors(self) -> Tensor | None:
        """Llama 3's factors, or LongRoPE's."""
        for name in ("rope_freqs", "rope_factors_long" if self.has_long_rope else "rope_factors_short"):
            if self._file.has_tensor(name + ".weight"):
                return self._file.tensor(name + ".weight")
        return None


@dataclass
class _SuffixCache:
    """Keys and values of each query's own tokens: per layer [n_row, n_head_kv, width, d]."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, config: ModelConfig, n_row: int, width: int, device: torch.device) -> _SuffixCache:
        shape = (n_row, config.n_head_kv, width)
        return cls(
            [torch.zeros(*shape, config.d_key, device=device) for _ in range(config.n_layer)],
            [torch.zeros(*shape, config.d_value, device=device) for _ in range(config.n_layer)],
        )

    @property
    def width(self) -> int:
        """Own tokens that a query has room for."""
        return self.keys[0].shape[2]

    def select(self, rows: Tensor) -> None:
        """Keep only some queries."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, or cap * tanh(x / cap) if there is a cap; in place where no gradient is asked for."""
    if not cap:
        return x
    return (x / cap).tanh() * cap if torch.is_grad_enabled() else x.div_(cap).tanh_().mul_(cap)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
