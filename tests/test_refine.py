"""Refined budgets: the gradient, the limits of the gates, and the laws of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import CHAT_TEMPLATE, write_tiny

from lukv_gguf import calibration, defaults, metrics, refine
from lukv_gguf.allocation import apply_floor_and_blend
from lukv_gguf.embed import build_metadata
from lukv_gguf.errors import LukvError
from lukv_gguf.profile import Protocol, profile_metrics, profile_model, rank_positions
from lukv_gguf.profile_file import GRID_RATIOS, Profile
from lukv_gguf.reference import KVCache, ReferenceModel, Tokenizer
from lukv_gguf.refine import divergence, refine_budgets, shift_odds
from lukv_gguf.replay import Replay, make_replays

CONTEXT = " ".join(f"w{i * i % 39 + 1} and {i}" for i in range(60))
SINK, RECENT = 4, 16


def load(path: Path) -> ReferenceModel:
    return ReferenceModel.load(path, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", chat_template=CHAT_TEMPLATE).path


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, n).tolist()


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("windowed", [False, True])
def test_gradient(cap: float, windowed: bool) -> None:
    torch.manual_seed(0)
    n_head, n_row, n_own, n_group, n_token, d = 2, 2, 3, 2, 7, 4
    shapes = [(n_head, n_row, n_own * n_group, d), (n_head, n_row, n_own, d), (n_head, n_row, n_own, d), (n_head, n_token)]
    q, own_keys, own_values, gate = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keys, values = torch.randn(2, n_head, n_token, d, dtype=torch.float64)
    own_hidden = torch.ones(n_own, n_own, dtype=torch.bool).triu(1).repeat_interleave(n_group, 0)
    hidden = torch.arange(n_token).expand(n_own * n_group, -1) < 3 if windowed else None

    def attend(q: torch.Tensor, own_keys: torch.Tensor, own_values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return refine._GatedAttention.apply(q, own_keys, own_values, gate, keys, values, [hidden, own_hidden], cap)

    assert torch.autograd.gradcheck(attend, (q, own_keys, own_values, gate))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3", "qwen3moe"])
def test_without_gates_it_is_the_model(arch: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / f"{arch}.gguf", arch, n_layer=4).path)
    prefix, replays = random_tokens(90), [Replay(random_tokens(20, 1), 5, 17), Replay(random_tokens(14, 2), 30, 40)]
    cache = model.prefill(prefix)
    found = refine._repeat(model, cache.keys, cache.values, replays, [None] * 4)
    expected = [model.logits([*prefix, *replay.tokens])[90 + a : 90 + b] for replay, a, b in zip(replays, (7, 3), (19, 13))]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_a_closed_gate_is_eviction(tiny: Path) -> None:
    model = load(tiny)
    cache = model.prefill(random_tokens(60))
    kept = torch.arange(60) % 3 == 0
    replay = Replay(random_tokens(12, 1), 5, 12)
    gate = torch.where(kept, 0.0, float("-inf")).expand(2, -1)
    closed = refine._repeat(model, cache.keys, cache.values, [replay], [gate] * 3)
    # the same positions of the queries, and fewer cells
    few = [KVCache([t[:, kept] for t in tensors], []) for tensors in (cache.keys, cache.values)]
    x, offsets = model._embed(torch.tensor([replay.tokens])), torch.arange(12)
    for i, layer in enumerate(model._layers):
        q, k, v = model._project(layer, x[0], 60 + offsets)
        own = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        with torch.no_grad():
            out, _ = model._attend(layer, q[None], offsets[None], (few[0].keys[i], few[1].keys[i]), own)
        x = model._finish_layer(layer, x[0], out[0])[None]
    torch.testing.assert_close(closed, model._to_logits(x[0, 4:11]), rtol=1e-3, atol=1e-3)


def profiled(path: Path, **changes: Any) -> Profile:
    arguments = {"context": CONTEXT, "questions": ["what is w7?"], "n_context": 300, "max_new_tokens": 4}
    return profile_model(path, dtype=torch.float32, **{**arguments, "refine": 4, **changes})


def test_laws_of_a_refined_profile(tiny: Path) -> None:
    plain, refined, again = profiled(tiny, refine=0), profiled(tiny), profiled(tiny)
    np.testing.assert_array_equal(refined.budget, again.budget)
    np.testing.assert_allclose(refined.budget.mean(axis=(1, 2)), refined.ratios, atol=1e-3)
    assert refined.budget.min() >= 0 and refined.budget.max() <= 1
    assert abs(refined.budget[19] - plain.budget[19]).max() > 0.02
    np.testing.assert_array_equal(refined.query_budget, plain.query_budget)
    assert refined.provenance["refine_steps"] == "4" and "refine_steps" not in plain.provenance
    elsewhere = profiled(tiny, refine_ratio=0.5)
    assert elsewhere.provenance["refine_ratio"] == "0.5"
    assert abs(elsewhere.budget - refined.budget).max() > 0.01


def test_layers_with_a_window_stay(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "gemma.gguf", "gemma3", n_layer=4).path
    refined = profiled(path)
    assert refined.budgeted.tolist() == [False, True, False, True] and "refine_steps" in refined.provenance
    of_window = refined.budget[:, ~refined.budgeted]
    np.testing.assert_allclose(of_window, np.broadcast_to(refined.ratios[:, None, None], of_window.shape))
    np.testing.assert_allclose(refined.budget.mean(axis=(1, 2)), refined.ratios, atol=1e-3)


def test_defaults_of_the_table(tiny: Path) -> None:
    for profile, floor in ((profiled(tiny), defaults.REFINED_FLOOR), (profiled(tiny, refine=0), defaults.FLOOR)):
        meta = build_metadata(profile, ratio=0.2)
        assert meta.provenance["floor"] == str(floor)
        assert meta.budget.min() >= floor * 0.2 - 1e-9
    assert build_metadata(profiled(tiny), ratio=0.2).provenance["blend"] == "0.0"
    assert "refine_steps" not in profiled(tiny).allocated("uniform").provenance


def test_a_model_too_short_to_repeat_is_not_refined(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "short.gguf", n_ctx=128).path
    assert "refine_steps" not in profiled(path, refine=None).provenance
    with pytest.raises(LukvError, match="128 is too short to refine budgets: --refine 0"):
        profiled(path)


def test_the_context_leaves_room_for_the_parts(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_ctx=800, chat_template=CHAT_TEMPLATE).path
    plain, refined = (profiled(path, context=CONTEXT * 4, n_context=4000, refine=refine) for refine in (0, 2))
    used = [int(profile.provenance["context_tokens"]) for profile in (plain, refined)]
    assert 500 < used[1] <= 800 - refine.N_PART < used[0]


def test_what_it_needs_is_told(tiny: Path) -> None:
    for changes, message in (
        ({"engine": "llama"}, "--engine torch, or --refine 0"),
        ({"refine": -1}, "refine must be 0 or more"),
        ({"refine_ratio": 0.0}, r"refine_ratio must be in \(0, 1\]"),
    ):
        with pytest.raises(LukvError, match=message):
            profiled(tiny, **changes)
    assert "refine_steps" not in profiled(tiny, engine="llama", refine=None).provenance


def test_every_metric_is_refined(tiny: Path) -> None:
    calls: list[tuple[int, int]] = []
    chosen = [metrics.get("keydiff"), metrics.get("knorm")]
    found = profile_metrics(
        tiny, chosen, context=CONTEXT, questions=["what is w7?"], dtype=torch.float32,
        protocol=Protocol(n_context=300, max_new_tokens=4, refine=3),
        progress=lambda stage, *counts: calls.append(counts) if stage == "refine" else None,
    )  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]
    assert abs(found["keydiff"].budget - found["knorm"].budget).max() > 0.01


def test_a_broken_model_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_repeat", lambda *_: torch.full((3, 5), float("nan")))
    with pytest.raises(LukvError, match="not numbers.*--refine 0"):
        profiled(tiny)


@settings(max_examples=50, deadline=None)
@given(
    base=hnp.arrays(np.float64, (3, 2), elements=st.floats(0.02, 1.0)),
    refined=hnp.arrays(np.float64, (3, 2), elements=st.floats(0.0, 1.0)),
    at=st.integers(0, 98),
)
def test_other_ratios_follow(base: np.ndarray, refined: np.ndarray, at: int) -> None:
    budgets = apply_floor_and_blend(np.clip(base * GRID_RATIOS[:, None, None], 0, 1), GRID_RATIOS)
    refined = apply_floor_and_blend(refined, GRID_RATIOS[at])
    moved = shift_odds(budgets, GRID_RATIOS, at, refined)
    np.testing.assert_allclose(moved.mean(axis=(1, 2)), GRID_RATIOS, atol=1e-6)
    np.testing.assert_allclose(moved[at], refined, atol=2e-3)
    assert moved.min() >= 0 and moved.max() <= 1
    mixed = 0.9 * budgets + 0.1 * GRID_RATIOS[:, None, None]  # what refinement starts from: nothing learned, nothing moved
    np.testing.assert_allclose(shift_odds(budgets, GRID_RATIOS, at, mixed[at]), mixed, atol=2e-3)


def test_what_was_learned_reaches_other_ratios() -> None:
    budgets = np.broadcast_to(GRID_RATIOS[:, None, None], (99, 2, 2))
    moved = shift_odds(budgets, GRID_RATIOS, 19, np.array([[0.4, 0.2], [0.1, 0.1]]))
    for i in (9, 29, 49):
        assert moved[i, 0, 0] > 1.2 * moved[i, 0, 1] > 1.4 * moved[i, 1, 0]


@pytest.mark.parametrize("ratio", [0.2, 0.8, 0.95])
def test_the_mean_is_the_ratio_in_every_step(tiny: Path, ratio: float) -> None:
    model = load(tiny)
    prefix, replays = random_tokens(90), [Replay(random_tokens(20, 1), 5, 17)]
    cache = model.prefill(prefix)
    ranking = rank_positions(metrics.get("keydiff"), cache, SINK, RECENT)
    start = apply_floor_and_blend(np.random.default_rng(0).dirichlet(np.ones(6)).reshape(3, 2), ratio)
    found = refine_budgets(model, cache, replays, ranking, SINK + RECENT, start, 4)
    np.testing.assert_allclose(found.mean(), ratio, atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1 and abs(found - start).max() > 0.01


@pytest.mark.real_model
def test_the_model_loses_less(smollm2: Path) -> None:
    """On parts that were not repeated while refining, with real eviction."""
    model = ReferenceModel.load(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    context, _ = calibration.load_default()
    with Tokenizer(smollm2) as tokenizer:
        prefix = tokenizer.begin_tokens(tokenizer.frame_user_message()[0] + context)[:700]
        replays = make_replays(tokenizer, prefix, 32)
    cache = model.prefill(prefix)
    ranking = rank_positions(metrics.get("keydiff"), cache, SINK, RECENT)
    uniform = np.full((30, 3), 0.2)
    refined = refine_budgets(model, cache, replays[::2], ranking, SINK + RECENT, uniform, 6)

    budgets = [uniform, refined, np.ones((30, 3))]
    before, after, full = divergence(model, cache, replays[1::6], ranking, SINK + RECENT, budgets)
    assert abs(refined.mean() - 0.2) < 1e-3
    assert after < 0.5 * before
    assert full < 1e-5
