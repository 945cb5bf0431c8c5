"""Hyperparameters of a model, from the metadata of its GGUF file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lukv_gguf.errors import LukvError
from lukv_gguf.reference.families import Family, get_family
from lukv_gguf.reference.gguf_file import GGUFFile

_ROPE_SCALING = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Constants of a rotary embedding; names as in llama.cpp, which defines their meaning.

    Attributes
    ----------
    dim, base
        Rotated components of a head, and the base of the frequencies.
    position_scale
        Factor on positions: 1 / factor for a context that was extended by interpolation.
    attention_factor
        Factor on the rotated vectors, beyond YaRN's own.
    yarn : bool
        Interpolate the slow components only (YaRN, arXiv 2309.00071).
    n_context_original
        Context length before it was extended.
    """

    dim: int
    base: float
    position_scale: float = 1.0
    attention_factor: float = 1.0
    yarn: bool = False
    n_context_original: int = 0

    def unscaled(self, base: float | None = None) -> RopeConfig:
        """The same without any scaling, and with another base."""
        return replace(
            self, base=self.base if base is None else base, position_scale=1.0, attention_factor=1.0, yarn=False
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model; names as in llama.cpp's hyperparameters.

    Attributes
    ----------
    window : int
        Tokens that a layer with a sliding window sees, itself included.
    windowed : tuple of bool [n_layer]
        Which layers have it.
    rope, window_rope
        Rotary embedding of the other layers, and of those with a window.
    has_rope : tuple of bool [n_layer]
    attention_scale, residual_scale, embedding_scale, logit_scale
        Factors on the attention scores, on what a block adds, on the embeddings and on the logits.
    attention_cap, logit_cap
        Soft caps, c · tanh(x / c); 0 for none.
    n_expert, n_expert_used
        0 for a model without experts.
    """

    family: Family
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    d_key: int
    d_value: int
    n_context_train: int
    norm_eps: float
    rope: RopeConfig
    window_rope: RopeConfig
    has_rope: tuple[bool, ...]
    window: int
    windowed: tuple[bool, ...]
    attention_scale: float
    residual_scale: float
    embedding_scale: float
    logit_scale: float
    attention_cap: float
    logit_cap: float
    n_expert: int
    n_expert_used: int

    @property
    def n_group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.n_head // self.n_head_kv

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read the hyperparameters.

        Raises
        ------
        LukvError
            The architecture, or something that it asks for, is not supported, or a key is missing.
        """
        family = get_family(file.architecture)

        def value(key: str, default: Any = None) -> Any:
            found = file.value(f"{family.architecture}.{key}", default)
            if found is None:
                raise LukvError(f"{file.path}: metadata key {family.architecture}.{key} is missing")
            return found

        n_layer = int(value("block_count"))
        n_embd = int(value("embedding_length"))
        n_head = _same_everywhere(file, "attention.head_count", value("attention.head_count"))
        n_head_kv = _same_everywhere(file, "attention.head_count_kv", value("attention.head_count_kv", n_head))
        if n_head < 1 or n_head_kv < 1 or n_head % n_head_kv:
            raise LukvError(f"{file.path}: {n_head} heads cannot share {n_head_kv} KV heads")
        d_key = int(value("attention.key_length", n_embd // n_head))
        n_context_train = int(value("context_length"))
        rope = _rope(file, d_key, n_context_train)
        norm_key = "attention.layer_norm_rms_epsilon" if family.norm == "rms" else "attention.layer_norm_epsilon"
        window, windowed = _windows(file, family, n_layer)
        n_expert = int(value("expert_count", 0))

        attention_scale = (
            math.sqrt(n_head / n_embd) if n_layer == family.square_root_layers else 1.0 / math.sqrt(d_key)
        )
        residual_scale = embedding_scale = logit_scale = 1.0
        has_rope = [not family.no_rope_period or (i + 1) % family.no_rope_period != 0 for i in range(n_layer)]
        if family.multipliers:  # llama.cpp takes 0 as "not set"
            attention_scale = float(value("attention.scale", 0.0)) or attention_scale
            residual_scale = float(value("residual_scale", 0.0)) or 1.0
            embedding_scale = float(value("embedding_scale", 0.0)) or 1.0
            logit_scale = 1.0 / float(value("logit_scale"))
            has_rope = [bool(value("rope.scaling.finetuned", True))] * n_layer
        elif family.parallel_mlp:
            logit_scale = float(value("logit_scale", 0.0)) or 1.0
        if family.scaled_embedding:
            embedding_scale = math.sqrt(n_embd)
        attention_cap, logit_cap = (
            0.0 if default is None else float(value(key, default))
            for key, default in zip(("attn_logit_softcapping", "final_logit_softcapping"), family.soft_caps)
        )
        return cls(
            family=family,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            d_key=d_key,
            d_value=int(value("attention.value_length", n_embd // n_head)),
            n_context_train=n_context_train,
            norm_eps=float(value(norm_key)),
            rope=rope,
            window_rope=_window_rope(file, family, rope),
            has_rope=tuple(has_rope),
            window=window,
            windowed=windowed,
            attention_scale=attention_scale,
            residual_scale=residual_scale,
            embedding_scale=embedding_scale,
            logit_scale=logit_scale,
            attention_cap=attention_cap,
            logit_cap=logit_cap,
            n_expert=n_expert,
            n_expert_used=int(value("expert_used_count")) if n_expert else 0,
        )


def _same_everywhere(file: GGUFFile, key: str, value: Any) -> int:
    counts = {int(count) for count in value} if isinstance(value, list) else {int(value)}
    if len(counts) != 1:
        raise LukvError(f"{file.path}: {key} differs from layer to layer, which is not supported")
    return counts.pop()


def _rope(file: GGUFFile, d_key: int, n_context_train: int) -> RopeConfig:
    prefix = f"{file.architecture}.rope."
    dim = int(file.value(prefix + "dimension_count", d_key))
    if dim % 2 or dim > d_key:
        raise LukvError(f"{file.path}: rope.dimension_count {dim} does not fit a head of {d_key}")
    kind = file.value(prefix + "scaling.type", "linear")  # llama.cpp's default when there is a factor
    if kind not in _ROPE_SCALING:
        supported = ", ".join(_ROPE_SCALING)
        raise LukvError(f"{file.path}: RoPE scaling of type {kind!r} is not supported; supported: {supported}")
    factor = float(file.value(prefix + "scaling.factor", file.value(prefix + "scale_linear", 0.0)))
    return RopeConfig(
        dim=dim,
        base=float(file.value(prefix + "freq_base", 10000.0)),
        position_scale=1.0 / factor if kind != "none" and factor > 0.0 else 1.0,
        attention_factor=float(file.value(prefix + "scaling.attn_factor", 1.0)),
        yarn=kind == "yarn",
        n_context_original=int(file.value(prefix + "scaling.original_context_length", n_context_train)),
    )


def _window_rope(file: GGUFFile, family: Family, rope: RopeConfig) -> RopeConfig:
    if family.window_rope == "same":
        return rope
    if family.window_rope == "unscaled":
        return rope.unscaled()
    return rope.unscaled(float(file.value(f"{family.architecture}.rope.freq_base_swa", 10000.0)))


def _windows(file: GGUFFile, family: Family, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    """Size of the sliding window, and the layers that have one."""
    prefix = f"{family.architecture}.attention.sliding_window"
    default = 4096 if family.architecture == "gemma2" else 0  # llama.cpp knows this one by heart
    window = int(file.value(prefix, default)) if family.window_period else 0
    if not window:
        return 0, (False,) * n_layer
    pattern = file.value(prefix + "_pattern", family.window_period)
    if isinstance(pattern, list):
        if len(pattern) < n_layer:
            raise LukvError(f"{file.path}: {prefix}_pattern has {len(pattern)} values for {n_layer} layers")
        return window, tuple(bool(flag) for flag in pattern[:n_layer])
    return window, tuple(not pattern or i % pattern < pattern - 1 for i in range(n_layer))
