"""The command line: what it prints, where it writes, how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_gguf import write_tiny

from lukv_gguf import __version__, calibration, cli, defaults, gguf_header
from lukv_gguf.embed import default_stripped_output
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import encode_pair, read_header, rewrite
from lukv_gguf.metadata import TYPES, LukvMetadata, embed, read_metadata

N_LAYER, N_HEAD_KV = 3, 2


@dataclass
class FakeProfile:
    """What profile_model would return, and how it was asked."""

    metric: str = "keydiff"
    metric_params: dict[str, float] = field(default_factory=dict)
    sink: int = 4
    recent: int = 16
    ratios: np.ndarray = field(default_factory=lambda: np.array([0.25, 0.5, 0.75]))
    gap: np.ndarray = field(default_factory=lambda: np.zeros((N_LAYER, N_HEAD_KV)))
    provenance: dict[str, str] = field(default_factory=lambda: {"questions": "30"})
    asked: dict[str, Any] = field(default_factory=dict)
    fails_with: BaseException | None = None

    def budgets(self, floor: float, blend: float) -> np.ndarray:
        return np.stack([self.budget_at(ratio, floor, blend) for ratio in self.ratios])

    def budget_at(self, ratio: float, floor: float, blend: float) -> np.ndarray:
        spread = min(ratio, 1 - ratio) * (1 - blend)
        return ratio + spread * np.linspace(-1, 1, N_LAYER * N_HEAD_KV).reshape(N_LAYER, N_HEAD_KV)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, n_ff=32)
    return path


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> FakeProfile:
    fake = FakeProfile()

    def profile_model(path: Path, **options: Any) -> FakeProfile:
        fake.asked = {"path": path, **options}
        options["progress"]("prefill", 1, 2)
        if fake.fails_with:
            raise fake.fails_with
        return fake

    monkeypatch.setattr("lukv_gguf.profile.profile_model", profile_model)
    return fake


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(arg) for arg in args])


def assert_error(result: Result, *parts: str, exit_code: int = 1) -> None:
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lukv-gguf: error: ") and all(part in last for part in parts), result.stderr
    assert result.exit_code == exit_code
    assert "Traceback" not in result.output


def uniform(ratio: float = 0.2, **changes: Any) -> LukvMetadata:
    budget = np.full((N_LAYER, N_HEAD_KV), ratio)
    fields: dict[str, Any] = {
        "ratio": ratio,
        "metric": "keydiff",
        "sink": 4,
        "recent": 16,
        "policy": "capacity",
        "budget": budget,
        "profile_ratios": [ratio],
        "profile_budget": budget[None],
    }
    return LukvMetadata(**{**fields, **changes})


def test_version_and_help() -> None:
    assert __version__ in run("--version").stdout
    for command in ("embed", "inspect", "strip"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0


def test_help_needs_no_heavy_imports() -> None:
    code = "import sys, lukv_gguf.cli; print({'torch', 'scipy', 'rich.progress', 'gguf'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


class TestEmbed:
    def test_writes_beside_the_model(self, model: Path, profile: FakeProfile) -> None:
        result = run("embed", model)
        output = model.with_name("tiny-lukv.gguf")
        assert result.exit_code == 0, result.output
        assert str(output) in result.stdout and "20.0% of the KV cache" in result.stdout and "time" in result.stdout
        meta = read_metadata(output)
        assert meta.ratio == defaults.RATIO and meta.policy == defaults.POLICY
        np.testing.assert_allclose(meta.budget, profile.budget_at(0.2, defaults.FLOOR, defaults.BLEND), rtol=1e-6)
        assert meta.profile_budget.shape == (3, N_LAYER, N_HEAD_KV)
        assert meta.provenance["questions"] == "30" and __version__ in meta.provenance["tool"]
        assert meta.provenance["blend"] == str(defaults.BLEND)
        assert profile.asked["context"] == calibration.load_default()[0]
        assert len(profile.asked["questions"]) == 30

    def test_options_reach_the_profile(self, model: Path, profile: FakeProfile, tmp_path: Path) -> None:
        (tmp_path / "c.txt").write_text("A text.")
        (tmp_path / "q.json").write_text('{"questions": ["What?", "Where?"]}')
        result = run(
            "embed", model, "--ratio", 0.5, "-o", tmp_path / "o.gguf", "--policy", "prefill", "--blend", 0.5,
            "--sink", 2, "--recent", 8, "--objective", "paper", "--metric", "keydiff",
            "--context", tmp_path / "c.txt", "--questions", tmp_path / "q.json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        asked = profile.asked
        assert (asked["context"], asked["questions"]) == ("A text.", ["What?", "Where?"])
        assert (asked["sink"], asked["recent"], asked["objective"], asked["metric"]) == (2, 8, "paper", "keydiff")
        meta = read_metadata(tmp_path / "o.gguf")
        assert meta.ratio == 0.5 and meta.policy == "prefill"
        np.testing.assert_allclose(meta.budget, profile.budget_at(0.5, 0.0, 0.5), rtol=1e-6)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["--ratio", "0"], ["ratio must be in (0, 1]"]),
            (["--ratio", "1.01"], ["ratio must be in (0, 1]", "1.01"]),
            (["--ratio", "-0.2"], ["ratio must be in (0, 1]"]),
            (["--ratio", "nan"], ["ratio must be in (0, 1]"]),
            (["--floor", "1.5"], ["floor must be in [0, 1]"]),
            (["--blend", "2"], ["blend must be in [0, 1]"]),
        ],
    )
    def test_bad_numbers(self, model: Path, profile: FakeProfile, options: list[str], parts: list[str]) -> None:
        result = run("embed", model, *options)
        assert_error(result, *parts)
        assert len(result.stderr.splitlines()) == 1 and not profile.asked

    @pytest.mark.parametrize(
        "options", [["--ratio", "much"], ["--policy", "never"], ["--sink", "-1"], ["--nonsense"], ["--context", "x"]]
    )
    def test_usage_errors(self, model: Path, options: list[str]) -> None:
        result = run("embed", model, *options)
        assert_error(result, "--help", exit_code=2)
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("command", ["embed", "inspect", "strip"])
    def test_unusable_models(self, tmp_path: Path, command: str) -> None:
        assert_error(run(command, tmp_path / "none.gguf"), "no such file")
        assert_error(run(command, tmp_path), "not a file")
        assert_error(run(command, ""), "not a file")
        (tmp_path / "x.gguf").write_bytes(b"hello")
        assert_error(run(command, tmp_path / "x.gguf"), "x.gguf: not a GGUF file")
        (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
        assert_error(run(command, tmp_path / "x.gguf"), "truncated")
        assert_error(run(command), "Missing argument", exit_code=2)

    def test_checks_come_before_the_profile(
        self, model: Path, profile: FakeProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert_error(run("embed", model, "-o", tmp_path / "none" / "o.gguf"), "cannot write", "no such folder")
        assert_error(run("embed", model, "-o", tmp_path), "is a folder")
        (tmp_path / "q.json").write_text("[]")
        assert_error(run("embed", model, "--context", model, "--questions", tmp_path / "q.json"), "not UTF-8")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        assert_error(run("embed", model), "cannot write", "disk is full")
        assert not profile.asked

    def test_existing_files(self, model: Path, profile: FakeProfile, tmp_path: Path) -> None:
        other = tmp_path / "other.gguf"
        other.write_bytes(b"precious")
        assert_error(run("embed", model, "-o", other), "exists", "-f")
        assert_error(run("embed", model, "-o", model), "exists", "-f")
        assert not profile.asked and other.read_bytes() == b"precious"
        assert run("embed", model, "-o", other, "-f").exit_code == 0
        # An earlier output of ours may be replaced: it can be made again.
        assert run("embed", model, "-o", other, "--ratio", 0.5).exit_code == 0
        assert read_metadata(other).ratio == 0.5
        assert run("embed", other, "-o", other, "--ratio", 0.3).exit_code == 0
        assert read_metadata(other).ratio == 0.3

    @pytest.mark.parametrize("stage", ["prefill", "write"])
    def test_interrupted(
        self, model: Path, profile: FakeProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        if stage == "prefill":
            profile.fails_with = KeyboardInterrupt()
        else:

            def interrupt(*args: Any) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(gguf_header, "_copy", interrupt)
        result = run("embed", model)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "lukv-gguf: interrupted"
        assert list(tmp_path.iterdir()) == [model]

    def test_errors_of_the_profile(self, model: Path, profile: FakeProfile, tmp_path: Path) -> None:
        profile.fails_with = LukvError("architecture 'x' is not supported")
        assert_error(run("embed", model), "architecture 'x' is not supported")
        profile.fails_with = OSError(5, "Input/output error", "weights")
        assert_error(run("embed", model), "Input/output error")
        profile.fails_with = ZeroDivisionError("division\nby zero")
        assert_error(run("embed", model), "unexpected ZeroDivisionError: division by zero", "--debug")
        assert isinstance(run("--debug", "embed", model).exception, ZeroDivisionError)
        assert list(tmp_path.iterdir()) == [model]


class TestInspect:
    def test_table_and_heatmap(self, model: Path) -> None:
        embed(model, model, uniform(metric_params={"window": 32}, provenance={"tool": "a test"}, enabled=False))
        result = run("inspect", model)
        assert result.exit_code == 0
        for part in ("0.2 of the KV cache", "capacity", "keydiff, window 32", "3 layers x 2 KV heads", "a test", "off"):
            assert part in result.stdout
        assert "head 0  ▄ ▄ ▄" in result.stdout

    def test_json(self, model: Path) -> None:
        embed(model, model, uniform())
        record = json.loads(run("inspect", model, "--json").stdout)
        assert record["embedded"] is True and record["ratio"] == 0.2
        assert record["budget"] == [[0.2] * N_HEAD_KV] * N_LAYER
        assert (record["layers"], record["heads_kv"]) == (N_LAYER, N_HEAD_KV)
        assert {key.split(".")[1] for key in TYPES} - {"profile"} <= set(record)

    def test_without_table(self, model: Path) -> None:
        result = run("inspect", model)
        assert (result.exit_code, result.stdout) == (0, f"{model}: no LU-KV table\n")
        assert json.loads(run("inspect", model, "--json").stdout) == {"embedded": False}

    def test_damaged_table(self, model: Path) -> None:
        embed(model, model, uniform())
        bad = encode_pair("lukv.policy", TYPES["lukv.policy"], "sometimes")
        rewrite(read_header(model), model, lambda key: key == "lukv.policy", [bad])
        assert_error(run("inspect", model), "lukv.policy must be capacity or prefill", "lukv-gguf strip")

    @pytest.mark.parametrize(("n_layer", "n_head_kv"), [(1, 1), (30, 3), (36, 8), (80, 8), (126, 32)])
    def test_heatmap_fits_the_terminal(self, n_layer: int, n_head_kv: int) -> None:
        budget = np.random.default_rng(0).uniform(0, 1, (n_layer, n_head_kv))
        lines = [line.plain for line in cli.heatmap(budget)]
        assert max(map(len, lines)) <= 80
        assert sum(len(line.split()[2:]) for line in lines if line.startswith("head ")) == n_layer * n_head_kv

    def test_heatmap_without_block_characters(self) -> None:
        lines = [line.plain for line in cli.heatmap(np.array([[0.0, 1.0]]), "ascii")]
        assert lines[1:3] == ["head 0  .", "head 1  8"]
        assert "".join(lines).isascii()


class TestStrip:
    def test_is_the_reverse_of_embed(self, model: Path, tmp_path: Path) -> None:
        embed(model, tmp_path / "tiny-lukv.gguf", uniform())
        result = run("strip", tmp_path / "tiny-lukv.gguf")
        output = tmp_path / "tiny-stripped.gguf"
        assert result.exit_code == 0 and str(output) in result.stdout
        assert output.read_bytes() == model.read_bytes()
        assert_error(run("strip", tmp_path / "tiny-lukv.gguf"), "exists", "-f")
        assert run("strip", tmp_path / "tiny-lukv.gguf", "-f").exit_code == 0
        assert run("strip", tmp_path / "tiny-lukv.gguf", "-o", tmp_path / "new.gguf").exit_code == 0

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("m.gguf", "m-stripped.gguf"),
            ("m-lukv.gguf", "m-stripped.gguf"),
            ("a-lukv-b.gguf", "a-lukv-b-stripped.gguf"),
            ("m-lukv-00001-of-00002.gguf", "m-stripped-00001-of-00002.gguf"),
        ],
    )
    def test_default_name(self, name: str, expected: str) -> None:
        assert default_stripped_output(name) == Path(expected)

    def test_nothing_to_strip(self, model: Path, tmp_path: Path) -> None:
        assert_error(run("strip", model), "nothing to strip")
        assert list(tmp_path.iterdir()) == [model]


class TestCalibration:
    def test_default(self) -> None:
        context, questions = calibration.load_default()
        assert len(context.split()) > 3000
        assert len(questions) == len(set(questions)) == 30

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "{}",
            '{"questions": []}',
            '{"questions": "What?"}',
            '{"questions": [1]}',
            '{"questions": [" "]}',
            "[" * 9999,
        ],
    )
    def test_bad_questions(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "c.txt").write_text("A text.")
        (tmp_path / "q.json").write_text(content)
        with pytest.raises(LukvError, match="q.json: (not valid JSON|expected)"):
            calibration.load(tmp_path / "c.txt", tmp_path / "q.json")

    def test_bad_context(self, tmp_path: Path) -> None:
        (tmp_path / "q.json").write_text('{"questions": ["What?"]}')
        with pytest.raises(LukvError, match="cannot read .*c.txt: No such file"):
            calibration.load(tmp_path / "c.txt", tmp_path / "q.json")
        (tmp_path / "c.txt").write_bytes(b"\n")
        with pytest.raises(LukvError, match="the context is empty"):
            calibration.load(tmp_path / "c.txt", tmp_path / "q.json")
        (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(LukvError, match="not UTF-8"):
            calibration.load(tmp_path / "c.txt", tmp_path / "q.json")
