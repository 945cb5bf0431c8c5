"""Pictures of profiles, and the rank correlations that they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny_gguf import write_tiny

from lukv_gguf import cli
from lukv_gguf.errors import LukvError
from lukv_gguf.plots import plot_profile
from lukv_gguf.profile import Profile
from lukv_gguf.profile_file import save_profiles
from lukv_gguf.stability import rank_correlation, split_half_correlation

PNG = b"\x89PNG"


def make(seed: int = 0, **changes: Any) -> Profile:
    """Budgets of six queries that share an order of heads, and differ a little."""
    rng = np.random.default_rng(seed)
    ratios = np.array([0.1, 0.2, 0.5])
    weights = np.sort(rng.random((4, 3)).ravel()).reshape(4, 3) + 0.02 * rng.random((6, 3, 4, 3))
    query_budget = 0.5 * ratios[:, None, None] * (1 + weights / weights.mean(axis=(2, 3), keepdims=True))
    fields: dict[str, Any] = {
        "gap": rng.random((4, 3)),
        "marginal": -np.sort(-rng.random((4, 3, 50)), axis=-1),
        "scores": -np.sort(-rng.random((4, 3, 50)), axis=-1),
        "query_budget": query_budget,
        "provenance": {"profiled_model": "a <model> & more"},
    }
    return Profile("keydiff", {}, 4, 16, ratios, query_budget.mean(axis=0), **{**fields, **changes})


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(arg) for arg in args])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rank_correlation_is_spearmans(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 5, (2, 3, 4, 2))
    for i, got in enumerate(rank_correlation(a, b)):
        expected = spearmanr(a[i].ravel(), b[i].ravel()).statistic if np.ptp(a[i]) and np.ptp(b[i]) else 0.0
        assert got == pytest.approx(expected, abs=1e-12)
    with pytest.raises(LukvError, match="cannot be compared"):
        rank_correlation(a, b[:, :2])


def test_halves_agree_as_far_as_the_queries_do() -> None:
    rng = np.random.default_rng(0)
    alike = np.broadcast_to(rng.random((2, 5, 4)), (6, 2, 5, 4))
    np.testing.assert_allclose(split_half_correlation(alike, n_split=3), np.ones((3, 2)))
    unlike = rng.random((6, 2, 50, 4))
    assert np.abs(split_half_correlation(unlike).mean()) < 0.2
    with pytest.raises(LukvError, match="at least two"):
        split_half_correlation(alike[:1])


def test_every_format(tmp_path: Path) -> None:
    for name in ("p.png", "p.svg", "p.html"):
        plot_profile(make(), tmp_path / name, others={"code": make(1)})
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    svg, page = (tmp_path / "p.svg").read_text(), (tmp_path / "p.html").read_text()
    for title in ("Kept of each head at 20%", "Kept by layer", "Marginal utility", "Importance kept", "Optimality gap",
                  "Stability", "halves of the queries", "code"):  # fmt: skip
        assert title in svg and title in page
    assert "<svg" in page and "a &lt;model&gt; &amp; more" in page and "<?xml" not in page


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"marginal": None, "scores": None}, "Marginal"),
        ({"gap": np.full((4, 3), np.nan)}, "Optimality"),
        ({"query_budget": None}, "Stability"),
    ],
)
def test_what_was_not_measured_is_left_out(tmp_path: Path, changes: dict[str, Any], missing: str) -> None:
    plot_profile(make(**changes), tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    assert missing not in svg and "Kept of each head" in svg


def test_inspect_a_profile(tmp_path: Path) -> None:
    for i, name in enumerate(("p", "code")):
        save_profiles(tmp_path / f"{name}.npz", {"keydiff": make(i)})
    arguments = ("inspect", tmp_path / "p.npz", "--compare", tmp_path / "code.npz")
    result = run(*arguments, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert re.search(r"ρ, halves of the queries +(0\.9|1\.0)", result.stdout) and "ρ, code" in result.stdout
    assert "head 0" in result.stdout and (tmp_path / "p.png").read_bytes().startswith(PNG)
    fields = json.loads(run(*arguments, "--json").stdout)
    assert fields["metric"] == "keydiff" and set(fields["rank_correlation"]) == {"halves of the queries", "code"}


def test_inspect_a_model(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf").path
    assert "no LU-KV table to draw" in run("inspect", model, "--plot", tmp_path / "p.png").stderr
    assert run("embed", model, "--allocation", "pyramidkv").exit_code == 0
    result = run("inspect", tmp_path / "m-lukv.gguf", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    assert "Kept by layer" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "p.pdf"], "a plot ends in .png, .svg, .html"),
        (["--plot", "none/p.png"], "cannot write none/p.png"),
        (["--metric", "snapkv"], "holds nothing for the metric snapkv"),
        (["--compare", "none.npz"], "cannot read none.npz"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    save_profiles("q.npz", {"keydiff": make()})
    result = run("inspect", "q.npz", *options)
    assert result.exit_code == 1 and message in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["q.npz"]
