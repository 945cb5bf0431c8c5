"""The offline protocol on a tiny model, and the laws of a profile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, write_tiny

from lukv_gguf import allocation, metrics, oracle
from lukv_gguf.errors import LukvError
from lukv_gguf.profile import profile_model, rank_positions, solve_budgets
from lukv_gguf.profile_file import GRID_RATIOS, Profile
from lukv_gguf.reference import ReferenceModel, Tokenizer
from lukv_gguf.stability import rank_correlation

CONTEXT = " ".join(f"w{i * i % 39 + 1} and {i}" for i in range(60))
QUESTIONS = ["what is w7?", "how many?", "w3 w4 w5"]


def make_profile(path: Path, **changes: Any) -> Profile:
    arguments: dict[str, Any] = {
        "context": CONTEXT,
        "questions": QUESTIONS,
        "n_context": 300,
        "max_new_tokens": 6,
        "refine": 0,
        "dtype": torch.float32,
    }
    return profile_model(path, **{**arguments, **changes})


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", chat_template=CHAT_TEMPLATE).path


@pytest.fixture(scope="module")
def profile(tiny_path: Path) -> Profile:
    return make_profile(tiny_path)


def test_budgets_of_every_ratio(profile: Profile) -> None:
    assert profile.ratios.tolist() == GRID_RATIOS.tolist()
    assert profile.ratios[[0, -1]].tolist() == [0.01, 0.99]
    assert profile.budget.shape == (99, 3, 2) and profile.gap.shape == (3, 2)
    one_cell = 1 / (3 * 2 * 300)
    np.testing.assert_allclose(profile.budget.mean(axis=(1, 2)), profile.ratios, atol=one_cell)
    assert profile.budget.min() >= 0 and profile.budget.max() <= 1
    assert (np.diff(profile.budget, axis=0) >= 0).all()
    assert (profile.gap >= 0).all() and (profile.gap <= 1).all()
    assert profile.budget[19].std() > 0.01


def test_it_says_what_it_holds_for(profile: Profile) -> None:
    assert (profile.metric, dict(profile.metric_params), profile.sink, profile.recent) == ("keydiff", {}, 4, 16)
    assert profile.provenance["context_tokens"] == "300"
    assert profile.provenance["questions"] == "3"
    assert all(isinstance(value, str) for value in profile.provenance.values())


def test_the_protocol_step_by_step(profile: Profile, tiny_path: Path) -> None:
    model = ReferenceModel.load(tiny_path)
    with Tokenizer(tiny_path) as tokenizer:
        whole = tokenizer.begin_tokens(f"<s>user\n{CONTEXT}")
        suffixes = [tokenizer.encode(f"\n\n{question}</s>\n<s>assistant\n") for question in QUESTIONS]
    cache = model.prefill(whole[:300])
    ranking = rank_positions(metrics.get("keydiff"), cache, 4, 16)
    importance = oracle.decode_oracle(model, cache, suffixes, 6, end_tokens={2}).importance
    expected = np.zeros((3, 2))
    for of_query in importance:
        gains = np.take_along_axis(of_query, ranking, axis=-1).reshape(6, 300)
        counts = allocation.greedy_counts(allocation.concave_envelope(gains), [round(0.3 * 6 * 300)])
        expected += counts.reshape(3, 2) / 300 / len(QUESTIONS)
    np.testing.assert_allclose(profile.budget[29], expected)


def test_protected_tokens_come_first(tiny_path: Path) -> None:
    model = ReferenceModel.load(tiny_path)
    cache = model.prefill(list(range(3, 103)))
    ranking = rank_positions(metrics.get("keydiff"), cache, 4, 16)
    assert ranking.shape == (3, 2, 100)
    assert (ranking[..., :20] == [*range(4), *range(84, 100)]).all()
    assert (np.sort(ranking) == np.arange(100)).all()
    unprotected = rank_positions(metrics.get("keydiff"), cache, 0, 0)
    assert (np.sort(unprotected) == np.arange(100)).all()
    assert not (unprotected[..., :20] == ranking[..., :20]).all()


def test_floor_and_blend_keep_the_ratio(profile: Profile) -> None:
    budgets = profile.budgets(floor=0.25, blend=0.3)
    np.testing.assert_allclose(budgets.mean(axis=(1, 2)), profile.ratios, atol=1e-12)
    assert budgets[19].min() >= 0.05 - 1e-12 and budgets[1].min() >= 0.005 - 1e-12
    np.testing.assert_allclose(profile.budgets(blend=1.0), allocation.uniform(profile.ratios, 3, 2))


@pytest.mark.parametrize("ratio", [0.003, 0.01, 0.2, 0.234, 0.99, 0.995, 1.0])
def test_budget_at_any_ratio(profile: Profile, ratio: float) -> None:
    for floor, blend in ((0.0, 0.0), (0.4, 0.3)):
        budget = profile.budget_at(ratio, floor, blend)
        assert budget.shape == (3, 2)
        assert budget.mean() == pytest.approx(ratio, abs=1e-12)
        assert budget.min() >= floor * ratio - 1e-12 and budget.max() <= 1.0


def test_budget_at_a_ratio_of_the_grid_is_the_grids(profile: Profile) -> None:
    np.testing.assert_allclose(profile.budget_at(0.2, 0.05, 0.3), profile.budgets(0.05, 0.3)[19], atol=1e-3)
    between = profile.budget_at(0.205)
    np.testing.assert_allclose(between, (profile.budget[19] + profile.budget[20]) / 2, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.0, -0.2, 1.01, float("nan")])
def test_ratio_out_of_range(profile: Profile, ratio: float) -> None:
    with pytest.raises(LukvError, match=r"ratio must lie in \(0, 1\]"):
        profile.budget_at(ratio)


def test_a_head_that_alone_matters_gets_the_cells() -> None:
    importance = np.full((2, 1, 2, 10), 1e-6)
    importance[:, 0, 1] = 1.0
    ranking = np.broadcast_to(np.arange(10), (1, 2, 10))
    solution = solve_budgets(importance, ranking, np.array([0.25, 0.5, 0.75]))
    for budget in solution.query_budget:
        np.testing.assert_allclose(budget[:, 0], [[0.0, 0.5], [0.0, 1.0], [0.5, 1.0]])
    np.testing.assert_allclose(solution.gap, 0.0, atol=1e-12)
    np.testing.assert_allclose(solution.marginal, importance[0], rtol=1e-6)


def test_progress_is_told(tiny_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    make_profile(tiny_path, progress=lambda stage, done, total: calls.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["load", "prefill", "decode", "solve"]
    for stage in ("load", "prefill", "decode", "solve"):
        done = [d for name, d, _ in calls if name == stage]
        assert done == sorted(done)
        assert done[-1] == [total for name, _, total in calls if name == stage][-1]


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    for arch in ("qwen2", "qwen3"):
        profile = make_profile(write_tiny(tmp_path / f"{arch}.gguf", arch).path, n_context=100)
        assert profile.provenance["architecture"] == arch


def test_the_context_fits_the_model(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", n_ctx=128).path
    used = int(make_profile(path).provenance["context_tokens"])
    assert 64 < used < 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "at least one question"),
        ({"context": "short"}, "too short"),
        ({"metric": "nonsense"}, "unknown metric"),
        ({"metric_params": {"window": 3}}, "no parameter window"),
        ({"objective": "nonsense"}, "unknown objective"),
        ({"group": "nonsense"}, "unknown group"),
        ({"sink": -1}, "0 or more"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"questions": ["w1 " * 2000]}, "do not fit"),
    ],
)
def test_bad_arguments_are_told(changes: dict[str, Any], message: str, tiny_path: Path) -> None:
    with pytest.raises(LukvError, match=message):
        make_profile(tiny_path, **changes)


@pytest.mark.real_model
def test_the_deployed_models_answers_give_the_same_budgets(smollm2: Path) -> None:
    text = Path(allocation.__file__).read_text()
    arguments: dict[str, Any] = {"context": text, "questions": ["What is blend?", "List the functions."], "refine": 0}
    by_torch, by_llama = (
        profile_model(smollm2, n_context=600, max_new_tokens=8, engine=engine, **arguments)
        for engine in ("torch", "llama")
    )
    correlation = rank_correlation(by_torch.budget, by_llama.budget)
    assert correlation[19] > 0.85 and correlation.mean() > 0.85  # 0.93: two questions, and answers that differ


@pytest.mark.real_model
def test_a_real_profile_is_ragged(smollm2: Path) -> None:
    text = Path(allocation.__file__).read_text()
    start = time.perf_counter()
    profile = profile_model(
        smollm2,
        context=text,
        questions=["What does this module do?", "What is blend?"],
        n_context=600,
        max_new_tokens=8,
    )
    assert time.perf_counter() - start < 60
    assert profile.budget.shape == (99, 30, 3)
    budget = profile.budget_at(0.2)
    assert budget.min() < 0.05 and budget.max() > 0.6
