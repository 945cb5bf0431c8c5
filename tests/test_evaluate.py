"""`lukv-gguf eval` on a tiny model: what is measured, how it is kept, and what the report says."""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_gguf import CHAT_TEMPLATE, write_tiny

from lukv_gguf import cli, metadata
from lukv_gguf.allocation import apply_floor_and_blend
from lukv_gguf.embed import build_metadata
from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import lm, report
from lukv_gguf.evaluate import run as run_module
from lukv_gguf.evaluate.methods import Cell, Method, TableFile, Tables, grid, table_key
from lukv_gguf.evaluate.results import summarise
from lukv_gguf.evaluate.session import Model, Options
from lukv_gguf.evaluate.store import KEY, Store
from lukv_gguf.profile_file import GRID_RATIOS, Profile, choose_profile, save_profiles
from lukv_gguf.reference.tokenizer import Tokenizer

N_LAYER, N_HEAD_KV = 3, 2
ONE_THREAD = Options(n_threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "tiny.gguf"
    write_tiny(path, n_layer=N_LAYER, n_head_kv=N_HEAD_KV, d_head=32, n_ctx=4096, chat_template=CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def profile(model: Path) -> Path:
    """Budgets that differ, and scores that Ada-KV can allocate by."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(-0.9, 0.9, (N_LAYER, N_HEAD_KV))
    spread -= spread.mean()
    budget = GRID_RATIOS[:, None, None] + np.minimum(GRID_RATIOS, 1 - GRID_RATIOS)[:, None, None] * spread * 0.9
    scores = -np.sort(-rng.standard_normal((N_LAYER, N_HEAD_KV, 200)), axis=-1)
    made = Profile(
        "keydiff",
        {},
        4,
        16,
        GRID_RATIOS,
        budget,
        np.zeros((N_LAYER, N_HEAD_KV)),
        {"questions": "3"},
        scores=scores.astype(np.float32),
    )
    path = model.with_name("profile.npz")
    save_profiles(path, {"keydiff": made})
    return path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else here; one test draws."""
    monkeypatch.setattr(report, "pictures", lambda *_: [])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["eval", *map(str, arguments), "--threads", "1"])


def results(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["results"]


def assert_error(result: Result, *parts: str) -> None:
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lukv-gguf: error: ") and all(part in last for part in parts), result.stderr
    assert result.exit_code != 0 and "Traceback" not in result.output


class TestCommand:
    def test_smoke(self, model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two tasks, every method: the records of the interface, the files, and nothing asked twice."""
        options = (model, "--profile", profile, "--lengths", 1100, "-n", 2, "-o", tmp_path / "out", "--json", "-")
        found = results(run(*options))
        methods = {"full", "uniform", "pyramidkv", "adakv", "lukv"}
        for task in ("niah_single_2", "niah_multikey_1", "ruler_average"):
            own = [one for one in found if one["task"] == task]
            assert {one["method"] for one in own} == methods and len(own) == 1 + 4 * 2
        for one in found:
            assert one["interval"][0] <= one["score"] <= one["interval"][1] and one["n"] >= one["contexts"] == (
                4 if "average" in one["task"] else 2
            )
            assert one["ratio"] == (1.0 if one["method"] == "full" else 0.2) and one["policy"] in (
                "",
                "capacity",
                "prefill",
            )
            assert ("vs_uniform" in one) == (one["method"] not in ("full", "uniform"))
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"answers.jsonl", "results.json", "report.html", "tasks.svg", "needles.png", "cost.svg"} <= names
        assert "tables" not in names

        size = (tmp_path / "out" / "answers.jsonl").stat().st_size
        monkeypatch.setattr(report, "pictures", lambda *_: [])
        assert results(run(*options)) == found
        assert (tmp_path / "out" / "answers.jsonl").stat().st_size == size
        more = results(run(*options, "--ratios", "0.2,0.5"))
        assert [one for one in more if one["ratio"] != 0.5] == found

    @pytest.mark.usefixtures("no_pictures")
    def test_kvzip_repeats_each_context(self, model: Path, tmp_path: Path) -> None:
        """The cache evicts by it only after a repetition, and refuses to go on without one."""
        options = (model, "--suite", "smoke,lm", "--metrics", "kvzip:chunk=300", "--methods", "uniform", "--lengths", 1100, "-n", 1)
        found = results(run(*options, "-o", tmp_path, "--json", "-"))
        cells = {(one["method"], one["policy"]) for one in found}
        assert cells == {("full", ""), ("uniform", "prefill")}
        assert {"niah_single_2", "lm_kl"} <= {one["task"] for one in found}
        parts = Tables(model, None, {"kvzip": "kvzip:chunk=300"}).table("uniform", "kvzip").metric_params["chunk"]
        assert parts == 300
        assert_error(run(*options, "-o", tmp_path, "--policies", "capacity"), "kvzip", "prefill")
        assert_error(run(*options, "-o", tmp_path, "--query-aware"), "kvzip", "--query-aware")

    @pytest.mark.usefixtures("no_pictures")
    def test_goes_on_after_an_interruption(
        self, model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = (model, "--profile", profile, "--lengths", 1100, "-n", 2, "--methods", "lukv", "--json", "-")
        whole = results(run(*options, "-o", tmp_path / "whole"))
        add, left = Store.add, 7

        def interrupted(store: Store, record: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            add(store, record)

        monkeypatch.setattr(Store, "add", interrupted)
        result = run(*options, "-o", tmp_path / "parts")
        assert result.exit_code == cli.EXIT_INTERRUPTED and "goes on from there" in result.stderr
        assert len((tmp_path / "parts" / "answers.jsonl").read_text().splitlines()) == 7
        assert not (tmp_path / "parts" / "tables").exists()
        monkeypatch.setattr(Store, "add", add)

        def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{name: value for name, value in one.items() if not name.endswith("_tps")} for one in found]

        assert without_times(results(run(*options, "-o", tmp_path / "parts"))) == without_times(whole)

    @pytest.mark.usefixtures("no_pictures")
    def test_profiles_what_is_missing(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        options = (
            model,
            "--lengths",
            1100,
            "-n",
            1,
            "--tasks",
            "niah_single_2",
            "--policies",
            "capacity",
            "-o",
            tmp_path / "out",
        )
        result = run(*options)
        assert result.exit_code == 0 and "profiling" in result.stderr, result.output
        assert (tmp_path / "out" / "profile.npz").exists() and "LU-KV" in result.stdout and "single_2" in result.stdout
        assert "profiling" not in run(*options).stderr

    @pytest.mark.usefixtures("no_pictures")
    def test_query_aware_and_types(self, model: Path, profile: Path, tmp_path: Path) -> None:
        found = results(
            run(model, "--profile", profile, "--lengths", 1100, "-n", 1, "--tasks", "niah_single_2", "--query-aware", "--kv-types", "f16,q8_0",
                "--methods", "uniform", "-o", tmp_path, "--json", "-")
        )  # fmt: skip
        assert {(one["method"], one["kv_type"]) for one in found} == {
            (m, t) for m in ("full", "uniform") for t in ("f16", "q8_0")
        }
        assert all(one["query_aware"] for one in found)
        by_type = {one["kv_type"]: one["kv_bytes"] for one in found if one["method"] == "full"}
        assert by_type["q8_0"] < 0.6 * by_type["f16"]

    def test_needs_no_torch(self, model: Path, profile: Path, tmp_path: Path) -> None:
        def run_without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
            code = (
                "import sys\n"
                "class NoTorch:\n"
                "    def find_spec(self, name, path=None, target=None):\n"
                "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name=name)\n"
                "sys.meta_path.insert(0, NoTorch())\n"
                "from lukv_gguf.cli import main\n"
                "main()"
            )
            options = ("eval", model, "--lengths", 1100, "-n", 1, "--threads", 1, *arguments)
            return subprocess.run([sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True)

        done = run_without_torch("--suite", "smoke,lm", "--profile", profile, "-o", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        done = run_without_torch("--methods", "lukv", "-o", tmp_path / "other")
        assert done.returncode == 1 and "torch" in done.stderr and "--profile" in done.stderr.splitlines()[-1]

    def test_errors(self, model: Path, profile: Path, tmp_path: Path) -> None:
        out = ("-o", tmp_path / "out")
        assert_error(run(tmp_path / "none.gguf", *out), "no such file")
        assert_error(run(model, *out, "--suite", "x"), "suite", "smoke")
        assert_error(run(model, *out, "--methods", "x"), "method", "pyramidkv")
        assert_error(run(model, *out, "--methods", "lukv:blend=x"), "blend")
        assert_error(run(model, *out, "--ratios", "0"), "ratio")
        assert_error(run(model, *out, "--ratios", "a"), "--ratios")
        assert_error(run(model, *out, "--policies", "x"), "policy")
        assert_error(run(model, *out, "--kv-types", "x"), "K and V")
        assert_error(run(model, *out, "--suite", "longbench"), "--longbench")
        assert_error(run(model, *out, "--metrics", "x", "--profile", profile), "metric x", "--metrics")
        assert_error(run(model, *out, "--profile", tmp_path / "none.npz"), "none.npz")
        assert_error(run(model, *out, "--profile", profile, "--lengths", "80"), "--lengths")
        assert_error(run(model, *out, "--profile", profile, "--tasks", "vt"), "vt")
        assert not (tmp_path / "out" / "report.html").exists()


    def test_a_model_that_runs_as_stock_is_told(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else every method would score like the full cache."""
        monkeypatch.setattr("lukv_gguf.runtime.enabled", lambda _: False)
        result = run(model, "--methods", "uniform", "--lengths", 1100, "-n", 1, "-o", tmp_path / "out")
        assert_error(result, "does not support")


    def test_a_metric_that_does_not_run_natively(self, model: Path, profile: Path, tmp_path: Path) -> None:
        other = replace(choose_profile(profile, "keydiff"), metric="nothing")
        save_profiles(tmp_path / "other.npz", {"nothing": other})
        result = run(
            model, "--profile", tmp_path / "other.npz", "--lengths", 1100, "-n", 1, "--tasks", "niah_single_2", "-o", tmp_path
        )
        assert_error(result, "nothing", "lukv-gguf metrics")


class TestSession:
    def test_a_restored_state_goes_on_alike(self, model: Path) -> None:
        tokens = np.random.default_rng(0).integers(3, 299, 400).tolist()
        for policy in ("capacity", "prefill"):
            with Model(model, {"lukv.ratio": 0.25, "lukv.policy": policy}, ONE_THREAD) as loaded:
                with loaded.session(600) as session:
                    session.read(tokens)
                    session.commit()
                    state = session.save()
                    answers = []
                    for _ in range(2):
                        session.read([7, 8, 9])
                        answers.append(session.generate(20))
                        assert session.load(state)
                with loaded.session(600) as session:
                    session.read(tokens)
                    session.commit()
                    session.read([7, 8, 9])
                    assert [session.generate(20)] * 2 == answers

    def test_a_prefill_is_shared_truly_or_not_at_all(self, model: Path) -> None:
        """The state of another table, before its eviction, is refused or continues like a prefill of one's own."""
        tokens = np.random.default_rng(0).integers(3, 299, 400).tolist()
        with Model(model, {"lukv.ratio": 0.5, "lukv.policy": "prefill"}, ONE_THREAD) as loaded:
            with loaded.session(600) as session:
                session.read(tokens)
                state = session.save()
        answers = []
        with Model(model, {"lukv.ratio": 0.2, "lukv.policy": "prefill"}, ONE_THREAD) as loaded:
            for shared in (None, state):
                with loaded.session(600) as session:
                    if shared is None or not session.load(shared):
                        session.read(tokens)
                    session.commit()
                    session.read([7, 8, 9])
                    answers.append(session.generate(20))
        assert answers[0] == answers[1]

    def test_full_cache_cannot_take_a_budgeted_state(self, model: Path) -> None:
        with Model(model, {"lukv.ratio": 0.5}, ONE_THREAD) as loaded, loaded.session(300) as session:
            session.read([5] * 200)
            state = session.save()
        with Model(model, None, ONE_THREAD) as loaded, loaded.session(300) as session:
            assert not session.load(state)

    def test_logits_are_those_of_the_tokens(self, model: Path) -> None:
        tokens = list(range(3, 203))
        seen: dict[int, np.ndarray] = {}
        with Model(model, None, ONE_THREAD) as loaded:
            with loaded.session(300) as session:
                session.read(tokens, {0, 150, 199}, lambda i, logits: seen.__setitem__(i, logits.copy()))
            assert sorted(seen) == [0, 150, 199]
            with loaded.session(300) as session:
                session.read(tokens[:151])
                assert session.generate(1) == [int(seen[150].argmax())]

    def test_bad_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        with pytest.raises(LukvError, match="cannot load"):
            Model(tmp_path / "x.gguf")


class TestMethods:
    def test_names(self) -> None:
        assert Method.parse("lukv:blend=0+floor=0.2") == Method("lukv", floor=0.2, blend=0.0)
        for bad in ("x", "lukv:blend", "lukv:x=1", "full:blend=1", "lukv:blend=one"):
            with pytest.raises(LukvError):
                Method.parse(bad)

    def test_grid_always_has_the_full_cache(self) -> None:
        cells = grid(["uniform"], ["keydiff"], [0.1, 0.2], ["capacity"], ["f16", "q8_0"])
        assert [cell for cell in cells if cell.is_full] == [Cell("full", "", 1.0, "", kind) for kind in ("f16", "q8_0")]
        assert len(cells) == 6 and cells[0].is_full

    def test_tables_are_those_of_the_profile(self, model: Path, profile: Path) -> None:
        tables = Tables(model, profile)
        uniform = tables.table("uniform", "keydiff")
        np.testing.assert_allclose(uniform.budget, 0.2, atol=1e-6)
        plain, blended = tables.table("lukv:blend=0", "keydiff"), tables.table("lukv", "keydiff")
        assert plain.budget.std() > blended.budget.std() > 0
        assert (
            len(
                {
                    table_key(tables.table(name, "keydiff"))
                    for name in ("uniform", "pyramidkv", "adakv", "lukv", "lukv:blend=0")
                }
            )
            == 5
        )
        assert Tables(model, None).missing(["uniform", "lukv"], ["keydiff"]) == ["keydiff"]

    def test_an_embedded_table_is_used_as_it_is(self, model: Path, profile: Path, tmp_path: Path) -> None:
        table = Tables(model, profile).table("lukv", "keydiff")
        metadata.embed(model, tmp_path / "embedded.gguf", table)
        tables = Tables(tmp_path / "embedded.gguf", None)
        assert tables.missing(["lukv", "uniform"], ["keydiff"]) == [] and tables.missing(["adakv"], ["keydiff"]) == [
            "keydiff"
        ]
        np.testing.assert_allclose(tables.table("lukv", "keydiff").profile_budget, table.profile_budget, atol=1e-6)

    def test_exchanged_table_is_the_embedded_one(self, model: Path, profile: Path, tmp_path: Path) -> None:
        tables, file = Tables(model, profile), TableFile(model, tmp_path / "tables")
        for name in ("lukv", "uniform", "adakv", "lukv"):
            table = tables.table(name, "keydiff")
            file.select(table)
            found = metadata.read_metadata(file.path)
            np.testing.assert_array_equal(found.budget, table.budget)
            np.testing.assert_array_equal(found.profile_budget, table.profile_budget)
        other = build_metadata(Profile("keydiff", {}, 2, 8, GRID_RATIOS, np.broadcast_to(GRID_RATIOS[:, None, None], (99, N_LAYER, N_HEAD_KV)),
                                       np.zeros((N_LAYER, N_HEAD_KV)), {}))  # fmt: skip
        file.select(other)
        assert metadata.read_metadata(file.path).sink == 2
        file.close()
        assert not (tmp_path / "tables").exists()


class TestLanguageModelling:
    def test_everything_kept_is_the_full_cache(self, model: Path, tmp_path: Path) -> None:
        with Tokenizer(model) as tokenizer:
            (text,) = lm.make_texts(tokenizer, 600, 1, 0)
        assert text.length == 600 and text.n_context == 450
        with Model(model, None, ONE_THREAD) as loaded:
            reference = lm.read_full(loaded, text, "f16", tmp_path, ())
        with reference:
            full = lm.measure(loaded, text, Cell("full", "", 1.0, "", "f16"), reference, ())
            assert full["kl"]["score"] == 0.0 and full["top1"]["score"] == full["greedy"]["score"] == 1.0
            for policy in ("capacity", "prefill"):
                values = {}
                for ratio in (1.0, 0.3):
                    cell = Cell("uniform", "keydiff", ratio, policy, "f16")
                    with Model(model, cell.overrides(), ONE_THREAD) as loaded:
                        values[ratio] = lm.measure(loaded, text, cell, reference, ())
                assert values[1.0]["kl"]["score"] < 1e-3 and values[1.0]["greedy"]["score"] == 1.0
                assert values[1.0]["perplexity"]["score"] == pytest.approx(full["perplexity"]["score"], abs=1e-2)
                assert values[0.3]["kl"]["score"] > 0.05 and values[0.3]["top1"]["score"] < 1.0
                positions, curve = values[0.3]["kl"]["by_position"]
                assert positions == sorted(positions) and len(curve) == (12 if policy == "capacity" else 4)
                if policy == "capacity":
                    assert curve[0] < 1e-3  # before anything was evicted
        assert not list(tmp_path.iterdir())


def record(score: float, context: int, method: str = "lukv", **changes: Any) -> dict[str, Any]:
    fields = dict(
        zip(KEY, ("m", "qa_1", 1024, context, "", 0, 0, False, 512, method, "keydiff", 0.2, "capacity", "f16", ""))
    )
    if method == "full":
        fields |= {"metric": "", "ratio": 1.0, "policy": ""}
    work = {"kv_bytes": 1, "n_read": 10, "read_seconds": 2.0, "n_generated": 0, "generate_seconds": 0.0}
    return {**fields, "score": score, "depth": None, **work, **changes}


class TestResults:
    def test_differences_are_paired(self) -> None:
        """Scores that vary from context to context alike: the difference is certain, the scores are not."""
        scores = np.random.default_rng(0).random(30)
        records = [
            record(score + gain, i, method)
            for i, score in enumerate(scores)
            for method, gain in (("uniform", 0.0), ("lukv", 0.1))
        ]
        found = {one["method"]: one for one in summarise(records, "m")}
        assert found["lukv"]["vs_uniform"]["difference"] == pytest.approx(0.1)
        np.testing.assert_allclose(found["lukv"]["vs_uniform"]["interval"], 0.1, atol=1e-9)
        low, high = found["lukv"]["interval"]
        assert high - low == pytest.approx(2 * 1.96 * scores.std() / np.sqrt(30), rel=0.15)
        assert found["lukv"]["read_tps"] == 5.0 and found["lukv"]["generate_tps"] is None

    def test_contexts_are_drawn_with_their_questions(self) -> None:
        records = [record(float(i % 2), i, question=j) for i in range(20) for j in range(5)]
        (found,) = summarise(records, "m")
        assert found["n"] == 100 and found["contexts"] == 20
        assert found["interval"][1] - found["interval"][0] > 0.35  # as of 20 draws, not of 100

    def test_averages_and_perplexity(self) -> None:
        records = [record(1.0, 0), record(0.0, 0, task="vt"), record(np.log(8.0), 0, task="lm_perplexity")]
        found = {one["task"]: one["score"] for one in summarise(records, "m")}
        assert found["ruler_average"] == 0.5 and found["lm_perplexity"] == pytest.approx(8.0)


class TestStore:
    def test_a_torn_line_is_cut_off(self, tmp_path: Path) -> None:
        with Store(tmp_path / "a.jsonl") as store:
            store.add(record(0.5, 1))
        with (tmp_path / "a.jsonl").open("ab") as file:
            file.write(b'{"torn": ')
        with Store(tmp_path / "a.jsonl") as store:
            assert store.get(record(0.0, 1))["score"] == 0.5 and store.get(record(0.0, 2)) is None
            store.add(record(0.7, 2))
        assert [json.loads(line)["score"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [0.5, 0.7]

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        with Store(tmp_path / "a.jsonl"), pytest.raises(LukvError, match="another evaluation"):
            Store(tmp_path / "a.jsonl")

    def test_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("hello\n")
        with pytest.raises(LukvError, match="line 1"):
            Store(tmp_path / "a.jsonl")
        (tmp_path / "b").write_text("")
        with pytest.raises(LukvError, match="cannot write"):
            Store(tmp_path / "b" / "a.jsonl")


class Page(html.parser.HTMLParser):
    """Collects tags that are open, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    records = [
        record(float((i + len(method)) % 2), i, method, task=task, depth=0.1 * i)
        for i in range(8) for method in ("full", "uniform", "lukv", "lukv:blend=0") for task in ("qa_1", "niah_single_1", "lm_kl")
    ]  # fmt: skip
    found = summarise(records, "a <model>")
    drawn = report.pictures(found, records)
    report.write_page(tmp_path / "page.html", found, drawn, "a <model>", {"seed": "0"})
    source = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(source[source.index("<html") :])
    assert page.open == [] and all(
        name in page.text for name in ("a <model>", "LU-KV (blend=0)", "full cache", "KL to full")
    )
    assert "src=" not in source and "<link" not in source and len(drawn) >= 5
    report.write_pictures(tmp_path, drawn)
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_model_key_sees_through_tables(model: Path, profile: Path, tmp_path: Path) -> None:
    metadata.embed(model, tmp_path / "embedded.gguf", Tables(model, profile).table("lukv", "keydiff"))
    write_tiny(tmp_path / "other.gguf", n_layer=N_LAYER, n_head_kv=N_HEAD_KV, seed=1)
    assert (
        run_module.model_key(tmp_path / "embedded.gguf")
        == run_module.model_key(model)
        != run_module.model_key(tmp_path / "other.gguf")
    )


def test_variants_of_a_profile_keep_the_ratio(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    query_budget = rng.dirichlet(np.ones(N_LAYER * N_HEAD_KV), (5, 99)).reshape(5, 99, N_LAYER, N_HEAD_KV)
    query_budget = np.minimum(1.0, query_budget * GRID_RATIOS[:, None, None] * N_LAYER * N_HEAD_KV)
    solved = apply_floor_and_blend(query_budget.mean(axis=0), GRID_RATIOS)
    marginal = -np.sort(-rng.random((N_LAYER, N_HEAD_KV, 300)).astype(np.float32) ** 3, axis=-1)
    marginal[0] *= 5  # the first layer matters most
    made = Profile(
        "keydiff", {}, 4, 16, GRID_RATIOS, solved, np.zeros((N_LAYER, N_HEAD_KV)), {},
        marginal=marginal, query_budget=query_budget.astype(np.float32),
    )  # fmt: skip
    save_profiles(tmp_path / "p.npz", {"keydiff": made})
    script = Path(__file__).parent.parent / "scripts" / "ablate_profile.py"
    subprocess.run([sys.executable, script, tmp_path / "p.npz", "-o", tmp_path], check=True, capture_output=True)
    for name in ("curves", "q75", "q90", "root"):
        budget = choose_profile(tmp_path / f"{name}.npz", None).budget
        np.testing.assert_allclose(budget.mean(axis=(1, 2)), GRID_RATIOS, atol=2e-3)
        assert budget[19].std() > 0.01
    curves = choose_profile(tmp_path / "curves.npz", None).budget
    assert curves[19, 0].min() > curves[19, 1:].max()


def test_divergence_of_the_answers(model: Path, profile: Path) -> None:
    """A cache that keeps everything answers alike; one that keeps a fifth does not."""
    script = Path(__file__).parent.parent / "scripts" / "eval_divergence.py"
    command = [sys.executable, script, model, "--profile", profile, "--tasks", "niah_single_1,niah_single_2", "--length", "500", "-n", "1"]
    for ratio, is_zero in (("1", True), ("0.2", False)):
        done = subprocess.run([*command, "--ratio", ratio], check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
        rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "keydiff, " in line]
        assert [row[0].strip() for row in rows] == ["keydiff, uniform", "keydiff, profile"]
        assert all((float(value) == 0.0) == is_zero for row in rows for value in row[1:])
    done = subprocess.run([*command, "--tasks", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("eval_divergence: error: unknown task 'nonsense'; known: niah_single_1")
