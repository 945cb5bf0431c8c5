"""Random-weight GGUF models, small enough to write and run inside a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "granite", "starcoder2", "olmo2",
    "smollm3", "exaone", "command-r",
)  # fmt: skip
# the cache runs these too, but the reference model does not
RUNTIME_ONLY = ("cohere2", "gpt-oss", "llama4")
_LAYER_NORM = ("starcoder2", "command-r", "cohere2")
_ALWAYS_TIED = ("gemma2", "command-r", "cohere2")
_POST_NORMS = ("gemma2", "gemma3", "olmo2")
_METADATA: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.sliding_window": 40, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3": {"attention.sliding_window": 40, "attention.sliding_window_pattern": 2},
    "granite": {"attention.scale": 0.1, "residual_scale": 0.5, "embedding_scale": 3.0, "logit_scale": 2.0},
    "command-r": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "attention.sliding_window": 40},
    "gpt-oss": {"attention.sliding_window": 40},
    "llama4": {"interleave_moe_layer_step": 1},
}
FIRST_BYTE_TOKEN = 3  # after <unk>, <s> and </s>
FIRST_WORD_TOKEN = FIRST_BYTE_TOKEN + 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """What :func:`write_tiny` wrote."""

    path: Path
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    d_head: int
    n_vocab: int
    n_ctx: int
    tensors: dict[str, np.ndarray] = field(repr=False)


def write_tiny(
    path: str | Path,
    arch: str = "llama",
    *,
    n_layer: int = 3,
    n_head: int = 4,
    n_head_kv: int = 2,
    d_head: int = 16,
    n_embd: int | None = None,
    n_ff: int = 96,
    n_vocab: int = 300,
    n_ctx: int = 1024,
    seed: int = 0,
    rope_base: float = 10000.0,
    rope_freqs: bool = False,
    rope_scale: float | None = None,
    tied_embeddings: bool = False,
    biases: bool | None = None,
    n_expert: int | None = None,
    rope_factors: bool = False,
    chat_template: str | None = None,
    attention_sharpness: float = 2.0,
    extra: dict[str, Any] | None = None,
) -> TinyModel:
    """Write a random-weight f32 model that a stock llama.cpp loads.

    Parameters
    ----------
    path
        File to write.
    arch
        One of `ARCHITECTURES` or `RUNTIME_ONLY`.
    n_embd
        Width of the residual stream; ``n_head * d_head`` by default. Any other width makes
        ``attention.key_length`` and ``attention.value_length`` necessary, and they are written.
    n_vocab
        At least 259: three control tokens, 256 bytes, the rest a space and words.
    rope_freqs
        Add ``rope_freqs.weight``, the per-frequency divisors of Llama 3.
    rope_scale
        Factor of a linear RoPE scaling.
    biases
        Biases of the query, key and value projections; by default what ``arch`` demands (qwen2).
    n_expert
        Experts of the MLP, two of which are used; by default four for architectures that have them, else 0.
    rope_factors
        Add LongRoPE's two sets of factors.
    attention_sharpness
        About the standard deviation of query and key components: the larger, the more clearly a
        head prefers some positions.
    extra
        Further metadata, key to bool, int, float or str.

    Returns
    -------
    TinyModel
        The shape, and the tensors as written (row-major, ``[n_out, n_in]``).
    """
    if arch not in ARCHITECTURES + RUNTIME_ONLY:
        raise ValueError(f"unknown architecture {arch!r}")
    if n_vocab < FIRST_WORD_TOKEN:
        raise ValueError(f"n_vocab must be at least {FIRST_WORD_TOKEN}")
    default_width = n_head * d_head
    n_embd = default_width if n_embd is None else n_embd
    biases = arch in ("qwen2", "qwen2moe", "starcoder2") if biases is None else biases
    n_expert = (4 if arch.endswith("moe") or arch in ("gpt-oss", "llama4") else 0) if n_expert is None else n_expert
    rng = np.random.default_rng(seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)).astype(np.float32)

    def vector(n: int, mean: float, spread: float) -> np.ndarray:
        return (mean + spread * rng.standard_normal(n)).astype(np.float32)

    def experts(n_out: int, n_in: int) -> np.ndarray:
        return np.stack([matrix(n_out, n_in) for _ in range(n_expert)])

    embedding_gain = 1.0 if arch.startswith("gemma") else np.sqrt(n_embd)
    tensors: dict[str, np.ndarray] = {"token_embd.weight": matrix(n_vocab, n_embd, embedding_gain)}
    if rope_freqs:
        tensors["rope_freqs.weight"] = np.linspace(1.0, 8.0, d_head // 2, dtype=np.float32)
    if rope_factors:
        tensors["rope_factors_long.weight"] = np.linspace(1.0, 20.0, d_head // 2, dtype=np.float32)
        tensors["rope_factors_short.weight"] = np.linspace(1.0, 2.0, d_head // 2, dtype=np.float32)
    for layer in range(n_layer):
        block = f"blk.{layer}."
        if arch != "olmo2":
            tensors[block + "attn_norm.weight"] = vector(n_embd, 1.0, 0.1)
        q = matrix(n_head * d_head, n_embd, attention_sharpness)
        k = matrix(n_head_kv * d_head, n_embd, attention_sharpness)
        v = matrix(n_head_kv * d_head, n_embd)
        if arch == "phi3":
            tensors[block + "attn_qkv.weight"] = np.concatenate((q, k, v))
        else:
            for name, weight in (("q", q), ("k", k), ("v", v)):
                tensors[block + f"attn_{name}.weight"] = weight
        tensors[block + "attn_output.weight"] = matrix(n_embd, n_head * d_head)
        if biases:
            tensors[block + "attn_q.bias"] = vector(n_head * d_head, 0.0, 0.5)
            tensors[block + "attn_k.bias"] = vector(n_head_kv * d_head, 0.0, 0.5)
            tensors[block + "attn_v.bias"] = vector(n_head_kv * d_head, 0.0, 0.5)
        if arch in ("qwen3", "qwen3moe", "gemma3"):
            tensors[block + "attn_q_norm.weight"] = vector(d_head, attention_sharpness, 0.1)
            tensors[block + "attn_k_norm.weight"] = vector(d_head, 1.0, 0.1)
        elif arch == "olmo2":
            tensors[block + "attn_q_norm.weight"] = vector(n_head * d_head, attention_sharpness, 0.1)
            tensors[block + "attn_k_norm.weight"] = vector(n_head_kv * d_head, 1.0, 0.1)
        elif arch == "command-r" and n_layer >= 64:
            tensors[block + "attn_q_norm.weight"] = vector(n_head * d_head, 1.0, 0.1).reshape(n_head, d_head)
            tensors[block + "attn_k_norm.weight"] = vector(n_head_kv * d_head, 1.0, 0.1).reshape(n_head_kv, d_head)
        if arch == "gpt-oss":
            tensors[block + "attn_sinks.weight"] = vector(n_head, 1.0, 1.0)
            tensors[block + "attn_output.bias"] = vector(n_embd, 0.0, 0.3)
            tensors[block + "post_attention_norm.weight"] = vector(n_embd, 1.0, 0.1)
        if arch not in ("olmo2", "command-r", "cohere2", "gpt-oss"):
            tensors[block + "ffn_norm.weight"] = vector(n_embd, 1.0, 0.1)
        if n_expert:
            tensors[block + "ffn_gate_inp.weight"] = matrix(n_expert, n_embd, 3.0)
            tensors[block + "ffn_gate_exps.weight"] = experts(n_ff, n_embd)
            tensors[block + "ffn_up_exps.weight"] = experts(n_ff, n_embd)
            tensors[block + "ffn_down_exps.weight"] = experts(n_embd, n_ff)
            if arch == "gpt-oss":
                tensors[block + "ffn_gate_inp.bias"] = vector(n_expert, 0.0, 0.3)
                for name, n in (("gate", n_ff), ("up", n_ff), ("down", n_embd)):
                    tensors[block + f"ffn_{name}_exps.bias"] = np.stack([vector(n, 0.0, 0.3) for _ in range(n_expert)])
            if arch == "qwen2moe":
                tensors[block + "ffn_gate_inp_shexp.weight"] = vector(n_embd, 0.0, 0.3)
            if arch in ("qwen2moe", "llama4"):
                tensors[block + "ffn_gate_shexp.weight"] = matrix(n_ff, n_embd)
                tensors[block + "ffn_up_shexp.weight"] = matrix(n_ff, n_embd)
                tensors[block + "ffn_down_shexp.weight"] = matrix(n_embd, n_ff)
        else:
            if arch not in ("phi3", "starcoder2"):
                tensors[block + "ffn_gate.weight"] = matrix(n_ff, n_embd)
            tensors[block + "ffn_up.weight"] = matrix(2 * n_ff if arch == "phi3" else n_ff, n_embd)
            tensors[block + "ffn_down.weight"] = matrix(n_embd, n_ff)
        if arch in _POST_NORMS:
            tensors[block + "post_attention_norm.weight"] = vector(n_embd, 1.0, 0.1)
            tensors[block + "post_ffw_norm.weight"] = vector(n_embd, 1.0, 0.1)
        if arch == "starcoder2":
            for name, n in (("attn_norm", n_embd), ("attn_output", n_embd), ("ffn_norm", n_embd)):
                tensors[block + name + ".bias"] = vector(n, 0.0, 0.3)
            tensors[block + "ffn_up.bias"] = vector(n_ff, 0.0, 0.3)
            tensors[block + "ffn_down.bias"] = vector(n_embd, 0.0, 0.3)
    tensors["output_norm.weight"] = vector(n_embd, 1.0, 0.1)
    if arch == "starcoder2":
        tensors["output_norm.bias"] = vector(n_embd, 0.0, 0.3)
    if not tied_embeddings and arch not in _ALWAYS_TIED:
        tensors["output.weight"] = matrix(n_vocab, n_embd, 3.0)

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")  # llama.cpp expects special tokens of a model that is called phi3
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    if arch in _LAYER_NORM:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_base)
    writer.add_rope_dimension_count(d_head)
    writer.add_vocab_size(n_vocab)
    if n_embd != default_width or arch in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(n_ff)
    if rope_scale is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_scale)
    for key, value in _METADATA.get(arch, {}).items():
        if f"{arch}.{key}" not in (extra or {}):
            _add_value(writer, f"{arch}.{key}", value)
    _add_tokenizer(writer, n_vocab, chat_template)
    for key, value in (extra or {}).items():
        _add_value(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(Path(path), arch, n_layer, n_head, n_head_kv, d_head, n_vocab, n_ctx, tensors)


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int, chat_template: str | None) -> None:
    """A SentencePiece vocabulary: control tokens, every byte, the space, then ``w1``, ``w2``, …"""
    words = ["\u2581", *(f"w{i}" for i in range(1, n_vocab - FIRST_WORD_TOKEN))][: n_vocab - FIRST_WORD_TOKEN]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    )
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(words)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
