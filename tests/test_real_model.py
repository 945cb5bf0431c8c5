"""The whole way on SmolLM2-135M: embed with the defaults, then what a user does with the result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from llama_cpp import Llama

from lukv_gguf import runtime
from lukv_gguf.cli import cli
from lukv_gguf.evaluate.needles import Method, ask, make_contexts
from lukv_gguf.reference.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def embedded(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "smollm2-lukv.gguf"
    run("embed", smollm2, "--ratio", "0.2", "-o", path)
    return path


def test_embedded_file_is_the_same_model(smollm2: Path, embedded: Path, tmp_path: Path) -> None:
    original, copy = GGUFReader(smollm2), GGUFReader(embedded)
    assert [tensor.name for tensor in copy.tensors] == [tensor.name for tensor in original.tensors]
    for a, b in zip(original.tensors, copy.tensors):
        assert a.data.tobytes() == b.data.tobytes()

    described = json.loads(run("inspect", embedded, "--json"))
    budget = np.array(described["budget"])
    assert budget.shape == (30, 3) and abs(budget.mean() - 0.2) < 1e-3
    assert budget.max() > 5 * budget.min()
    assert "head 0" in run("inspect", embedded)

    run("strip", embedded, "-o", tmp_path / "stripped.gguf")
    assert (tmp_path / "stripped.gguf").read_bytes() == smollm2.read_bytes()


def test_chat_of_several_turns(embedded: Path) -> None:
    llama = Llama(model_path=str(embedded), n_ctx=8192, n_threads=2, flash_attn=True, verbose=False)
    messages = []
    for text in ("My name is Ada and I keep bees.", "What do I keep?", "Say it in one word."):
        messages.append({"role": "user", "content": text})
        answer = llama.create_chat_completion(messages, max_tokens=32, temperature=0.0)["choices"][0]["message"]
        assert answer["content"].strip()
        messages.append(answer)
    usage = runtime.usage(llama)
    assert usage.used.shape == (30, 3) and (usage.used <= usage.owned + usage.recent).all()


@pytest.mark.parametrize(("n_ctx", "limit"), [(8192, 0.27), (32768, 0.22)])
def test_memory(embedded: Path, n_ctx: int, limit: float) -> None:
    options = dict(n_ctx=n_ctx, n_batch=512, n_ubatch=512, flash_attn=True, verbose=False)
    lukv = Llama(model_path=str(embedded), **options)
    stock = Llama(model_path=str(embedded), kv_overrides={"lukv.enabled": False}, **options)
    assert runtime.memory_size(lukv) <= limit * runtime.memory_size(stock)


def test_long_prompt_and_bench(embedded: Path) -> None:
    """A prompt as long as the context passes through the small cache, in less memory than stock's."""
    fields = json.loads(run("bench", embedded, "--n-ctx", 8192, "--depth", 8000, "--n-gen", 16, "--json"))
    assert fields["kv_bytes_lukv"] <= 0.27 * fields["kv_bytes_stock"]
    saved = fields["kv_bytes_stock"] - fields["kv_bytes_lukv"]
    assert fields["peak_rss_stock"] - fields["peak_rss_lukv"] > 0.5 * saved
    assert all(fields[f"{kind}_tps_{side}"] > 0 for kind in ("prefill", "decode") for side in ("stock", "lukv"))
    assert fields["decode_tps_stock_same_cells"] > 0


def test_needles_survive_where_uniform_budgets_lose_them(smollm2: Path, embedded: Path) -> None:
    contexts = list(make_contexts(Tokenizer(smollm2).encode, 8, 3, 1400, seed=0))

    def score(model: Path, policy: str) -> float:
        overrides = {"lukv.ratio": 0.2, "lukv.policy": policy}
        return float(np.mean(np.concatenate(ask(Method(policy, model, overrides), contexts))))

    for policy in ("prefill", "capacity"):
        assert score(embedded, policy) >= score(smollm2, policy) + 0.1


def test_evaluation_of_the_embedded_model(embedded: Path, tmp_path: Path) -> None:
    """From 20 % of the cache, LU-KV predicts prose more like the full cache than uniform budgets do."""
    out = run("eval", embedded, "--suite", "lm", "--lengths", 768, "-n", 1, "--methods", "uniform,lukv", "--policies", "capacity",
              "-o", tmp_path, "--json", "-")  # fmt: skip
    divergence = {one["method"]: one["score"] for one in json.loads(out)["results"] if one["task"] == "lm_kl"}
    assert divergence["full"] == 0.0 and 0.0 < divergence["lukv"] < divergence["uniform"]
