"""The reference model against llama.cpp, and its decoding against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, TinyModel, write_tiny

from lukv_gguf import allocation
from lukv_gguf.errors import LukvError
from lukv_gguf.reference import ReferenceModel, Tokenizer
from lukv_gguf.reference.gguf_file import GGUFFile



def scaling(arch: str, kind: str, factor: float) -> dict[str, Any]:
    return {f"{arch}.rope.scaling.type": kind, f"{arch}.rope.scaling.factor": factor}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama-one-head-each": {"arch": "llama", "n_head_kv": 4},
    "llama-wide-heads": {"arch": "llama", "d_head": 64, "n_embd": 48},
    "llama3-rope": {"arch": "llama", "rope_freqs": True, "d_head": 32},
    "llama-linear-rope": {"arch": "llama", "rope_scale": 4.0},
    "llama-biases-tied": {"arch": "llama", "biases": True, "tied_embeddings": True},
    "qwen2": {"arch": "qwen2", "rope_base": 1e6},
    "qwen3": {"arch": "qwen3", "n_embd": 80, "d_head": 32},
    "qwen3-tied": {"arch": "qwen3", "tied_embeddings": True, "n_head": 6, "n_head_kv": 2},
    "llama-yarn": {"extra": {**scaling("llama", "yarn", 4.0), "llama.rope.scaling.original_context_length": 64}},
    "qwen2-yarn": {"arch": "qwen2", "rope_base": 1e6, "d_head": 32, "extra": scaling("qwen2", "yarn", 4.0)},
    "mistral": {"n_head": 8, "rope_base": 1e6, "extra": {"llama.attention.sliding_window": 40}},  # llama.cpp ignores it
    "llama-experts": {"arch": "llama", "n_expert": 4},
    "qwen2moe": {"arch": "qwen2moe"},
    "qwen3moe": {"arch": "qwen3moe", "n_expert": 8},
    "gemma2": {"arch": "gemma2", "n_layer": 4},
    "gemma3": {"arch": "gemma3", "n_layer": 4, "n_head": 8},
    "gemma3-linear-rope": {"arch": "gemma3", "rope_base": 1e6, "rope_scale": 8.0, "n_layer": 6},
    "gemma3-pattern": {
        "arch": "gemma3",
        "extra": {"gemma3.attention.sliding_window_pattern": [True, False, True], "gemma3.rope.freq_base_swa": 500.0},
    },
    "gemma3-without-window": {"arch": "gemma3", "extra": {"gemma3.attention.sliding_window": 0}},
    "phi3": {"arch": "phi3"},
    "phi3-half-rotated": {"arch": "phi3", "d_head": 32, "extra": {"phi3.rope.dimension_count": 16}},
    "phi3-longrope": {
        "arch": "phi3",
        "rope_factors": True,
        "extra": {"phi3.rope.scaling.original_context_length": 128, "phi3.rope.scaling.attn_factor": 1.2},
    },
    "granite": {"arch": "granite"},
    "granite-without-rope": {"arch": "granite", "extra": {"granite.rope.scaling.finetuned": False}},
    "starcoder2": {"arch": "starcoder2"},
    "olmo2": {"arch": "olmo2"},
    "olmo2-window-yarn": {
        "arch": "olmo2",
        "n_layer": 4,
        "extra": {**scaling("olmo2", "yarn", 4.0), "olmo2.attention.sliding_window": 40},
    },
    "smollm3": {"arch": "smollm3", "n_layer": 5},
    "exaone": {"arch": "exaone", "rope_freqs": True},
    "command-r": {"arch": "command-r"},
    "command-r-deep": {"arch": "command-r", "n_layer": 64, "d_head": 8, "n_ff": 16},
}


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, n).tolist()


def nmse(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.square(expected - got, dtype=np.float64).sum() / np.square(expected, dtype=np.float64).sum())


def llama_cpp_logits(path: Path, tokens: list[int]) -> np.ndarray:
    import llama_cpp

    n = len(tokens)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=n,
        n_batch=n,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens)
    logits = model.scores[:n].copy()
    model.close()
    return logits


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return write_tiny(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_llama_cpp(variant: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf", **VARIANTS[variant])
    tokens = random_tokens(256)
    expected = llama_cpp_logits(tiny.path, tokens)
    assert nmse(expected, ReferenceModel.load(tiny.path).logits(tokens).numpy()) <= 1e-6


@pytest.mark.real_model
def test_real_logits_agree_with_llama_cpp(smollm2: Path) -> None:
    with Tokenizer(smollm2) as tokenizer:
        tokens = tokenizer.begin_tokens(Path(allocation.__file__).read_text())[:512]
    expected = llama_cpp_logits(smollm2, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        logits = ReferenceModel.load(smollm2, dtype=dtype).logits(tokens).numpy()
        # llama.cpp multiplies quantised activations, the reference does not.
        assert nmse(expected, logits) <= 2e-3
        assert (expected.argmax(axis=1) == logits.argmax(axis=1)).mean() >= 0.95


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3", "gemma2", "gemma3", "smollm3", "command-r"])
def test_a_batch_decodes_as_each_query_alone(arch: str, tmp_path: Path) -> None:
    model = ReferenceModel.load(write_tiny(tmp_path / "tiny.gguf", arch).path)
    prefix = random_tokens(60)
    suffixes = [random_tokens(9, seed=1), random_tokens(1, seed=2), random_tokens(4, seed=3)]
    answers = model.decode_batch(model.prefill(prefix), suffixes, 6)
    for suffix, answer in zip(suffixes, answers):
        sequence = [*prefix, *suffix]
        for token in answer:
            assert model.logits(sequence)[-1].argmax().item() == token
            sequence.append(token)
        assert len(answer) == 6


def test_an_end_token_ends_its_query_only(tiny: TinyModel) -> None:
    model = ReferenceModel.load(tiny.path)
    prefix = model.prefill(random_tokens(60))
    suffixes = [random_tokens(5, seed=1), random_tokens(3, seed=2)]
    full = model.decode_batch(prefix, suffixes, 8)
    end = full[0][2]
    steps: list[list[int]] = []

    def observe(layer: int, rows: torch.Tensor, attention: torch.Tensor, residual_norm: torch.Tensor) -> None:
        assert attention.shape == (len(rows), 2, 2, 60) and residual_norm.shape == (len(rows),)
        if layer == 0:
            steps.append(rows.tolist())

    cut = model.decode_batch(prefix, suffixes, 8, observe, end_tokens={end})
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in full]
    assert cut == expected
    # A query takes part in the step that chooses its end token, and in none after it.
    assert sum(0 in rows for rows in steps) == len(expected[0]) + 1


@pytest.mark.parametrize("arch", ["llama", "qwen3moe", "gemma3"])
def test_a_streamed_model_is_the_same(arch: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", arch).path
    tokens = random_tokens(50)
    assert torch.equal(ReferenceModel.load(path, stream=True).logits(tokens), ReferenceModel.load(path).logits(tokens))


def test_cache_holds_every_token(tiny: TinyModel) -> None:
    cache = ReferenceModel.load(tiny.path).prefill(random_tokens(33))
    assert cache.n_token == 33
    assert len(cache.keys) == len(cache.values) == tiny.n_layer
    assert cache.keys[0].shape == cache.values[0].shape == (2, 33, 16)


def test_bad_tokens_are_told(tiny: TinyModel) -> None:
    model = ReferenceModel.load(tiny.path)
    for tokens in ([], [300], [-1]):
        with pytest.raises(LukvError, match="token"):
            model.prefill(tokens)
    prefix = model.prefill([5])
    for suffixes in ([], [[4], []], [[999]]):
        with pytest.raises(LukvError, match="token"):
            model.decode_batch(prefix, suffixes, 2)


def test_unreadable_files_are_told(tmp_path: Path, tiny: TinyModel) -> None:
    with pytest.raises(LukvError, match="no such file"):
        ReferenceModel.load(tmp_path / "missing.gguf")
    with pytest.raises(LukvError, match="not a file"):
        ReferenceModel.load(tmp_path)
    other = tmp_path / "other.gguf"
    for content in (b"", b"PK\x03\x04 something else"):
        other.write_bytes(content)
        with pytest.raises(LukvError, match="not a GGUF file"):
            ReferenceModel.load(other)
    whole = tiny.path.read_bytes()
    for size in (4, 20, 100, 3000, len(whole) // 2, len(whole) - 64):
        other.write_bytes(whole[:size])
        with pytest.raises(LukvError, match="truncated|damaged"):
            ReferenceModel.load(other)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.rope.scaling.type": "dynamic"}, "'dynamic' is not supported; supported: none, linear, yarn"),
        ({"general.architecture": "mamba"}, "'mamba' is not supported; supported architectures: command-r, exaone,"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "head_count_kv differs from layer to layer"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3 KV heads"),
    ],
)
def test_unsupported_models_are_told(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", extra=extra).path
    with pytest.raises(LukvError, match=message):
        ReferenceModel.load(path)


def test_quantised_tensors_are_read_in_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((300, 1024)).astype(np.float32)  # more than one piece
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    expected = {}
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F16):
        data = gguf.quantize(matrix, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "q.gguf")
    assert file.n_weight == 3 * matrix.size
    for name, values in expected.items():
        assert file.shape(name) == (300, 1024)
        np.testing.assert_array_equal(file.tensor(name), values)
        np.testing.assert_array_equal(file.rows(name, [299, 0, 7]), values[[299, 0, 7]])
        assert torch.equal(file.tensor(name, torch.bfloat16), torch.from_numpy(values).to(torch.bfloat16))


def test_a_type_without_dequantisation_is_told(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf").path
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16  # behind two dimensions
    for number, name in ((gguf.GGMLQuantizationType.I32, "I32"), (999, "999")):
        data[at : at + 4] = int(number).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(LukvError, match=f"cannot dequantise token_embd.weight of type {name}"):
            ReferenceModel.load(path).logits([5])


def test_missing_tensor_is_told(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", extra={"llama.block_count": 4}).path
    with pytest.raises(LukvError, match="tensor blk.3.attn_norm.weight is missing"):
        ReferenceModel.load(path)


def test_tokenizer_is_the_files_own(tiny: TinyModel) -> None:
    with Tokenizer(tiny.path) as tokenizer:
        tokens = tokenizer.encode("hé w1")
        assert tokens == [107, 198, 172, 259, 260]
        assert tokenizer.decode(tokens) == "hé w1"
        assert tokenizer.begin_tokens("hé w1") == [1, *tokens]
        assert tokenizer.begin_tokens("<s>hé w1") == [1, *tokens]
        assert tokenizer.end_tokens == {2}
        assert tokenizer.frame_user_message() == ("", "")


def test_user_message_stands_in_the_chat_template(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", chat_template=CHAT_TEMPLATE).path
    with Tokenizer(path) as tokenizer:
        assert tokenizer.frame_user_message() == ("<s>user\n", "</s>\n<s>assistant\n")


def test_a_broken_chat_template_is_told(tmp_path: Path) -> None:
    for template in ("{{ raise_exception('no') }}", "{% if %}", "a constant"):
        path = write_tiny(tmp_path / "tiny.gguf", chat_template=template).path
        with Tokenizer(path) as tokenizer, pytest.raises(LukvError, match="chat template"):
            tokenizer.frame_user_message()


def test_tokenizer_of_a_bad_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(LukvError, match="cannot read the vocabulary"):
        Tokenizer(path)
