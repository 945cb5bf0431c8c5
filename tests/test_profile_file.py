"""Profiles as files: what comes back, what is refused, curves of the LU-KV project, checkpoints, the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import random_scorer
from tiny_gguf import CHAT_TEMPLATE, write_tiny
from torch import Tensor

from lukv_gguf import checkpoint, cli, defaults, metrics, oracle, profile
from lukv_gguf.allocation import apply_floor_and_blend
from lukv_gguf.errors import LukvError
from lukv_gguf.metadata import read_metadata
from lukv_gguf.metrics import LayerState, Metric, Needs
from lukv_gguf.metrics.kvzip import KVZip
from lukv_gguf.profile import Profile, Protocol, profile_metrics
from lukv_gguf.profile_file import export_curve, import_curve, load_profiles, save_profiles

CONTEXT = " ".join(f"w{i * i % 39 + 1} and {i}" for i in range(60))
QUESTIONS = ["what is w7?", "how many?", "w3 w4 w5"]


class LastQueries(Metric):
    """Attention of the last queries: a second metric, with a parameter, that sees more than keys."""

    name, native = "last-queries", True
    defaults = {"window": 5}

    @property
    def needs(self) -> Needs:
        return Needs(window=self.params["window"])

    def score(self, state: LayerState) -> Tensor:
        assert state.queries is not None and state.queries.shape[1] == self.params["window"]
        queries = state.queries.unflatten(0, (len(state.keys), -1)).mean(dim=1)
        return (queries @ state.keys.transpose(1, 2)).softmax(dim=-1).mean(dim=1)


@pytest.fixture(autouse=True)
def second_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics._METRICS, LastQueries.name, LastQueries)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layer=4, chat_template=CHAT_TEMPLATE).path


SCORER = random_scorer(4, 2, 16)


def make(model: Path, names: tuple[str, ...] = ("keydiff", "last-queries"), **changes: Any) -> dict[str, Profile]:
    protocol = {"n_context": 200, "max_new_tokens": 5, "engine": "llama", "refine": 0}
    keywords = {key: changes.pop(key) for key in ("checkpoint", "start_over", "progress") if key in changes}
    return profile_metrics(
        model,
        [metrics.get(name, SCORER) for name in names],
        context=CONTEXT,
        questions=QUESTIONS,
        protocol=Protocol(**{**protocol, **changes}),
        dtype=torch.float32,
        **keywords,
    )


@pytest.fixture
def profiles(model: Path) -> dict[str, Profile]:
    return make(model)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "p.npz"
    ratios = np.array([0.25, 0.5])
    budget = np.broadcast_to(ratios[:, None, None], (2, 2, 2))
    save_profiles(path, {"keydiff": Profile("keydiff", {}, 4, 16, ratios, budget, np.zeros((2, 2)), {"a": "b"})})
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(arg) for arg in args])


def assert_error(result: Result, *parts: str, exit_code: int = 1) -> None:
    assert result.exit_code == exit_code
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lukv-gguf: error: ") and all(part in last for part in parts), result.stderr
    assert "Traceback" not in result.output


def assert_same(first: Profile, second: Profile, exact: bool = True) -> None:
    for field in ("ratios", "budget", "gap", "budgeted", "marginal", "scores", "query_budget"):
        np.testing.assert_allclose(getattr(first, field), getattr(second, field), rtol=0 if exact else 1e-3, atol=1e-6)
    assert (first.metric, first.metric_params, first.sink) == (second.metric, second.metric_params, second.sink)


class TestEngines:
    def test_both_measure_the_same(self, model: Path) -> None:
        by_layer, in_memory = make(model), make(model, engine="torch")
        for name, one in by_layer.items():
            assert one.provenance["engine"] == "llama" and in_memory[name].provenance["engine"] == "torch"
            assert one.provenance["decoded_tokens"] == in_memory[name].provenance["decoded_tokens"]
            np.testing.assert_allclose(one.marginal, in_memory[name].marginal, rtol=5e-3, atol=1e-4)
            np.testing.assert_allclose(one.budget, in_memory[name].budget, atol=0.02)

    def test_several_metrics_are_each_as_alone(self, model: Path, profiles: dict[str, Profile]) -> None:
        assert list(profiles) == ["keydiff", "last-queries"]
        for name, found in profiles.items():
            assert_same(found, make(model, (name,))[name])
        assert not np.array_equal(profiles["keydiff"].budget, profiles["last-queries"].budget)

    def test_every_metric_scores_the_same(self, model: Path) -> None:
        names = tuple(metrics.names())
        by_llama, by_torch = (make(model, names, engine=engine) for engine in ("llama", "torch"))
        for name in names:
            a, b = by_llama[name].scores, by_torch[name].scores
            assert a.shape == (4, 2, 200) and np.isfinite(a[..., 20:]).all() and (np.diff(a[..., 20:]) <= 0).all()
            np.testing.assert_allclose(a[..., 20:], b[..., 20:], rtol=1e-3, atol=1e-5)
            assert by_llama[name].metric_params == metrics.get(name).params
        tops = {by_llama[name].marginal.tobytes() for name in names}
        assert len(tops) == len(names)  # no two rank alike

    def test_kvzip_needs_room(self, tmp_path: Path) -> None:
        small = write_tiny(tmp_path / "small.gguf", n_ctx=300, chat_template=CHAT_TEMPLATE).path
        with pytest.raises(LukvError, match="more than the 300 that fit; take a shorter context"):
            make(small, ("kvzip",))

    def test_a_small_model_is_held_in_memory(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert make(model, engine="auto")["keydiff"].provenance["engine"] == "torch"
        monkeypatch.setattr(profile, "_TORCH_WEIGHTS", 1000)
        assert make(model, engine="auto")["keydiff"].provenance["engine"] == "llama"

    def test_layers_with_a_window_are_left_out(self, tmp_path: Path) -> None:
        path = write_tiny(tmp_path / "gemma.gguf", "gemma3", n_layer=4).path
        found = make(path, ("keydiff",))["keydiff"]
        assert found.budgeted.tolist() == [False, True, False, True]
        for one in (found, found.allocated("adakv"), found.allocated("pyramidkv")):
            left_out = one.budget[:, ~one.budgeted]
            np.testing.assert_allclose(left_out, np.broadcast_to(one.ratios[:, None, None], left_out.shape))
            np.testing.assert_allclose(one.budget.mean(axis=(1, 2)), one.ratios, atol=0.01)
        assert found.budget[19][found.budgeted].std() > 0.01

    @pytest.mark.parametrize("device", ["nonsense", "cuda" if not torch.cuda.is_available() else "mps"])
    def test_a_missing_device_is_told(self, device: str) -> None:
        with pytest.raises(LukvError, match="is not available"):
            profile.find_device(device)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_devices_agree(self, model: Path) -> None:
        arguments = {"context": CONTEXT, "questions": QUESTIONS, "dtype": torch.float32}
        on_cpu = profile_metrics(model, [metrics.get("keydiff")], device="cpu", **arguments)["keydiff"]
        on_gpu = profile_metrics(model, [metrics.get("keydiff")], device="cuda", **arguments)["keydiff"]
        np.testing.assert_allclose(on_gpu.marginal, on_cpu.marginal, rtol=1e-2, atol=1e-3)


class TestFile:
    def test_round_trip(self, profiles: dict[str, Profile], tmp_path: Path) -> None:
        save_profiles(tmp_path / "p.npz", profiles)
        loaded = load_profiles(tmp_path / "p.npz")
        assert list(loaded) == list(profiles)
        for name, found in loaded.items():
            assert_same(found, profiles[name])
            assert found.provenance.items() >= profiles[name].provenance.items()
        assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]

    @pytest.mark.parametrize("size", [0, 3, 100, 2000, -200])
    def test_damaged_files(self, profiles: dict[str, Profile], tmp_path: Path, size: int) -> None:
        save_profiles(tmp_path / "p.npz", profiles)
        data = (tmp_path / "p.npz").read_bytes()
        (tmp_path / "p.npz").write_bytes(data[:size])
        with pytest.raises(LukvError, match="p.npz"):
            load_profiles(tmp_path / "p.npz")

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_any_flipped_byte_is_read_or_told(self, small_file: Path, data: st.DataObject) -> None:
        path = small_file.with_name("flipped-p.npz")
        flipped = bytearray(small_file.read_bytes())
        flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(flipped)
        try:
            load_profiles(path)
        except LukvError as error:
            assert "p.npz" in str(error)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"budget": np.zeros((99, 4, 3))}, "do not fit together|outside"),
            ({"budget": np.full((99, 4, 2), 0.5)}, "on average"),
            ({"budget": np.full((99, 4, 2), np.nan)}, r"outside \[0, 1\]"),
            ({"gap": np.zeros((4, 3))}, "do not fit together"),
            ({"ratios": np.linspace(0.9, 0.1, 99)}, "ascend"),
            ({"query_budget": np.zeros((3, 9, 4, 2))}, "do not fit together"),
        ],
    )
    def test_inconsistent_files(
        self, profiles: dict[str, Profile], tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        save_profiles(tmp_path / "p.npz", {"keydiff": replace(profiles["keydiff"], **changes)})
        with pytest.raises(LukvError, match=message):
            load_profiles(tmp_path / "p.npz")

    def test_other_files(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "other.npz", a=np.zeros(3))
        np.save(tmp_path / "array.npz.npy", np.zeros(3))
        np.savez(tmp_path / "later.npz", description=np.array(json.dumps({"format": "lukv-profile", "version": 9})))
        for name, message in (
            ("other.npz", "not a profile"),
            ("array.npz.npy", "not a profile"),
            ("missing.npz", "No such file"),
            ("later.npz", "version 9"),
        ):
            with pytest.raises(LukvError, match=message):
                load_profiles(tmp_path / name)


class TestCurve:
    def test_round_trip(self, profiles: dict[str, Profile], tmp_path: Path) -> None:
        export_curve(tmp_path / "c.npy", profiles["keydiff"])
        curve = np.load(tmp_path / "c.npy")
        assert curve.shape == (99, 4, 2)
        np.testing.assert_allclose(curve.mean(axis=(1, 2)), np.arange(1, 100) / 100, atol=1e-3)
        back = import_curve(tmp_path / "c.npy", "keydiff", {}, 4, 16, "tiny")
        np.testing.assert_allclose(back.budget, profiles["keydiff"].budget, atol=2e-3)

    def test_any_grid_can_be_exported(self, model: Path, tmp_path: Path) -> None:
        export_curve(tmp_path / "c.npy", make(model, ("keydiff",), n_ratio=9)["keydiff"])
        assert np.load(tmp_path / "c.npy").shape == (99, 4, 2)

    @pytest.mark.parametrize("curve", [np.zeros((99, 4)), np.zeros((98, 4, 2)), np.zeros((99, 4, 2)), np.array("x")])
    def test_other_arrays(self, curve: np.ndarray, tmp_path: Path) -> None:
        np.save(tmp_path / "c.npy", curve)
        with pytest.raises(LukvError, match="a curve holds|on average"):
            import_curve(tmp_path / "c.npy", "keydiff", {}, 4, 1, "tiny")


class Interrupted(Exception):
    """Stands for whatever ends a program."""


class TestCheckpoint:
    def test_any_interruption_loses_one_layer_at_most(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("keydiff", "last-queries", "kvzip")  # the last one has residual streams of its own
        whole, folder = make(model, names), tmp_path / "p.partial"
        measured: list[int] = []
        score = LastQueries.score

        def counting(self: LastQueries, state: LayerState) -> Tensor:
            measured.append(1)
            if len(measured) % 2 == 0:
                raise Interrupted
            return score(self, state)

        monkeypatch.setattr(LastQueries, "score", counting)
        runs = 0
        while True:
            runs += 1
            try:
                found = make(model, names, checkpoint=folder)
                break
            except Interrupted:
                assert folder.exists()
        assert runs == 4 and len(measured) == 7  # each run but the last loses one layer, and none of four twice
        for name in whole:
            assert_same(found[name], whole[name])
        checkpoint.discard_folder(folder)
        assert not folder.exists()

    def test_answers_are_asked_for_once(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        decode = profile.decode_answers
        monkeypatch.setattr(profile, "decode_answers", lambda *a, **k: calls.append(1) or decode(*a, **k))
        force = oracle.teacher_force
        monkeypatch.setattr(oracle, "teacher_force", lambda *a, **k: (_ for _ in ()).throw(Interrupted))
        for _ in range(2):
            with pytest.raises(Interrupted):
                make(model, checkpoint=tmp_path / "p.partial")
        monkeypatch.setattr(oracle, "teacher_force", force)
        make(model, checkpoint=tmp_path / "p.partial")
        assert len(calls) == 1

    def test_a_folder_of_another_run_is_kept(self, model: Path, tmp_path: Path) -> None:
        folder = tmp_path / "p.partial"

        def interrupt(stage: str, done: int, total: int) -> None:
            if stage == "measure" and done == 2:
                raise Interrupted

        with pytest.raises(Interrupted):
            make(model, checkpoint=folder, progress=interrupt)
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(LukvError, match="other parameters"):
            make(model, checkpoint=folder, max_new_tokens=4)
        assert sorted(path.name for path in folder.iterdir()) == before
        assert_same(make(model, checkpoint=folder, start_over=True, max_new_tokens=4)["keydiff"],
                    make(model, max_new_tokens=4)["keydiff"])  # fmt: skip

    @pytest.mark.parametrize("name", ["streams.npz", "layer-0001.npz", "answers.json"])
    def test_damaged_parts_are_made_again(self, model: Path, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "p.partial"

        def interrupt(stage: str, done: int, total: int) -> None:
            if stage == "measure" and done == 3:
                raise Interrupted

        with pytest.raises(Interrupted):
            make(model, checkpoint=folder, progress=interrupt)
        (folder / name).write_bytes(b"PK damaged")
        assert_same(make(model, checkpoint=folder)["keydiff"], make(model)["keydiff"])

    def test_a_full_disk_is_told(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint.np, "savez", full)
        with pytest.raises(LukvError, match="p.partial: No space left"):
            make(model, checkpoint=tmp_path / "p.partial")


class TestCommands:
    OPTIONS = ("--n-context", 150, "--k-max", 3, "--n-query", 2)

    def test_profile_then_embed(self, model: Path, tmp_path: Path) -> None:
        output = tmp_path / "p.npz"
        result = run("profile", model, "-o", output, "--metric", "keydiff,last-queries", *self.OPTIONS)
        assert result.exit_code == 0, result.output
        assert "keydiff" in result.stdout and "last-queries" in result.stdout and "gap" in result.stdout
        assert_error(run("profile", model, "-o", output), "exists", "-f")
        assert_error(run("embed", model, "-o", tmp_path / "m.gguf", "--profile", output), "--metric", "last-queries")

        result = run("embed", model, "-o", tmp_path / "m.gguf", "--profile", output, "--metric", "last-queries")
        assert result.exit_code == 0, result.output
        meta, found = read_metadata(tmp_path / "m.gguf"), load_profiles(output)["last-queries"]
        assert (meta.metric, meta.metric_params) == ("last-queries", {"window": 5})
        expected = apply_floor_and_blend(found.budget, found.ratios, defaults.REFINED_FLOOR)
        np.testing.assert_allclose(meta.profile_budget, expected, atol=1e-5)
        assert len(meta.provenance["profile_sha256"]) == 64 and meta.provenance["questions"] == "2"
        shown = "".join(run("inspect", tmp_path / "m.gguf").stdout.split())  # long paths are folded
        assert f"model{tmp_path / 'm.gguf'}" in shown and "profiled_modeltiny" in shown

    @pytest.mark.parametrize("command", ["profile", "embed"])
    def test_an_interrupted_command_can_be_given_again(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        output = tmp_path / "p"
        arguments = (command, model, "-o", output, "--engine", "llama", *self.OPTIONS)
        save = checkpoint.Checkpoint.save_layer

        def interrupt(self: checkpoint.Checkpoint, arrays: Any, streams: Any) -> None:
            save(self, arrays, streams)
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint.Checkpoint, "save_layer", interrupt)
        for _ in range(4):
            result = run(*arguments)
            assert result.exit_code == 130
            assert "p.partial keeps what is done; the same command goes on" in result.stderr
            assert result.stderr.splitlines()[-1] == "lukv-gguf: interrupted"
            assert [path.name for path in tmp_path.iterdir()] == ["p.partial"]
        assert run(*arguments).exit_code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["p"]

    def test_a_result_that_cannot_be_written_is_not_lost(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        arguments = ("profile", model, "-o", tmp_path / "p.npz", "--engine", "llama", *self.OPTIONS)
        monkeypatch.setattr(np, "savez_compressed", full)
        assert_error(run(*arguments), "p.npz: disk is full")
        assert [path.name for path in tmp_path.iterdir()] == ["p.npz.partial"]
        monkeypatch.undo()
        monkeypatch.setattr(profile, "decode_answers", lambda *a, **k: pytest.fail("asked again"))
        assert run(*arguments).exit_code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]

    @pytest.mark.parametrize("allocation", ["uniform", "pyramidkv", "adakv"])
    def test_other_allocations(self, model: Path, tmp_path: Path, allocation: str) -> None:
        run("profile", model, "-o", tmp_path / "p.npz", *self.OPTIONS)
        for profile_options in ((), ("--profile", tmp_path / "p.npz")):
            if allocation == "adakv" and not profile_options:
                profile_options = self.OPTIONS  # it has to look at the model
            options = ("--allocation", allocation, "-o", tmp_path / "m.gguf", *profile_options)
            result = run("embed", model, *options)
            assert result.exit_code == 0, result.output
            meta = read_metadata(tmp_path / "m.gguf")
            assert meta.provenance["allocation"] == allocation and meta.provenance["blend"] == "0.0"
            of_layers = meta.budget.mean(axis=1)
            if allocation == "pyramidkv":
                np.testing.assert_allclose(np.diff(of_layers), np.diff(of_layers)[0], atol=1e-3)
                assert of_layers[0] > of_layers[-1]
            else:
                np.testing.assert_allclose(of_layers, 0.2, atol=5e-3)
            assert (meta.budget.std() > 1e-3) == (allocation != "uniform")

    def test_a_metric_that_the_cache_cannot_use_is_not_embedded(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "p.npz"
        save_profiles(output, make(model, ("kvzip",)))
        for options in (("--metric", "kvzip"), ("--profile", output), ("--metric", "kvzip", "--allocation", "uniform")):
            assert_error(run("embed", model, "-o", tmp_path / "m.gguf", *options), "metric kvzip needs the policy prefill")
        monkeypatch.setattr(KVZip, "native", False)
        for options in (("--metric", "kvzip"), ("--profile", output), ("--metric", "kvzip", "--allocation", "uniform")):
            assert_error(run("embed", model, "-o", tmp_path / "m.gguf", *options), "kvzip ranks in profiles only")
        assert not (tmp_path / "m.gguf").exists()

    def test_parameters_of_a_metric(self, model: Path, tmp_path: Path) -> None:
        output, embedded = tmp_path / "p.npz", tmp_path / "m.gguf"
        small = ("--n-context", "100", "--n-query", "2", "--k-max", "2")
        assert run("profile", model, "-o", output, "--metric", "last-queries:window=7,keydiff", *small).exit_code == 0
        assert load_profiles(output)["last-queries"].metric_params == {"window": 7}
        embed = ("embed", model, "-o", embedded, "--profile", output)
        assert_error(run(*embed, "--metric", "last-queries:window=8"), "made for last-queries:window=7, not for")
        assert run(*embed, "--metric", "last-queries:window=7").exit_code == 0
        assert read_metadata(embedded).metric_params == {"window": 7}
        uniform = ("--allocation", "uniform", "--metric", "last-queries:window=9")
        assert run("embed", model, "-o", embedded, *uniform).exit_code == 0
        assert read_metadata(embedded).metric_params == {"window": 9}

    def test_another_shape_is_refused(self, model: Path, tmp_path: Path) -> None:
        run("profile", model, "-o", tmp_path / "p.npz", *self.OPTIONS)
        other = write_tiny(tmp_path / "other.gguf").path
        result = run("embed", other, "-o", tmp_path / "m.gguf", "--profile", tmp_path / "p.npz")
        assert_error(result, "made for a model of 4 layers x 2 KV heads", "has 3 layers x 2 KV heads")
        assert not (tmp_path / "m.gguf").exists()

    def test_options_that_say_nothing(self, model: Path, tmp_path: Path) -> None:
        run("profile", model, "-o", tmp_path / "p.npz", *self.OPTIONS)
        for option in (("--sink", 4), ("--objective", "paper"), ("--calibration", "code"), ("--engine", "torch")):
            result = run("embed", model, "--profile", tmp_path / "p.npz", *option)
            assert_error(result, f"{option[0]} is for profiling", exit_code=2)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("--metric", "nonsense"), ["unknown metric"]),
            (("--metric", "keydiff,keydiff"), ["each of them once"]),
            (("--device", "nonsense"), ["device 'nonsense' is not available"]),
            (("-o", "none/p.npz"), ["no such folder"]),
            (("--n-context", 10), ["too short"]),
        ],
    )
    def test_errors_of_profile(self, model: Path, tmp_path: Path, options: tuple, parts: list[str]) -> None:
        assert_error(run("profile", model, "-o", tmp_path / "p.npz", *options), *parts)
        assert not (tmp_path / "p.npz").exists()

    def test_curves(self, model: Path, tmp_path: Path) -> None:
        run("profile", model, "-o", tmp_path / "p.npz", *self.OPTIONS)
        assert run("export-curve", tmp_path / "p.npz", "-o", tmp_path / "c.npy").exit_code == 0
        assert_error(run("export-curve", tmp_path / "p.npz", "-o", tmp_path / "c.npy"), "exists")
        arguments = ("import-curve", tmp_path / "c.npy", "--metric", "keydiff", "--model")
        assert run(*arguments, model, "-o", tmp_path / "q.npz").exit_code == 0
        shown = run("inspect", tmp_path / "q.npz").stdout
        assert "not measured" in shown and "head 1" in shown and "nan" not in shown
        assert run("embed", model, "--profile", tmp_path / "q.npz", "-o", tmp_path / "m.gguf").exit_code == 0
        assert_error(run("embed", model, "--profile", tmp_path / "q.npz", "--allocation", "adakv"), "holds no scores")
        other = write_tiny(tmp_path / "other.gguf").path
        assert_error(run(*arguments, other, "-o", tmp_path / "r.npz"), "4 layers x 2 KV heads")
