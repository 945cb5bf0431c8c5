"""llama-server on loopback: whatever people do with its slots works with budgets per head."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_native import metadata, random_tokens, uneven_budget
from tiny_gguf import TinyModel, write_tiny

from lukv_gguf import runtime
from lukv_gguf.metadata import embed

N_CTX, N_TRAINED, N_UBATCH = 256, 1024, 64
RATIO = 0.25
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")  # no rounding that depends on how tokens are batched
FULL = ("--override-kv", "lukv.ratio=float:1.0", *EXACT)
Start = Callable[..., "Server"]


class Server:
    """A running llama-server."""

    def __init__(self, model: Path, *options: object, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = [runtime.program("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", self.port]
        command += ["-c", N_CTX, "-ub", N_UBATCH, "-b", 2 * N_UBATCH, "-t", 1, "--no-webui", "--no-warmup", "-fit", "off"]
        with log.open("w") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self._process = subprocess.Popen([str(part) for part in [*command, *options]], **streams)

    def wait(self) -> None:
        """Return when it answers."""
        while self._process.poll() is None:
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError(f"llama-server ended with {self._process.returncode}:\n{self.log.read_text()}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def get(self, path: str) -> str:
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return json.loads(self._open(request))

    def complete(self, prompt: list[int] | str, n: int = 16, **body: Any) -> dict[str, Any]:
        """Greedy completion; the field ``tokens`` holds what was generated."""
        options = {"n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": True}
        return self.post("/completion", prompt=prompt, **(options | body))

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by the names without their prefix."""
        return {name: float(value) for name, value in re.findall(r"^llamacpp:(\w+) (\S+)$", self.get("/metrics"), re.M)}

    @staticmethod
    def _open(request: urllib.request.Request) -> str:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> TinyModel:
    return write_tiny(folder / "plain.gguf", n_layer=3, d_head=64, n_ctx=N_TRAINED)


@pytest.fixture(scope="module")
def embedded(tiny: TinyModel, folder: Path) -> Path:
    path = folder / "lukv.gguf"
    embed(tiny.path, path, metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO), RATIO))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers, and stop them after the test."""
    running: list[Server] = []

    def start_one(model: Path, *options: object) -> Server:
        running.append(Server(model, *options, log=tmp_path / f"server-{len(running)}.log"))
        running[-1].wait()
        return running[-1]

    yield start_one
    for server in running:
        server.stop()


def test_metrics_and_slots(start: Start, embedded: Path, tiny: TinyModel) -> None:
    server = start(embedded, "--metrics", "--slots", "--parallel", 1)
    heads = tiny.n_layer * tiny.n_head_kv
    before = server.metrics()
    assert before["lukv_evictions_total"] == before["lukv_cells_evicted_total"] == before["lukv_cells_used"] == 0
    assert before["lukv_ratio"] == pytest.approx(RATIO)
    assert before["lukv_cells_owned"] == pytest.approx(RATIO * N_CTX * heads, abs=heads)
    server.complete(random_tokens(20), n=4)
    assert server.metrics()["lukv_cells_used"] == heads * (20 + 4 - 1)  # the last token is never read

    server.complete(random_tokens(200, seed=1), n=100)
    after = server.metrics()
    assert after["lukv_evictions_total"] >= 3
    assert after["lukv_cells_evicted_total"] >= 300 * heads - after["lukv_cells_owned"] - N_UBATCH * heads
    assert 0 < after["lukv_cells_used"] <= after["lukv_cells_owned"] + N_UBATCH * heads
    cell = 2 * tiny.d_head * 2  # K and V, f16
    assert after["lukv_bytes"] >= after["lukv_cells_owned"] * cell
    assert after["lukv_bytes"] < after["lukv_bytes_full"] == N_CTX * heads * cell
    (slot,) = json.loads(server.get("/slots"))
    assert slot["n_ctx"] == N_TRAINED  # positions are the limit, not cells
    assert slot["lukv"] == {"n_cells_used": after["lukv_cells_used"], "n_cells_owned": after["lukv_cells_owned"]}


def test_a_stock_cache_has_no_such_metrics(start: Start, tiny: TinyModel) -> None:
    server = start(tiny.path, "--metrics", "--slots", "--parallel", 1)
    server.complete(random_tokens(20), n=4)
    assert not [name for name in server.metrics() if name.startswith("lukv")]
    (slot,) = json.loads(server.get("/slots"))
    assert slot["n_ctx"] == N_CTX and "lukv" not in slot


class TestPastTheContext:
    """A bounded cache has room for sequences of any length; the model's trained context is the limit."""

    def test_prompt_and_answer(self, start: Start, embedded: Path) -> None:
        server = start(embedded, "--parallel", 1)
        answer = server.complete(random_tokens(2 * N_CTX), n=N_CTX)
        assert len(answer["tokens"]) == N_CTX and answer["tokens_evaluated"] == 2 * N_CTX and not answer["truncated"]

    def test_until_the_trained_context(self, start: Start, embedded: Path) -> None:
        server = start(embedded, "--parallel", 1)
        answer = server.complete(random_tokens(N_CTX), n=-1)
        assert answer["truncated"] and N_TRAINED - N_CTX - 2 <= len(answer["tokens"]) <= N_TRAINED - N_CTX
        with pytest.raises(urllib.error.HTTPError) as error:
            server.complete(random_tokens(N_TRAINED))
        assert error.value.code == 400 and "exceeds the available context size" in error.value.read().decode()

    def test_stock_and_prefill_stop_there(self, start: Start, embedded: Path, tiny: TinyModel) -> None:
        for model, options in ((tiny.path, ()), (embedded, ("--override-kv", "lukv.policy=str:prefill"))):
            server = start(model, "--parallel", 1, *options)
            answer = server.complete(random_tokens(200), n=100)
            assert answer["truncated"] and len(answer["tokens"]) < 60
            with pytest.raises(urllib.error.HTTPError):
                server.complete(random_tokens(N_CTX))

    def test_llama_cli(self, embedded: Path) -> None:
        command = [runtime.program("llama-cli"), "-m", embedded, "-c", str(N_CTX), "-ub", str(N_UBATCH), "-t", "1"]
        command += ["-p", "w1 w2 w3", "-n", str(2 * N_CTX), "--ignore-eos", "-st", "--temp", "0", "-fit", "off", "-np", "1"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
        assert done.returncode == 0
        assert len(re.findall(rb"w\d|[^ -~]", done.stdout)) > 3 * N_CTX / 2  # words, and bytes that are no text


def test_regenerate_and_edit(start: Start, embedded: Path, tiny: TinyModel) -> None:
    """A prompt that was read already, and one with another end, are read from where they differ."""
    prompt = random_tokens(150)
    edited = prompt[:100] + random_tokens(50, seed=1)
    stock, full = start(tiny.path, *EXACT, "--parallel", 1), start(embedded, *FULL, "--parallel", 1)
    for tokens in (prompt, prompt, edited, prompt):
        want, got = stock.complete(tokens), full.complete(tokens)
        assert got["tokens"] == want["tokens"]
        assert got["timings"]["cache_n"] == want["timings"]["cache_n"]
    server = start(embedded, "--parallel", 1)
    cached = [server.complete(tokens)["timings"]["cache_n"] for tokens in (prompt, prompt, edited)]
    assert cached == [0, 149, 100]


def test_slots_are_saved_and_restored(start: Start, embedded: Path, tmp_path: Path) -> None:
    """A restored slot goes on as if nothing had happened, although cells were evicted before."""
    options = ("--parallel", 1, "--slot-save-path", tmp_path)
    prompt, more = random_tokens(200), random_tokens(30, seed=1)
    server = start(embedded, *options)
    first = server.complete(prompt, n=32)["tokens"]
    saved = server.post("/slots/0?action=save", filename="slot.bin")
    assert saved["n_saved"] == 200 + 32 - 1
    following = prompt + first[:-1] + more
    want = server.complete(following, n=32)

    other = start(embedded, *options)
    other.complete(random_tokens(90, seed=2))
    assert other.post("/slots/0?action=restore", filename="slot.bin")["n_restored"] == 231
    got = other.complete(following, n=32)
    assert got["tokens"] == want["tokens"]
    assert got["timings"]["cache_n"] == want["timings"]["cache_n"] == 231

    third = start(embedded, *options, "--override-kv", "lukv.ratio=float:0.5")  # another table
    with pytest.raises(urllib.error.HTTPError) as error:
        third.post("/slots/0?action=restore", filename="slot.bin")
    assert error.value.code == 400
    assert third.complete(prompt)["timings"]["cache_n"] == 0


def test_prompts_are_cached_in_memory(start: Start, embedded: Path) -> None:
    """A conversation that another one pushed out of its slot comes back from the server's prompt cache."""
    first, second = random_tokens(180), random_tokens(150, seed=1)
    alone, server = start(embedded, "--parallel", 1), start(embedded, "--parallel", 1, "--cache-ram", 64)
    begun = alone.complete(first)["tokens"]
    following = first + begun[:-1] + random_tokens(20, seed=2)
    want = alone.complete(following)
    assert server.complete(first)["tokens"] == begun
    server.complete(second)
    got = server.complete(following)
    assert got["timings"]["cache_n"] == want["timings"]["cache_n"] == 180 + 16 - 1
    assert got["tokens"] == want["tokens"]


def test_grammar(start: Start, embedded: Path) -> None:
    server = start(embedded, "--parallel", 1)
    answer = server.complete(random_tokens(200), n=60, grammar="root ::= ([a-f]+ [0-9]){20} [a-z]*")
    assert re.fullmatch("([a-f]+[0-9])+[a-f]*[a-z]*", answer["content"]) and len(answer["tokens"]) == 60


def test_a_draft_model_changes_nothing(start: Start, embedded: Path, tiny: TinyModel) -> None:
    """Drafts are verified in batches, and the rejected tokens removed again."""
    draft = ("-md", tiny.path, "--spec-type", "draft-simple", "--spec-draft-n-max", 6)
    prompt = random_tokens(100)
    want = start(embedded, *FULL, "--parallel", 1).complete(prompt, n=60)["tokens"]
    got = start(embedded, *FULL, "--parallel", 1, *draft).complete(prompt, n=60)
    assert got["tokens"] == want
    assert got["timings"]["draft_n_accepted"] > 20  # the same model guesses well
    evicting = start(embedded, "--parallel", 1, "--metrics", *draft)
    answer = evicting.complete(prompt, n=60)
    assert len(answer["tokens"]) == 60 and 0 < answer["timings"]["draft_n_accepted"] < answer["timings"]["draft_n"]
    assert evicting.metrics()["lukv_evictions_total"] > 0


def write_lora(path: Path, tiny: TinyModel, rank: int = 4) -> Path:
    """An adapter of all query and value projections, with random weights."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, tiny.arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for name, weight in tiny.tensors.items():
        if re.fullmatch(r"blk\.\d+\.attn_[qv]\.weight", name):
            n_out, n_in = weight.shape
            writer.add_tensor(f"{name}.lora_a", (rng.standard_normal((rank, n_in)) / np.sqrt(n_in)).astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", (rng.standard_normal((n_out, rank)) / np.sqrt(rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lora(start: Start, embedded: Path, tiny: TinyModel, tmp_path: Path) -> None:
    lora = ("--lora", write_lora(tmp_path / "lora.gguf", tiny))
    prompt = random_tokens(100)
    plain = start(tiny.path, *EXACT, "--parallel", 1).complete(prompt)["tokens"]
    want = start(tiny.path, *EXACT, "--parallel", 1, *lora).complete(prompt)["tokens"]
    assert start(embedded, *FULL, "--parallel", 1, *lora).complete(prompt)["tokens"] == want != plain
    server = start(embedded, "--parallel", 1, *lora)
    adapted = server.complete(random_tokens(250))["tokens"]
    without = server.complete(random_tokens(250), lora=[{"id": 0, "scale": 0.0}])
    assert without["tokens"] != adapted and without["timings"]["cache_n"] == 0  # another adapter, another cache


def test_embeddings(start: Start, embedded: Path, tiny: TinyModel) -> None:
    options = ("--parallel", 1, "--embedding", "--pooling", "mean")
    servers = ((tiny.path, EXACT), (embedded, FULL), (embedded, EXACT))
    stock, full, server = (start(model, *options, *more) for model, more in servers)
    for n in (20, 60, 20):
        found = [s.post("/embedding", content=random_tokens(n))[0]["embedding"] for s in (stock, full, server)]
        want, got, bounded = map(np.ravel, found)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(bounded, want, atol=1e-5)  # nothing is evicted within a ubatch


class TestParallel:
    """Several sequences in one cache."""

    def test_requests_at_once_are_answered_as_one_by_one(self, start: Start, embedded: Path) -> None:
        prompts = [random_tokens(n, seed=n) for n in (40, 25, 55, 30)]
        server = start(embedded, *FULL, "--parallel", 4, "--kv-unified")
        alone = [server.complete(prompt, n=20, id_slot=0, cache_prompt=False)["tokens"] for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                together = list(pool.map(lambda prompt: server.complete(prompt, n=20, cache_prompt=False)["tokens"], prompts))
                assert together == alone

    def test_all_of_them_evict(self, start: Start, embedded: Path) -> None:
        server = start(embedded, "--metrics", "--slots")  # four slots by default
        assert "LU-KV is off" not in server.log.read_text()
        prompts = [random_tokens(n, seed=n) for n in (200, 90, 150, 300)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, n=80), prompts))
        assert [len(answer["tokens"]) for answer in answers] == [80] * 4
        found, slots = server.metrics(), json.loads(server.get("/slots"))
        assert found["lukv_evictions_total"] > 0
        assert found["lukv_cells_used"] <= found["lukv_cells_owned"] + 4 * 6 * N_UBATCH  # each slot has tokens in flight
        assert sum(slot["lukv"]["n_cells_used"] for slot in slots) == found["lukv_cells_used"]
        assert all(0 < slot["lukv"]["n_cells_owned"] < found["lukv_cells_owned"] for slot in slots)

    def test_a_saved_slot_goes_on_in_another(self, start: Start, embedded: Path, tmp_path: Path) -> None:
        prompt, more = random_tokens(60), random_tokens(10, seed=1)
        server = start(embedded, *FULL, "--slot-save-path", tmp_path)
        following = prompt + server.complete(prompt, id_slot=0)["tokens"][:-1] + more
        assert server.post("/slots/0?action=save", filename="slot.bin")["n_saved"] == 60 + 16 - 1
        want = server.complete(following, id_slot=0)
        server.complete(random_tokens(40, seed=2), id_slot=2)
        assert server.post("/slots/2?action=restore", filename="slot.bin")["n_restored"] == 75
        got = server.complete(following, id_slot=2)
        assert got["tokens"] == want["tokens"] and got["timings"]["cache_n"] == want["timings"]["cache_n"] == 75
        assert server.post("/slots/2?action=erase")["n_erased"] > 0
        assert server.complete(following, id_slot=0)["tokens"] == want["tokens"]

    @pytest.mark.parametrize("options", [FULL, ()], ids=["full", "evicting"])
    def test_several_answers_to_one_prompt(self, start: Start, embedded: Path, options: tuple[str, ...]) -> None:
        """The prompt is read once, and its cells are copied to the other slots."""
        server = start(embedded, "--metrics", *options)
        answers = server.complete(random_tokens(50), n=30, n_cmpl=3)  # copies do not share cells: 240 in all
        assert len(answers) == 3 and {len(answer["tokens"]) for answer in answers} == {30}
        assert len({tuple(answer["tokens"]) for answer in answers}) == 1  # greedy, so all the same
        assert server.metrics()["prompt_tokens_total"] == 50

    def test_metrics_while_it_decodes(self, start: Start, embedded: Path) -> None:
        server = start(embedded, "--metrics", "--slots")
        with ThreadPoolExecutor(4) as pool:
            busy = [pool.submit(server.complete, random_tokens(150, seed=n), n=200) for n in range(4)]
            evictions = []
            while not all(request.done() for request in busy):
                evictions.append(server.metrics()["lukv_evictions_total"])
                assert len(json.loads(server.get("/slots"))) == 4
        assert evictions == sorted(evictions) and len(set(evictions)) > 3
        assert all(len(request.result()["tokens"]) == 200 for request in busy)
