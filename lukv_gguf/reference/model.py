"""The reference model: prefill, logits, and batched decoding that shows its attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
class _Layer:
    """Weights of one block; query, key and value (and gate and up) are stacked into one matrix."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_output: Tensor
    attn_output_bias: Tensor | None
    ffn_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class ReferenceModel:
    """A decoder-only transformer of a supported family, in plain torch.

    The residual stream, norms and attention are float32; the weights, and the activations that they
    multiply, have the dtype that the model was loaded with. Make one with `ReferenceModel.load`.
    """

    def __init__(self, file: GGUFFile, dtype: torch.dtype, device: torch.device) -> None:
        self.config = ModelConfig.from_gguf(file)
        self.device = device
        self.dtype = dtype
        self._file = file
        self._embedding = self._weight("token_embd.weight")
        self._layers = [self._load_layer(f"blk.{i}.") for i in range(self.config.n_layer)]
        self._output_norm = self._vector("output_norm.weight")
        self._output = self._weight("output.weight") if file.has_tensor("output.weight") else self._embedding
        divisors = self._vector("rope_freqs.weight") if file.has_tensor("rope_freqs.weight") else None
        self._rope = RotaryEmbedding(self.config, divisors, device)

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> ReferenceModel:
        """Load a model from a GGUF file, dequantised.

        Parameters
        ----------
        path
            The GGUF file; of a split model, the first shard.
        dtype
            Type of the weights: ``torch.float32``, or ``torch.bfloat16`` for half the memory.

        Raises
        ------
        LukvError
            The file cannot be read, or the model in it is not supported.
        """
        return cls(GGUFFile(path), dtype, torch.device(device))

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._output.shape[0]

    def output_weight(self, layer: int) -> Tensor:
        """W_O of a layer, one slice per query head: [n_head_kv, n_group, d_value, n_embd], float32."""
        config = self.config
        heads = self._layers[layer].attn_output.to(torch.float32).T
        return heads.reshape(config.n_head_kv, config.n_group, config.d_value, config.n_embd)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> KVCache:
        """Read a prompt.

        It runs layer by layer over the whole prompt with fused attention, so that besides the cache
        only a few [T, n_embd] tensors exist.

        Raises
        ------
        LukvError
            No tokens, or one outside the vocabulary.
        """
        return self._run(tokens, progress, keep_cache=True)[1]

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits at every position: [T, n_vocab], float32."""
        return self._to_logits(self._run(tokens, None, keep_cache=False)[0])

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
        tokens = torch.tensor([suffix[-1] for suffix in suffixes], device=self.device)
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
        self, tokens: Sequence[int], progress: Progress | None, keep_cache: bool
    ) -> tuple[Tensor, KVCache]:
        self._check_tokens(tokens)
        cache = KVCache([], [])
        x = self._embed(torch.tensor(tokens, device=self.device))
        rotation = self._rope.at(torch.arange(len(tokens), device=self.device))
        for i, layer in enumerate(self._layers):
            q, k, v = (t.transpose(0, 1).contiguous() for t in self._project(layer, x, rotation))
            if keep_cache:
                cache.keys.append(k)
                cache.values.append(v)
            heads = (k.repeat_interleave(self.config.n_group, 0), v.repeat_interleave(self.config.n_group, 0))
            attended = F.scaled_dot_product_attention(q[None], heads[0][None], heads[1][None], is_causal=True)[0]
            x = self._finish_layer(layer, x, attended.transpose(0, 1).flatten(1))
            if progress is not None:
                progress(i + 1, len(self._layers))
        return x, cache

    # Queries that share a prefix

    def _read_suffixes(self, prefix: KVCache, own: _SuffixCache, suffixes: Sequence[Sequence[int]]) -> None:
        """Fill the suffix caches. Padding is on the right: no real token sees it, and decoding overwrites it."""
        width = max(len(suffix) for suffix in suffixes)
        if width == 0:
            return
        padded = torch.tensor([[*suffix, *[0] * (width - len(suffix))] for suffix in suffixes], device=self.device)
        offsets = torch.arange(width, device=self.device)
        causal = offsets[:, None] >= torch.arange(own.width, device=self.device)
        rows_at_once = max(1, _SCORE_CELLS // (width * self.config.n_head * prefix.n_token))
        rotation = self._rope.at(prefix.n_token + offsets)
        x = self._embed(padded)
        for i, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, rotation)
            own.keys[i][:, :, :width] = k.transpose(1, 2)
            own.values[i][:, :, :width] = v.transpose(1, 2)
            attended = torch.cat(
                [
                    self._attend(q[part], prefix, own, i, causal.expand(len(q[part]), -1, -1), part)[0]
                    for part in _slices(len(q), rows_at_once)
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
        n_row = len(rows)
        every_row = torch.arange(n_row, device=self.device)
        visible = (torch.arange(own.width, device=self.device) <= offsets[:, None])[:, None]
        rotation = self._rope.at((prefix.n_token + offsets)[:, None])
        x = self._embed(tokens)[:, None]
        for i, layer in enumerate(self._layers):
            residual_norm = torch.linalg.vector_norm(x[:, 0], dim=-1)
            q, k, v = self._project(layer, x, rotation)
            own.keys[i][every_row, :, offsets] = k[:, 0]
            own.values[i][every_row, :, offsets] = v[:, 0]
            attended, weights = self._attend(q, prefix, own, i, visible, slice(0, n_row))
            if observer is not None:
                observer(i, rows, weights.transpose(0, 1), residual_norm)
            x = self._finish_layer(layer, x, attended)
        return self._to_logits(x[:, 0]).argmax(dim=-1)

    def _attend(
        self, q: Tensor, prefix: KVCache, own: _SuffixCache, layer: int, visible: Tensor, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Attention of each query's tokens over the shared prefix and its own tokens.

        `q` is [n_row, n_token, n_head, d_key], `visible` [n_row, n_token, own width]. Returns the heads'
        outputs [n_row, n_token, n_head * d_value], and the weights over the prefix
        [n_head_kv, n_row, n_token * n_group, T].
        """
        config = self.config
        n_row, n_token = q.shape[:2]
        n_query = n_token * config.n_group
        grouped = q.reshape(n_row, n_token, config.n_head_kv, config.n_group, config.d_key)
        grouped = grouped.permute(2, 0, 1, 3, 4).reshape(config.n_head_kv, n_row * n_query, config.d_key)
        grouped = grouped * config.d_key**-0.5
        own_keys, own_values = own.keys[layer][part].transpose(0, 1), own.values[layer][part].transpose(0, 1)

        # All rows share the prefix: one matrix product per KV head instead of one per row and head.
        far = torch.bmm(grouped, prefix.keys[layer].transpose(1, 2))
        near = grouped.view(config.n_head_kv, n_row, n_query, -1) @ own_keys.transpose(2, 3)
        hidden = ~visible.repeat_interleave(config.n_group, dim=1)
        near = near.masked_fill_(hidden, float("-inf")).view(config.n_head_kv, n_row * n_query, -1)

        # A softmax over both parts without joining them: the joint maximum and sum, then a division.
        peak = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
        far = far.sub_(peak).exp_()
        near = near.sub_(peak).exp_()
        total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
        far = far.div_(total)
        near = near.div_(total).view(config.n_head_kv, n_row, n_query, -1)
        out = torch.bmm(far, prefix.values[layer]).view(config.n_head_kv, n_row, n_query, -1) + near @ own_values
        out = out.view(config.n_head_kv, n_row, n_token, config.n_group, config.d_value)
        out = out.permute(1, 2, 0, 3, 4).reshape(n_row, n_token, -1)
        return out, far.view(config.n_head_kv, n_row, n_query, -1)

    # Parts of a layer

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens].to(torch.float32)

    def _project(self, layer: _Layer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after RoPE, and values: [..., n_token, heads, d]."""
        config = self.config
        qkv = self._linear(self._norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias)
        sizes = [config.n_head * config.d_key, config.n_head_kv * config.d_key, config.n_head_kv * config.d_value]
        q, k, v = qkv.split(sizes, dim=-1)
        q = q.unflatten(-1, (config.n_head, config.d_key))
        k = k.unflatten(-1, (config.n_head_kv, config.d_key))
        v = v.unflatten(-1, (config.n_head_kv, config.d_value))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return self._rope.rotate(q, rotation), self._rope.rotate(k, rotation), v

    def _finish_layer(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self._linear(attended, layer.attn_output, layer.attn_output_bias)
        return torch.cat([self._add_mlp(layer, rows) for rows in x.split(_MLP_ROWS)])

    def _add_mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate_up = self._linear(self._norm(x, layer.ffn_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=-1)
        return x + self._linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x.to(weight.dtype), weight).to(torch.float32)
        return y if bias is None else y + bias

    def _to_logits(self, x: Tensor) -> Tensor:
        return self._linear(self._norm(x, self._output_norm), self._output, None)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise LukvError("a prompt needs at least one token")
        if min(tokens) < 0 or max(tokens) >= self.n_vocab:
            raise LukvError(f"a token lies outside the vocabulary of {self.n_vocab}")

    # Loading

    def _load_layer(self, prefix: str) -> _Layer:
        family = self.config.family
        names = ("attn_q", "attn_k", "attn_v")
        return _Layer(
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            qkv=torch.cat([self._weight(f"{prefix}{name}.weight") for name in names]),
            qkv_bias=self._biases(prefix, names, required=family.qkv_bias),
            q_norm=self._vector(prefix + "attn_q_norm.weight") if family.qk_norm else None,
            k_norm=self._vector(prefix + "attn_k_norm.weight") if family.qk_norm else None,
            attn_output=self._weight(prefix + "attn_output.weight"),
            attn_output_bias=self._biases(prefix, ("attn_output",)),
            ffn_norm=self._vector(prefix + "ffn_norm.weight"),
            gate_up=torch.cat([self._weight(f"{prefix}{name}.weight") for name in ("ffn_gate", "ffn_up")]),
            gate_up_bias=self._biases(prefix, ("ffn_gate", "ffn_up")),
            down=self._weight(prefix + "ffn_down.weight"),
            down_bias=self._biases(prefix, ("ffn_down",)),
        )

    def _weight(self, name: str) -> Tensor:
        return torch.tensor(self._file.tensor(name), dtype=self.dtype, device=self.device)

    def _vector(self, name: str) -> Tensor:
        return torch.tensor(self._file.tensor(name), dtype=torch.float32, device=self.device)

    def _biases(self, prefix: str, names: Sequence[str], required: bool = False) -> Tensor | None:
        """The biases of stacked projections. A family has all of them or none."""
        if not required and not any(self._file.has_tensor(f"{prefix}{name}.bias") for name in names):
            return None
        return torch.cat([self._vector(f"{prefix}{name}.bias") for name in names])


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


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
