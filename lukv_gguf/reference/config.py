"""Hyperparameters of a model, from the metadata of its GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lukv_gguf.errors import LukvError
from lukv_gguf.reference.families import Family, get_family
from lukv_gguf.reference.gguf_file import GGUFFile


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model; names as in llama.cpp's hyperparameters."""

    family: Family
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    d_key: int
    d_value: int
    n_context_train: int
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_position_scale: float

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

        if value("expert_count", 0):
            raise LukvError(f"{file.path}: mixture-of-experts models are not supported")
        n_embd = int(value("embedding_length"))
        n_head = _same_everywhere(file, "attention.head_count", value("attention.head_count"))
        n_head_kv = _same_everywhere(file, "attention.head_count_kv", value("attention.head_count_kv", n_head))
        if n_head < 1 or n_head_kv < 1 or n_head % n_head_kv:
            raise LukvError(f"{file.path}: {n_head} heads cannot share {n_head_kv} KV heads")
        d_key = int(value("attention.key_length", n_embd // n_head))
        rope_dim = int(value("rope.dimension_count", d_key))
        if rope_dim % 2 or rope_dim > d_key:
            raise LukvError(f"{file.path}: rope.dimension_count {rope_dim} does not fit a head of {d_key}")
        return cls(
            family=family,
            n_layer=int(value("block_count")),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            d_key=d_key,
            d_value=int(value("attention.value_length", n_embd // n_head)),
            n_context_train=int(value("context_length")),
            norm_eps=float(value("attention.layer_norm_rms_epsilon")),
            rope_dim=rope_dim,
            rope_base=float(value("rope.freq_base", 10000.0)),
            rope_position_scale=_rope_position_scale(file),
        )


def _same_everywhere(file: GGUFFile, key: str, value: Any) -> int:
    counts = {int(count) for count in value} if isinstance(value, list) else {int(value)}
    if len(counts) != 1:
        raise LukvError(f"{file.path}: {key} differs from layer to layer, which is not supported")
    return counts.pop()


def _rope_position_scale(file: GGUFFile) -> float:
    prefix = f"{file.architecture}.rope."
    kind = file.value(prefix + "scaling.type", "linear")  # llama.cpp's default when there is a factor
    if kind not in ("none", "linear"):
        raise LukvError(f"{file.path}: RoPE scaling of type {kind!r} is not supported; supported: none, linear")
    factor = float(file.value(prefix + "scaling.factor", file.value(prefix + "scale_linear", 0.0)))
    return 1.0 / factor if kind == "linear" and factor > 0.0 else 1.0
