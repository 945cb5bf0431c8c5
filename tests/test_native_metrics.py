"""Every metric of the native cache against the one in Python: the same cells stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama
from scorers import random_scorer
from sequences import Context
from test_native import (
    QUANTISED,
    RECENT,
    SINK,
    assert_same_positions,
    damaged,
    feed,
    load,
    metadata,
    nmse,
    uneven_budget,
)
from tiny_gguf import TinyModel, write_tiny

from lukv_gguf import metrics, runtime
from lukv_gguf.gguf_header import encode_pair, read_header, rewrite
from lukv_gguf.metadata import embed
from lukv_gguf.reference import ReferenceModel
from lukv_gguf.reference.bounded import BoundedDecoder, BoundedSequences, cells_for

NATIVE = [name for name in metrics.names() if metrics.get(name).native and "capacity" in metrics.get(name).policies]
CARRYING = ["snapkv:carry=1", "criticalkv-cake:carry=1"]
AVERAGING = ["h2o:average=1"]
SHARING = ["keydiff-expectedattention:share=0.3:covariance=1"]
SMALL = {"window": 16, "future": 64, "seed": 3}  # of the parameters that a metric has
N_VOCAB = 900


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("metrics") / "tiny.gguf"
    return write_tiny(path, n_layer=2, n_head=6, n_head_kv=2, d_head=64, n_ctx=4096, n_vocab=N_VOCAB)


def small(text: str, tiny: TinyModel) -> metrics.Metric:
    given = metrics.parse(text)
    params = {**given.params, **{key: SMALL[key] for key in SMALL if key in given.params}}
    return metrics.get(given.name, random_scorer(tiny.n_layer, tiny.n_head_kv, tiny.d_head, SMALL["window"]), **params)


def keys_of(metric: metrics.Metric) -> dict:
    """Fields of the metadata that a metric decides."""
    return {"metric": metric.name, "metric_params": metric.params, "scorer": getattr(metric, "scorer", None)}


def embedded(tiny: TinyModel, name: str, ratio: float = 0.25) -> Path:
    """The model with uneven budgets for a metric."""
    path, metric = tiny.path.with_name(f"{name}-{ratio}.gguf"), small(name, tiny)
    meta = metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, ratio), ratio)
    embed(tiny.path, path, replace(meta, **keys_of(metric)))
    return path


def reference(tiny: TinyModel, name: str, owned: np.ndarray, n_recent: int) -> BoundedDecoder:
    model = ReferenceModel.load(tiny.path)
    return BoundedDecoder(model, small(name, tiny), owned, n_recent=n_recent, sink=SINK, recent=RECENT)


def distinct_tokens(n: int, seed: int = 0) -> list[int]:
    """No two alike: the same token may have the same score, and either of two may go then."""
    return np.random.default_rng(seed).permutation(np.arange(3, N_VOCAB - 1))[:n].tolist()


def cells(model: Llama) -> list[set[int]]:
    return [set(runtime.positions(model, *i).tolist()) for i in np.ndindex(runtime.usage(model).used.shape)]


@pytest.mark.parametrize("name", NATIVE + CARRYING + AVERAGING + SHARING)
def test_same_cells_as_the_reference(tiny: TinyModel, name: str) -> None:
    """Several commits during the prompt, then while tokens are generated."""
    model = load(embedded(tiny, name))
    usage = runtime.usage(model)
    assert usage.owned.max() > 20 * usage.owned.min()
    expected = reference(tiny, name, usage.owned, usage.recent)

    tokens = distinct_tokens(600)
    for size in (128, 128, 128, 70, 3, 30, 30, 1, 1, 31, 32, 1, 1, 16):
        batch, tokens = tokens[:size], tokens[size:]
        assert nmse(feed(model, batch), expected.decode(batch).numpy()) < 1e-7
        assert_same_positions(model, expected, usage.owned.shape)
    assert runtime.usage(model).evictions >= 5


@pytest.mark.parametrize("name", ["snapkv", "expectedattention", "criticalkv-cake", "curdkv", "foresight", "h2o", "keydiff", "keydiff-expectedattention"])
def test_prefill_equals_reference(tiny: TinyModel, name: str) -> None:
    model = load(embedded(tiny, name), {"lukv.policy": "prefill"})
    expected = reference(tiny, name, np.full((tiny.n_layer, tiny.n_head_kv), 768), 128)
    prompt = distinct_tokens(300)
    feed(model, prompt)
    for first in (0, 128, 256):
        expected.decode(prompt[first : first + 128], bounded=False)
    runtime.commit(model)
    kept = runtime.usage(model).used
    assert kept.max() < 300
    expected.commit(kept)
    assert_same_positions(model, expected, kept.shape)


@pytest.mark.parametrize("name", ["snapkv", "expectedattention", "foresight", "h2o"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "granite", "smollm3", "starcoder2", "command-r"])
def test_queries_of_architectures(tmp_path: Path, arch: str, name: str) -> None:
    """Whatever happens to queries: RoPE of pairs or halves or of a part, factors, scales, norms, layers without RoPE."""
    options = {"rope_freqs": True} if arch == "llama" else {"rope_factors": True} if arch == "phi3" else {}
    tiny = write_tiny(tmp_path / "tiny.gguf", arch, n_layer=4, n_head=4, d_head=64, n_vocab=N_VOCAB, **options)
    model = load(embedded(tiny, name))
    usage = runtime.usage(model)
    expected = reference(tiny, name, usage.owned, usage.recent)
    tokens = distinct_tokens(385)
    for batch in (tokens[:128], tokens[128:256], tokens[256:384], tokens[384:]):
        feed(model, batch)
        expected.decode(batch)
    n_same = n_all = 0
    for layer, head in np.ndindex(usage.owned.shape):
        want = expected.positions(layer, head)
        n_same += len(np.intersect1d(runtime.positions(model, layer, head), want))
        n_all += len(want)
    assert n_same >= 0.998 * n_all and runtime.usage(model).evictions >= 2


@pytest.mark.parametrize("name", ["snapkv", "expectedattention", "capkv", "criticalkv-snapkv", "foresight", "h2o", "keydiff", "keydiff-expectedattention"])
def test_quantised_evicts_like_f32(tiny: TinyModel, name: str) -> None:
    """Quantised K and V are rotated, and what is kept of the queries has to fit that."""
    path = embedded(tiny, name)
    exact, quantised = load(path, flash_attn=True), load(path, kv_type=QUANTISED["q8_0"], flash_attn=True)
    tokens = distinct_tokens(300)
    assert nmse(feed(quantised, tokens), feed(exact, tokens)) < 0.05
    kept = cells(exact), cells(quantised)
    assert runtime.usage(exact).evictions == runtime.usage(quantised).evictions > 0
    assert sum(len(a & b) for a, b in zip(*kept)) >= 0.93 * sum(map(len, kept[0]))


@pytest.mark.parametrize("name", ["expectedattention", "criticalkv-cake:carry=1", "criticalkv-h2o", "keydiff"])
def test_state_and_tail(tiny: TinyModel, name: str) -> None:
    """What the metric keeps is saved and restored, and forgets the queries and new keys of a removed tail."""
    path = embedded(tiny, name)
    model = load(path)
    usage = runtime.usage(model)
    expected = reference(tiny, name, usage.owned, usage.recent)
    tokens = distinct_tokens(700)
    for batch in (tokens[:128], tokens[128:256], tokens[256:300]):
        feed(model, batch)
        expected.decode(batch)
    model._ctx.kv_cache_seq_rm(0, 290, -1)
    model.n_tokens = 290
    expected.truncate(290)
    state = model.save_state()

    other = load(path)
    feed(other, distinct_tokens(200, seed=1))
    other.load_state(state)
    for continued in (model, other):
        for batch in (tokens[300:428], tokens[428:556], tokens[556:560]):
            feed(continued, batch)
    for batch in (tokens[300:428], tokens[428:556], tokens[556:560]):
        expected.decode(batch)
    for continued in (model, other):
        assert_same_positions(continued, expected, usage.owned.shape)


@pytest.mark.parametrize("name", ["snapkv", "expectedattention", "criticalkv-snapkv:carry=1", "foresight", "h2o", "criticalkv-h2o", "keydiff", "keydiff-expectedattention"])
def test_sequences_have_queries_of_their_own(tiny: TinyModel, name: str) -> None:
    """Together in a batch, copied, removed in part, and a new one in the place of an old one."""
    budget, tokens = uneven_budget(tiny.n_layer, tiny.n_head_kv, 0.25), distinct_tokens(800)
    plain = BoundedSequences(
        ReferenceModel.load(tiny.path), small(name, tiny), lambda n: cells_for(budget, 0.25, n, n_min=SINK + RECENT),
        size=768, n_recent=128, n_sequences=3, sink=SINK, recent=RECENT,
    )  # fmt: skip
    with Context(embedded(tiny, name), n_ctx=768, n_seq_max=3) as context:

        def step(**sizes: int) -> None:
            batch = {}
            for key, size in sizes.items():
                sequence = int(key[1:])
                first = (200 * sequence + context.length(sequence)) % 500
                batch[sequence] = tokens[first : first + size]
            got, want = context.decode(batch), plain.decode(batch)
            for sequence in batch:  # long batches: flash attention keeps K and V in f16
                assert nmse(got[sequence], want[sequence].numpy()) < 1e-4
            for sequence, length in plain.lengths.items():
                assert context.length(sequence) == length
                for layer, head in np.ndindex(budget.shape):
                    np.testing.assert_array_equal(
                        runtime.positions(context.ctx, layer, head, sequence), plain.positions(sequence, layer, head)
                    )

        step(s0=128)
        step(s1=128)
        step(s0=128)
        for _ in range(5):
            step(s0=16, s1=16)
        context.copy(0, 2)
        plain.copy(0, 2)
        for _ in range(5):
            step(s0=8, s1=8, s2=8)
        for place in (context.remove, plain.truncate):
            place(1, 190)
        step(s1=100)
        context.remove(0)
        plain.truncate(0, 0)
        for _ in range(3):
            step(s0=32)
        step(s0=64)
        assert runtime.usage(context.ctx).evictions > 3


@pytest.mark.parametrize("name", NATIVE + CARRYING)
def test_memory_is_counted(tiny: TinyModel, name: str) -> None:
    def measure(path: Path) -> tuple[int, int]:
        model = load(path)
        return runtime.usage(model).bytes, runtime.memory_size(model)

    plain, with_metric = measure(embedded(tiny, "streamingllm")), measure(embedded(tiny, name))
    needs, queries = small(name, tiny).needs, tiny.n_layer * tiny.n_head * tiny.d_head * 4
    extra = needs.key_sum * queries * tiny.n_head_kv // tiny.n_head
    extra += queries * (needs.window + needs.query_mean + needs.query_covariance * tiny.d_head)
    extra += (needs.output_norms + needs.past + needs.attention_sums) * plain[0] // (2 * tiny.d_head)  # a number for each cell
    assert abs(with_metric[0] - plain[0] - extra) <= 64 * tiny.n_layer  # alignment
    assert abs(with_metric[1] - plain[1] - extra) <= 0.01 * plain[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lukv.metric": "nonsense"}, "lukv.metric is 'nonsense', but this build knows only: .*snapkv"),
        ({"lukv.metric": "snapkv", "lukv.metric.window": 0}, "lukv.metric.window is 0, but must be at least 1"),
        ({"lukv.metric": "snapkv", "lukv.metric.kernel": 4}, "lukv.metric.kernel is 4, but must be odd"),
        ({"lukv.metric": "keydiff-expectedattention", "lukv.metric.share": 1.5}, "lukv.metric.share is 1.5, but must be at most 1"),
        ({"lukv.metric": "snapkv", "lukv.metric.window": 16.0}, "lukv.metric.window has the type f32 but must be u32"),
        ({"lukv.metric": "snapkv", "lukv.metric.epsilon": 0.1}, "lukv.metric.epsilon is not a parameter of the metric snapkv"),
        ({"lukv.metric": "cake", "lukv.metric.gamma": float("nan")}, "lukv.metric.gamma is nan"),
    ],
)  # fmt: skip
def test_damaged_parameters(tiny: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture, keys: dict, message: str) -> None:
    import re

    path = tmp_path / "damaged.gguf"
    extra = damaged(tiny, "lukv.enabled", True) | keys
    write_tiny(path, n_layer=2, n_head=6, n_head_kv=2, d_head=64, n_ctx=4096, n_vocab=N_VOCAB, extra=extra)
    with pytest.raises(ValueError, match="Failed to load model"):
        load(path, verbose=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "LU-KV:" in line]
    assert len(lines) == 1 and re.search(message, lines[0])
    assert feed(load(path, {"lukv.enabled": False}), [5]).shape == (1, N_VOCAB)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("input", lambda a: a[:-1], "lukv.scorer.input has 3239 values, but the model and lukv.scorer.hidden ask for 3240"),
        ("skip", lambda a: a + np.inf, "lukv.scorer.skip holds inf"),
        ("bias", lambda a: None, "lukv.scorer.bias is missing"),
        ("hidden", lambda a: 0, "lukv.scorer.input has 3240 values, but the model and lukv.scorer.hidden ask for 0"),
        ("key_length", lambda a: 32, "lukv.scorer.key_length is 32, but the model has keys of 64"),
    ],
)  # fmt: skip
def test_damaged_scorer(tiny: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture, key: str, change, message: str) -> None:
    header = read_header(embedded(tiny, "foresight"))
    name = f"lukv.scorer.{key}"
    value, kind = change(header.value(name)), header.pairs[name].type
    path = tmp_path / "damaged.gguf"
    rewrite(header, path, lambda key: key == name, [] if value is None else [encode_pair(name, kind, value)])
    with pytest.raises(ValueError, match="Failed to load model"):
        load(path, verbose=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "LU-KV:" in line]
    assert len(lines) == 1 and message in lines[0]


def test_scorer_is_missing(tiny: TinyModel, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="Failed to load model"):
        load(embedded(tiny, "snapkv"), {"lukv.metric": "foresight"}, verbose=True)
    assert "lukv.scorer.key_length is missing" in capfd.readouterr().err


def test_another_metric_by_an_override(tiny: TinyModel) -> None:
    """The file's parameters are for the file's metric."""
    path, tokens = embedded(tiny, "snapkv"), distinct_tokens(300)
    by_override = load(path, {"lukv.metric": "cake", "lukv.metric.window": 16})
    by_file = load(embedded(tiny, "cake"))
    np.testing.assert_array_equal(feed(by_override, tokens), feed(by_file, tokens))
    assert cells(by_override) == cells(by_file)
    other = load(path, {"lukv.metric": "keydiff"})
    feed(other, tokens)
    assert cells(other) != cells(by_file) and runtime.usage(other).bytes < runtime.usage(by_file).bytes


@pytest.mark.parametrize("name", ["expectedattention", "criticalkv-cake", "foresight", "h2o", "keydiff"])
@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "cohere2", "gpt-oss"])
def test_layers_with_a_window(tmp_path: Path, arch: str, name: str) -> None:
    """Only the other layers keep anything for the metric; a full cache gives stock's logits, a small one finite ones."""
    tiny = write_tiny(tmp_path / "tiny.gguf", arch, n_layer=4, n_head=4, d_head=64, n_vocab=N_VOCAB)
    path, tokens = tmp_path / "lukv.gguf", distinct_tokens(385)
    metric, budget = small(name, tiny), np.full((tiny.n_layer, tiny.n_head_kv), 0.2)
    embed(tiny.path, path, replace(metadata(budget, 0.2), **keys_of(metric)))
    model, stock = load(path, {"lukv.ratio": 1.0}), load(tiny.path)
    assert nmse(feed(model, tokens), feed(stock, tokens)) < 1e-6
    bounded = load(path)
    assert np.isfinite(feed(bounded, tokens)).all() and np.isfinite(feed(bounded, tokens[:9])).all()
    assert runtime.usage(bounded).evictions > 0


def test_queries_of_llama4_have_no_statistics(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama4", n_layer=4, n_head=4, d_head=64).path
    options = {"lukv.ratio": 0.5, "lukv.metric": "expectedattention"}
    assert not runtime.enabled(load(path, options, verbose=True))
    assert "LU-KV is off, the KV cache has its full size: the metric expectedattention is not" in capfd.readouterr().err
    assert runtime.enabled(load(path, {**options, "lukv.metric": "snapkv"}))
