"""The solver against an exact dynamic programme, and the laws of budgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lukv_gguf import allocation
from lukv_gguf.allocation import (
    apply_floor_and_blend,
    concave_envelope,
    greedy_counts,
    marginal_gains,
    uniform,
)
from lukv_gguf.errors import LukvError

ROUNDING = 1e-9

gain_tables = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0, 100, width=32))
)
fractions = st.floats(0.0, 1.0)


def best_gain(gains: np.ndarray) -> np.ndarray:
    """Exact dynamic programme: the largest gain of every total budget, [heads * T + 1]."""
    best = np.zeros(1)
    for head in gains:
        kept = np.concatenate(([0.0], np.cumsum(head)))
        longer = np.full(len(best) + len(head), -np.inf)
        for count, gain in enumerate(kept):
            longer[count : count + len(best)] = np.maximum(longer[count : count + len(best)], best + gain)
        best = longer
    return best


def gain_of(gains: np.ndarray, counts: np.ndarray) -> np.ndarray:
    kept = np.concatenate((np.zeros((len(gains), 1)), np.cumsum(gains, axis=1)), axis=1)
    return np.take_along_axis(kept[None], counts[:, :, None], axis=2).sum(axis=(1, 2))


@settings(deadline=None)
@given(gain_tables)
def test_greedy_is_optimal_on_the_relaxed_problem(gains: np.ndarray) -> None:
    relaxed = concave_envelope(gains)
    counts = greedy_counts(relaxed, np.arange(gains.size + 1))
    np.testing.assert_allclose(gain_of(relaxed, counts), best_gain(relaxed), atol=ROUNDING, rtol=ROUNDING)


@settings(deadline=None)
@given(gain_tables)
def test_greedy_is_optimal_on_the_original_problem_when_it_is_convex(gains: np.ndarray) -> None:
    falling = -np.sort(-gains, axis=1)
    counts = greedy_counts(concave_envelope(falling), np.arange(gains.size + 1))
    np.testing.assert_allclose(gain_of(falling, counts), best_gain(falling), atol=ROUNDING, rtol=ROUNDING)


@settings(deadline=None)
@given(gain_tables)
def test_counts_sum_to_the_total_and_grow_with_it(gains: np.ndarray) -> None:
    totals = np.arange(gains.size + 1)
    counts = greedy_counts(concave_envelope(gains), totals)
    assert (counts.sum(axis=1) == totals).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert counts.min() >= 0 and counts.max() <= gains.shape[1]


def test_totals_may_come_in_any_order() -> None:
    gains = np.array([[3.0, 1.0], [2.0, 0.5]])
    assert greedy_counts(gains, [3, 0, 1, 4, 3]).tolist() == [[2, 1], [0, 0], [1, 0], [2, 2], [2, 1]]


def test_heads_that_gain_alike_share_alike() -> None:
    assert greedy_counts(np.zeros((3, 4)), [6]).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("total", [-1, 5])
def test_total_out_of_range(total: int) -> None:
    with pytest.raises(LukvError, match="between 0 and 4"):
        greedy_counts(np.zeros((2, 2)), [total])


@settings(deadline=None)
@given(gain_tables)
def test_envelope_is_the_smallest_concave_majorant(gains: np.ndarray) -> None:
    relaxed = concave_envelope(gains)
    assert (np.diff(relaxed, axis=1) <= 0).all()
    for head, envelope in zip(gains, relaxed):
        kept = np.concatenate(([0.0], np.cumsum(head)))
        n = len(head)
        for b in range(n + 1):
            chords = [
                kept[i] + (kept[j] - kept[i]) * (b - i) / (j - i) if j > i else kept[b]
                for i in range(b + 1)
                for j in range(b, n + 1)
            ]
            assert envelope[:b].sum() == pytest.approx(max(chords), abs=1e-6)


def test_marginal_gains_follow_the_ranking() -> None:
    importance = np.array([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    assert marginal_gains(importance, np.array([[2, 0, 1]])).tolist() == [[[3.0, 1.0, 2.0]], [[6.0, 4.0, 5.0]]]


def test_uniform_has_one_entry_per_ratio() -> None:
    assert uniform(0.3, 2, 3).shape == (2, 3)
    assert uniform([0.1, 0.2], 2, 3)[:, 1, 2].tolist() == [0.1, 0.2]
    with pytest.raises(LukvError, match="ratio"):
        uniform(1.5, 2, 3)


budgets = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=fractions)
)


@settings(max_examples=300, deadline=None)
@given(budgets, fractions, fractions)
def test_floor_and_blend_keep_mean_and_bounds(budget: np.ndarray, floor: float, blend: float) -> None:
    ratio = budget.mean(axis=(1, 2))
    result = apply_floor_and_blend(budget, ratio, floor, blend)
    np.testing.assert_allclose(result.mean(axis=(1, 2)), ratio, atol=1e-12)
    assert result.max() <= 1.0
    assert (result >= (floor * ratio)[:, None, None] - 1e-12).all()


@settings(deadline=None)
@given(budgets, fractions)
def test_a_budget_of_another_mean_is_brought_to_the_ratio(budget: np.ndarray, ratio: float) -> None:
    result = apply_floor_and_blend(budget, np.full(len(budget), ratio))
    np.testing.assert_allclose(result.mean(axis=(1, 2)), ratio, atol=1e-12)
    assert result.min() >= 0.0 and result.max() <= 1.0


def test_blend_ends() -> None:
    budget = np.array([[0.0, 0.1], [0.3, 0.8]])
    np.testing.assert_allclose(apply_floor_and_blend(budget, 0.3), budget)
    np.testing.assert_allclose(apply_floor_and_blend(budget, 0.3, blend=1.0), np.full((2, 2), 0.3))
    np.testing.assert_allclose(apply_floor_and_blend(budget, 0.3, floor=1.0), np.full((2, 2), 0.3))


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_fractions_are_checked(bad: float) -> None:
    good = np.full((1, 2), 0.5)
    for arguments in ((np.full((1, 2), bad), 0.5), (good, bad), (good, 0.5, bad), (good, 0.5, 0.0, bad)):
        with pytest.raises(LukvError, match="between 0 and 1"):
            apply_floor_and_blend(*arguments)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), st.integers(1, 9), st.floats(1.0, 50.0))
def test_pyramid_falls_in_equal_steps(ratios: list[float], n_layer: int, beta: float) -> None:
    table = allocation.pyramid_kv(ratios, n_layer, 3, beta)
    assert table.shape == (len(ratios), n_layer, 3) and table.min() >= 0 and table.max() <= 1
    np.testing.assert_allclose(table.mean(axis=(1, 2)), ratios, atol=1e-9)
    steps = np.diff(table[:, :, 0], axis=1)
    assert (steps <= 1e-12).all()
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-9)


def test_pyramid_at_one_ratio() -> None:
    np.testing.assert_allclose(allocation.pyramid_kv(0.2, 3, 1)[:, 0], [0.39, 0.2, 0.01])
    np.testing.assert_allclose(allocation.pyramid_kv(0.8, 3, 1)[:, 0], [1.0, 0.8, 0.6])
    with pytest.raises(LukvError, match="beta"):
        allocation.pyramid_kv(0.2, 3, 1, beta=0.5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_ada_kv_is_a_top_k_of_each_layer_above_the_safeguard(seed: int, safeguard: float) -> None:
    scores = -np.sort(-np.random.default_rng(seed).normal(size=(2, 3, 20)), axis=-1)
    ratios = np.array([0.0, 0.1, 0.5, 0.83, 1.0])
    table = allocation.ada_kv(scores, ratios, safeguard)
    np.testing.assert_allclose(table.mean(axis=2), np.rint(ratios * 60)[:, None].repeat(2, 1) / 60)
    assert (table >= np.floor(safeguard * ratios * 20)[:, None, None] / 20 - 1e-12).all()
    without = allocation.ada_kv(scores, ratios, 0.0)
    for i, ratio in enumerate(ratios):
        for layer in range(2):
            threshold = np.sort(scores[layer].ravel())[::-1][: round(ratio * 60)]
            expected = [(row >= threshold[-1]).sum() if len(threshold) else 0 for row in scores[layer]]
            np.testing.assert_allclose(without[i, layer] * 20, expected)
