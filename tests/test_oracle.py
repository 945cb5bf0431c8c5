"""Oracle importance against a plain numpy forward pass; loss curves and gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_gguf import TinyModel, write_tiny

from lukv_gguf.collect import Collector
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import Needs
from lukv_gguf.oracle import decode_oracle, loss_curve, optimality_gap, teacher_force
from lukv_gguf.reference import ReferenceModel

N_PREFIX = 40


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, n).tolist()


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rope(x: np.ndarray) -> np.ndarray:
    """Interleaved pairs, base 10000; x is [S, heads, d]."""
    n, _, d = x.shape
    angle = np.arange(n)[:, None, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack((pairs.real, pairs.imag), axis=-1).reshape(x.shape)


def contributions(tiny: TinyModel, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """||A v W_O|| [L, n_head, S, S] and the norm of the residual stream [L, S], all in plain numpy."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tiny.tensors.items()}
    n, d, group = len(tokens), tiny.d_head, tiny.n_head // tiny.n_head_kv
    x = weights["token_embd.weight"][tokens]
    shares, norms = [], []
    for layer in range(tiny.n_layer):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blk.{layer}.")}
        norms.append(np.linalg.norm(x, axis=-1))
        h = rms_norm(x, block["attn_norm.weight"])
        q = rope((h @ block["attn_q.weight"].T).reshape(n, tiny.n_head, d))
        k = rope((h @ block["attn_k.weight"].T).reshape(n, tiny.n_head_kv, d))
        v = (h @ block["attn_v.weight"].T).reshape(n, tiny.n_head_kv, d)
        share = []
        for head in range(tiny.n_head):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(d)
            scores[np.triu_indices(n, 1)] = -np.inf
            attention = np.exp(scores - scores.max(axis=1, keepdims=True))
            attention /= attention.sum(axis=1, keepdims=True)
            written = v[:, head // group] @ block["attn_output.weight"][:, head * d : (head + 1) * d].T
            share.append(attention * np.linalg.norm(written, axis=-1))
            x = x + attention @ written
        shares.append(share)
        h = rms_norm(x, block["ffn_norm.weight"])
        gate = h @ block["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["ffn_up.weight"].T)) @ block["ffn_down.weight"].T
    return np.array(shares), np.array(norms)


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("objective", ["relative", "paper"])
def test_importance_equals_a_plain_forward_pass(objective: str, group: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf", n_head=6, n_head_kv=2)
    model = ReferenceModel.load(tiny.path)
    prefix = random_tokens(N_PREFIX)
    suffixes = [random_tokens(5, seed=1), random_tokens(1, seed=2), random_tokens(3, seed=3)]
    cache = model.prefill(prefix)
    # The third token of the first answer ends it, so that queries end at different steps.
    end = model.decode_batch(cache, suffixes, 3)[0][2]
    oracle = decode_oracle(model, cache, suffixes, 5, objective=objective, group=group, end_tokens={end})
    assert oracle.importance.shape == (3, tiny.n_layer, tiny.n_head_kv, N_PREFIX)
    assert len(oracle.answers[0]) < 5

    for suffix, answer, got in zip(suffixes, oracle.answers, oracle.importance):
        n_step = min(5, len(answer) + 1)  # the end token was chosen by a step of its own
        sequence = [*prefix, *suffix, *answer][: N_PREFIX + len(suffix) + n_step - 1]
        shares, norms = contributions(tiny, sequence)
        steps = slice(N_PREFIX + len(suffix) - 1, None)
        per_step = shares[:, :, steps, :N_PREFIX]
        per_step = per_step.reshape(tiny.n_layer, tiny.n_head_kv, 3, *per_step.shape[2:])
        expected = (per_step.mean(axis=2) if group == "mean" else per_step.max(axis=2)).max(axis=2)
        if objective == "relative":
            expected = expected / norms[:, steps].mean(axis=1)[:, None, None]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("objective", ["relative", "paper"])
@pytest.mark.parametrize("arch", ["llama", "qwen3moe", "gemma2", "gemma3", "command-r"])
def test_teacher_forcing_sees_what_decoding_saw(arch: str, objective: str, group: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", arch, n_layer=4).path
    model = ReferenceModel.load(path)
    prefix, suffixes = random_tokens(70), [random_tokens(5, seed=1), random_tokens(1, seed=2), random_tokens(3, seed=3)]
    collector, states = Collector(Needs(window=6)), []
    cache = model.prefill(prefix, observer=lambda *layer: states.append(collector(*layer)))
    end = model.decode_batch(cache, suffixes, 3)[0][2]
    choices = {"objective": objective, "group": group}
    decoded = decode_oracle(model, cache, suffixes, 5, end_tokens={end}, **choices)

    streamed = ReferenceModel.load(path, stream=True)
    layers = list(teacher_force(streamed, prefix, suffixes, decoded.answers, 5, collector=collector, **choices))
    forced = np.stack([layer.importance.numpy() for layer in layers], axis=1)
    np.testing.assert_allclose(forced, decoded.importance, rtol=1e-3, atol=1e-6)
    for layer, keys, state in zip(layers, cache.keys, states):
        np.testing.assert_allclose(layer.state.keys, keys, rtol=1e-4, atol=1e-5)
        assert state.queries.shape[1] == 6
        np.testing.assert_allclose(layer.state.queries, state.queries, rtol=1e-4, atol=1e-5)

    rest = teacher_force(streamed, prefix, suffixes, decoded.answers, 5, start=layers[1].streams, **choices)
    np.testing.assert_array_equal(np.stack([layer.importance for layer in rest], axis=1), forced[:, 2:])


def test_teacher_forcing_needs_tokens(tmp_path: Path) -> None:
    model = ReferenceModel.load(write_tiny(tmp_path / "tiny.gguf").path)
    for suffixes, answers in (([], []), ([[]], [[]]), ([[5]], [[300, 1]])):
        with pytest.raises(LukvError, match="token|suffix"):
            next(teacher_force(model, [4, 5], suffixes, answers, 3))


def test_unknown_choices_are_told(tmp_path: Path) -> None:
    model = ReferenceModel.load(write_tiny(tmp_path / "tiny.gguf").path)
    cache = model.prefill([5, 6])
    with pytest.raises(LukvError, match="known objectives: relative, paper"):
        decode_oracle(model, cache, [[7]], 1, objective="absolute")  # type: ignore[arg-type]
    with pytest.raises(LukvError, match="known: mean, max"):
        decode_oracle(model, cache, [[7]], 1, group="sum")  # type: ignore[arg-type]


importances = arrays(np.float32, (3, 12), elements=st.floats(0, 100, width=32))


@settings(deadline=None)
@given(importances, st.integers(0, 12))
def test_gap_is_the_difference_of_two_loss_curves(importance: np.ndarray, kept: int) -> None:
    ranking = np.array([np.random.default_rng(kept + i).permutation(12) for i in range(3)])
    ranked = loss_curve(np.take_along_axis(importance, ranking, axis=1))
    best = loss_curve(-np.sort(-importance, axis=1))
    gap = optimality_gap(importance, ranking, kept)
    np.testing.assert_allclose(gap, (ranked - best)[:, kept], atol=1e-3)
    assert (gap >= 0).all()


def test_loss_curve_runs_from_everything_to_nothing() -> None:
    assert loss_curve(np.array([4.0, 1.0, 2.0])).tolist() == [7.0, 3.0, 2.0, 0.0]


def test_the_best_ranking_has_no_gap() -> None:
    importance = np.array([1.0, 5.0, 3.0])
    assert optimality_gap(importance, np.array([1, 2, 0]), 2) == 0.0
    assert optimality_gap(importance, np.array([0, 2, 1]), 2) == 4.0
    with pytest.raises(LukvError, match="cannot keep 4 of 3"):
        optimality_gap(importance, np.array([0, 1, 2]), 4)
