"""The native cache: held to the plain re-implementation, and to stock llama.cpp where it must not differ."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Llama
from tiny_gguf import ARCHITECTURES, RUNTIME_ONLY, TinyModel, write_tiny

from lukv_gguf import metrics, runtime
from lukv_gguf.errors import LukvError
from lukv_gguf.metadata import LukvMetadata, embed
from lukv_gguf.reference import ReferenceModel
from lukv_gguf.reference.bounded import BoundedDecoder

F32, F16 = 0, 1
SINK, RECENT = 2, 5


def uneven_budget(n_layer: int, n_head_kv: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Budgets that differ by two orders of magnitude, with the mean at the ratio."""
    rng = np.random.default_rng(seed)
    budget = np.exp(rng.uniform(np.log(0.005), 0.0, (n_layer, n_head_kv)))
    for _ in range(100):
        budget = np.minimum(1.0, budget * ratio / budget.mean())
    return budget.astype(np.float32)


def metadata(budget: np.ndarray, ratio: float, policy: str = "capacity") -> LukvMetadata:
    grid = np.array([ratio / 2, ratio, (1 + ratio) / 2], np.float32)
    profile = np.stack([budget / 2, budget, (1 + budget) / 2]).astype(np.float32)
    return LukvMetadata(
        ratio=ratio,
        metric="keydiff",
        metric_params={},
        sink=SINK,
        recent=RECENT,
        policy=policy,
        budget=budget,
        profile_ratios=grid,
        profile_budget=profile,
        provenance={},
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("native") / "tiny.gguf"
    return write_tiny(path, n_layer=4, n_head=4, n_head_kv=2, d_head=64, n_ctx=4096)


@pytest.fixture(scope="module")
def embedded(tiny: TinyModel) -> Path:
    path = tiny.path.with_name("tiny-lukv.gguf")
    embed(tiny.path, path, metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, 0.25), 0.25))
    return path


def load(path: Path, overrides: dict | None = None, *, kv_type: int = F32, flash_attn: bool = False, **kwargs) -> Llama:
    options = dict(n_ctx=768, n_batch=512, n_ubatch=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    return Llama(
        model_path=str(path),
        kv_overrides=overrides,
        type_k=kv_type,
        type_v=kv_type,
        flash_attn=flash_attn,
        **(options | kwargs),
    )


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 299, n).tolist()


def feed(model: Llama, tokens: list[int]) -> np.ndarray:
    """Logits of tokens that continue the sequence, [n, n_vocab]."""
    start = model.n_tokens
    model.eval(tokens)
    return model.scores[start : start + len(tokens)].astype(np.float64)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


def reference(tiny: TinyModel, owned: np.ndarray, n_recent: int) -> BoundedDecoder:
    model = ReferenceModel.load(tiny.path)
    return BoundedDecoder(model, metrics.get("keydiff"), owned, n_recent=n_recent, sink=SINK, recent=RECENT)


def assert_same_positions(model: Llama, expected: BoundedDecoder, shape: tuple[int, int]) -> None:
    for layer, head in np.ndindex(shape):
        np.testing.assert_array_equal(runtime.positions(model, layer, head), expected.positions(layer, head))


@pytest.mark.parametrize("flash_attn", [False, True])
def test_capacity_equals_reference(tiny: TinyModel, embedded: Path, flash_attn: bool) -> None:
    """Several commits during the prompt, then while tokens are generated: same cells, same logits."""
    model = load(embedded, flash_attn=flash_attn)
    usage = runtime.usage(model)
    assert usage.owned.max() > 50 * usage.owned.min()
    expected = reference(tiny, usage.owned, usage.recent)

    tokens = random_tokens(600, seed=1)  # without scores that f16 brings into another order
    got, want = [], []
    for size in [128, 128, 128, 70, 3] + [1] * 143:
        batch, tokens = tokens[:size], tokens[size:]
        got.append(feed(model, batch))
        want.append(expected.decode(batch).numpy())
        assert_same_positions(model, expected, usage.owned.shape)
    assert not tokens
    assert runtime.usage(model).evictions >= 5
    # flash attention keeps K and V in f16
    assert nmse(np.concatenate(got), np.concatenate(want)) < (1e-4 if flash_attn else 1e-8)


@pytest.mark.parametrize("shape", [(3, 1, 32), (4, 4, 80), (8, 2, 128), (7, 1, 96)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_fused_attention_equals_reference(tmp_path: Path, shape: tuple[int, int, int], n_threads: int) -> None:
    """Batches of up to 32 tokens take the op for all heads together, here for several shapes and uneven shares."""
    n_head, n_head_kv, d_head = shape
    model = write_tiny(tmp_path / "shape.gguf", n_layer=2, n_head=n_head, n_head_kv=n_head_kv, d_head=d_head, n_ctx=4096)
    path = tmp_path / "shape-lukv.gguf"
    embed(model.path, path, metadata(uneven_budget(2, n_head_kv, 0.3), 0.3))
    llama = load(path, flash_attn=True, n_threads=n_threads, n_threads_batch=n_threads)
    usage = runtime.usage(llama)
    expected = reference(model, usage.owned, usage.recent)
    for size in (32, 17, 1, 1, 30, 5, 32, 32, 1, 32, 32, 2, 1):
        batch = random_tokens(size, seed=size)
        assert nmse(feed(llama, batch), expected.decode(batch).numpy()) < 1e-8
    assert_same_positions(llama, expected, usage.owned.shape)
    assert runtime.usage(llama).evictions > 0


def test_prefill_equals_reference(tiny: TinyModel, embedded: Path) -> None:
    """Nothing is evicted from the prompt until the first generated token; the memory shrinks then."""
    model = load(embedded, {"lukv.policy": "prefill"})
    full = runtime.memory_size(model)
    expected = reference(tiny, np.full((tiny.n_layer, tiny.n_head_kv), 768), 128)
    prompt, answer = random_tokens(300), random_tokens(150, seed=1)

    got = [feed(model, prompt)]
    want = [np.concatenate([expected.decode(prompt[i : i + 128], bounded=False).numpy() for i in (0, 128, 256)])]
    assert runtime.usage(model).used.tolist() == [[300] * tiny.n_head_kv] * tiny.n_layer

    got.append(feed(model, answer[:1]))
    cells = runtime.usage(model).used - 1
    assert abs(cells.sum() - round(0.25 * 300 * cells.size)) <= cells.size
    assert runtime.memory_size(model) < 0.75 * full
    expected.commit(cells)
    want.append(expected.decode(answer[:1], bounded=False).numpy())
    assert_same_positions(model, expected, cells.shape)

    # from here on everything is kept
    got += [feed(model, [token]) for token in answer[1:]]
    want += [expected.decode([token], bounded=False).numpy() for token in answer[1:]]
    assert_same_positions(model, expected, cells.shape)
    assert nmse(np.concatenate(got), np.concatenate(want)) < 1e-8


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("kv_type", [F32, F16])
def test_off_is_stock(tiny: TinyModel, embedded: Path, flash_attn: bool, kv_type: int) -> None:
    options = dict(kv_type=kv_type, flash_attn=flash_attn)
    tokens = random_tokens(300)
    stock = load(tiny.path, **options)
    off = load(embedded, {"lukv.enabled": False}, **options)
    assert not runtime.enabled(off)
    assert runtime.memory_size(off) == runtime.memory_size(stock)
    np.testing.assert_array_equal(feed(off, tokens), feed(stock, tokens))


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("n_ubatch", [128, 512])
def test_ratio_one_is_stock(tiny: TinyModel, embedded: Path, flash_attn: bool, n_ubatch: int) -> None:
    options = dict(flash_attn=flash_attn, kv_type=F16, n_ubatch=n_ubatch, n_ctx=600)
    tokens = random_tokens(500)
    stock, full = load(tiny.path, **options), load(embedded, {"lukv.ratio": 1.0}, **options)
    assert nmse(feed(full, tokens), feed(stock, tokens)) < 1e-6
    assert runtime.usage(full).evictions == 0


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batches_equal_reference(tiny: TinyModel, embedded: Path, data: st.DataObject) -> None:
    """Batches of any size, and removals of any tail: same cells as the reference, which replays what remains."""
    model = load(embedded, n_ubatch=64)
    usage = runtime.usage(model)
    expected = reference(tiny, usage.owned, usage.recent)
    for size in data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=12), "sizes"):
        batch = random_tokens(size, seed=size)
        if model.n_tokens + size > 768:
            break
        assert nmse(feed(model, batch), expected.decode(batch).numpy()) < 1e-8
    assert_same_positions(model, expected, usage.owned.shape)


def test_removing_a_tail(tiny: TinyModel, embedded: Path) -> None:
    """The cells of the tail go, the others stay; what follows sees just those."""
    model = load(embedded)
    usage = runtime.usage(model)
    expected = reference(tiny, usage.owned, usage.recent)
    for batch in np.split(np.array(random_tokens(384)), 3):
        feed(model, batch.tolist())
        expected.decode(batch.tolist())
    for cut in (380, 300, 200):
        model._ctx.kv_cache_seq_rm(0, cut, -1)
        model.n_tokens = cut
        expected.truncate(cut)
        assert_same_positions(model, expected, usage.owned.shape)
        batch = random_tokens(20, seed=cut)
        assert nmse(feed(model, batch), expected.decode(batch).numpy()) < 1e-8
        assert_same_positions(model, expected, usage.owned.shape)


def test_commit_without_protected_cells(embedded: Path) -> None:
    """The last positions are gone, in two steps, and none at the start is protected."""
    model = load(embedded, {"lukv.policy": "prefill", "lukv.sink": 0, "lukv.recent": 1})
    feed(model, random_tokens(300))
    model._ctx.kv_cache_seq_rm(0, 200, 250)
    model._ctx.kv_cache_seq_rm(0, 250, -1)
    runtime.commit(model)
    usage = runtime.usage(model)
    assert usage.evictions == 1 and usage.used.max() <= 200
    assert all(runtime.positions(model, *i).max() < 200 for i in np.ndindex(usage.used.shape))


def test_state_is_restored(embedded: Path) -> None:
    model = load(embedded)
    feed(model, random_tokens(400))
    state = model.save_state()
    want = feed(model, random_tokens(30, seed=1))
    positions = runtime.positions(model, 2, 1)

    other = load(embedded)
    other.load_state(state)
    np.testing.assert_array_equal(feed(other, random_tokens(30, seed=1)), want)
    np.testing.assert_array_equal(runtime.positions(other, 2, 1), positions)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ratio=st.floats(0.13, 1.0), n_ctx=st.integers(256, 2048))
def test_owned_cells_sum_to_the_ratio(tiny: TinyModel, embedded: Path, ratio: float, n_ctx: int) -> None:
    model = load(embedded, {"lukv.ratio": ratio}, n_ctx=n_ctx)
    n_ctx = model.n_ctx()  # padded
    usage = runtime.usage(model)
    assert abs(usage.owned.sum() - ratio * n_ctx * usage.owned.size) <= usage.owned.size
    assert usage.owned.min() >= SINK + RECENT and usage.owned.max() <= n_ctx
    cell = 2 * tiny.d_head * 4
    assert usage.bytes >= (usage.owned.sum() + usage.recent * usage.owned.size) * cell
    assert usage.bytes <= 1.01 * (usage.owned.sum() + usage.recent * usage.owned.size) * cell


# phi3 and olmo2 with and without sliding windows
WINDOWS = {"phi3-window": {"attention.sliding_window": 40}, "olmo2-window": {"attention.sliding_window": 40}}


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *RUNTIME_ONLY, *WINDOWS])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_every_architecture_at_ratio_1_is_stock(tmp_path: Path, arch: str, flash_attn: bool) -> None:
    n_layer = 4 if arch in RUNTIME_ONLY else 3  # one without a window
    plain = write_tiny(tmp_path / "plain.gguf", arch.removesuffix("-window"), n_layer=n_layer, d_head=64, extra=WINDOWS.get(arch))
    model = load(plain.path, {"lukv.ratio": 1.0}, kv_type=F16, flash_attn=flash_attn)
    stock = load(plain.path, kv_type=F16, flash_attn=flash_attn)
    assert runtime.enabled(model)
    for size in (300, 20, 1, 1, 200):
        tokens = random_tokens(size, seed=size)
        # with flash attention stock sums in f16 up to 32 tokens, which can tip the choice of an expert
        assert nmse(feed(model, tokens), feed(stock, tokens)) < (1e-3 if flash_attn else 1e-6)


def test_uniform_budget_without_a_table(tiny: TinyModel) -> None:
    model = load(tiny.path, {"lukv.ratio": 0.5})
    assert (runtime.usage(model).owned == 384).all()
    assert not runtime.enabled(load(tiny.path))


QUANTISED = {"q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7}


@pytest.mark.parametrize("kv_type", QUANTISED.values(), ids=QUANTISED)
def test_quantised_at_ratio_1_is_stock(embedded: Path, tiny: TinyModel, kv_type: int) -> None:
    model = load(embedded, {"lukv.ratio": 1.0}, kv_type=kv_type, flash_attn=True)
    stock = load(tiny.path, kv_type=kv_type, flash_attn=True)
    assert runtime.enabled(model)
    for size in (300, 20, 1, 1, 200):
        tokens = random_tokens(size, seed=size)
        # after the first batch: for up to 32 tokens stock rounds the queries to 8 bits, the op for all heads does not
        assert nmse(feed(model, tokens), feed(stock, tokens)) < (1e-6 if size == 300 else 1e-2)


def test_quantised_evicts_like_f32(embedded: Path, tiny: TinyModel) -> None:
    """The cells that go are almost the same, so are the logits, and moved cells keep their bits."""
    exact = load(embedded, flash_attn=True)
    quantised = load(embedded, kv_type=QUANTISED["q8_0"], flash_attn=True)
    usage = runtime.usage(quantised)
    assert usage.bytes < 0.27 * runtime.usage(exact).bytes
    tokens = random_tokens(300)
    assert nmse(feed(quantised, tokens), feed(exact, tokens)) < 0.02
    assert runtime.usage(quantised).evictions == runtime.usage(exact).evictions > 0
    kept = [[set(runtime.positions(model, *i).tolist()) for i in np.ndindex(usage.owned.shape)] for model in (exact, quantised)]
    assert sum(len(a & b) for a, b in zip(*kept)) >= 0.95 * sum(map(len, kept[0]))


def test_sliding_windows_are_left_alone(tmp_path: Path) -> None:
    """Only the layers without a window have budgets; what was evicted from them is all that differs."""
    plain, path = tmp_path / "plain.gguf", tmp_path / "lukv.gguf"
    tiny = write_tiny(plain, "gemma3", n_layer=4, d_head=64)
    budget = uneven_budget(tiny.n_layer, tiny.n_head_kv, 0.25)
    budget[::2] = 0.25  # as the profile gives layers with a window their ratio
    budget[1::2] *= 0.25 / budget[1::2].mean()
    embed(plain, path, metadata(np.minimum(budget, 1), 0.25))

    model, stock = (load(p, kv_type=F16, flash_attn=True) for p in (path, plain))
    usage = runtime.usage(model)
    assert (usage.owned[::2] == -1).all()
    assert abs(usage.owned[1::2].mean() - 0.25 * 768) <= 1
    cell = 2 * tiny.d_head * 2
    sums = usage.owned[1::2].size * tiny.d_head * 4  # of the metric
    cells = (usage.owned[1::2] + usage.recent).sum()
    assert usage.bytes_full - (usage.bytes - sums) == (768 * usage.owned[1::2].size - cells) * cell
    assert usage.bytes < runtime.memory_size(stock)

    # before the first eviction there is no difference
    tokens = random_tokens(128)
    assert nmse(feed(model, tokens), feed(stock, tokens)) < 1e-6
    for i in range(4):
        feed(model, random_tokens(128, seed=i))
    state = model.save_state()
    kept = [runtime.positions(model, 1, head) for head in range(tiny.n_head_kv)]
    assert max(map(len, kept)) < 640 and runtime.usage(model).evictions > 0
    with pytest.raises(LukvError, match="no KV head"):
        runtime.positions(model, 0, 0)

    other = load(path, kv_type=F16, flash_attn=True)
    other.load_state(state)
    # llama.cpp restores the windows in another order, which shows in the last bits of f16
    assert nmse(feed(other, random_tokens(40)), feed(model, random_tokens(40))) < 1e-4
    for head in range(tiny.n_head_kv):
        np.testing.assert_array_equal(runtime.positions(other, 1, head), runtime.positions(model, 1, head))


def test_what_is_not_supported_runs_as_stock(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_gguf, "RUNTIME_ONLY", ("internlm2", "cohere2"))  # the first has llama's tensors by another name
    plain, path = tmp_path / "plain.gguf", tmp_path / "lukv.gguf"
    tiny = write_tiny(plain, "cohere2")  # the first layer without a window would be the fourth
    assert not runtime.enabled(load(plain, {"lukv.ratio": 0.25}, verbose=True))
    assert "LU-KV is off, the KV cache has its full size: all layers have a sliding window" in capfd.readouterr().err
    tiny = write_tiny(plain, "internlm2")
    embed(plain, path, metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, 0.25), 0.25))
    model = load(path, kv_type=F16, flash_attn=True, verbose=True)
    assert "LU-KV is off, the KV cache has its full size: the architecture internlm2 is not supp" in capfd.readouterr().err
    stock = load(plain, kv_type=F16, flash_attn=True)
    tokens = random_tokens(200)
    np.testing.assert_array_equal(feed(model, tokens), feed(stock, tokens))
    with pytest.raises(LukvError, match="ordinary KV cache"):
        runtime.usage(model)


def damaged(tiny: TinyModel, key: str, value) -> dict:
    """The keys of a valid table, one of them replaced (or left out)."""
    n = tiny.n_layer * tiny.n_head_kv
    keys = {
        "lukv.version": 1,
        "lukv.enabled": True,
        "lukv.ratio": 0.25,
        "lukv.metric": "keydiff",
        "lukv.sink": 2,
        "lukv.recent": 5,
        "lukv.policy": "capacity",
        "lukv.layers": tiny.n_layer,
        "lukv.heads_kv": tiny.n_head_kv,
        "lukv.budget": [0.25] * n,
        "lukv.profile.ratios": [0.25, 0.5],
        "lukv.profile.budget": [0.25] * n + [0.5] * n,
    }
    keys[key] = value
    return {name: value for name, value in keys.items() if value is not None}


DAMAGES = [
    ("lukv.version", 2),
    ("lukv.version", None),
    ("lukv.ratio", None),
    ("lukv.ratio", 1.5),
    ("lukv.ratio", float("nan")),
    ("lukv.ratio", "a fifth"),
    ("lukv.metric", "magic"),
    ("lukv.policy", "never"),
    ("lukv.recent", 0),
    ("lukv.layers", 5),
    ("lukv.budget", [0.25] * 7),
    ("lukv.budget", [0.25] * 7 + [float("nan")]),
    ("lukv.budget", [0.25] * 7 + [1.25]),
    ("lukv.budget", [0.5] * 8),
    ("lukv.budget", None),
    ("lukv.profile.ratios", [0.5, 0.25]),
    ("lukv.profile.budget", [0.25] * 9),
]


@pytest.mark.parametrize(("key", "value"), DAMAGES)
def test_damaged_keys(tiny: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture, key: str, value) -> None:
    """One line names the key, the model does not load with LU-KV on, and loads with it off."""
    path = tmp_path / "damaged.gguf"
    write_tiny(path, n_layer=4, n_head=4, n_head_kv=2, d_head=64, n_ctx=4096, extra=damaged(tiny, key, value))
    with pytest.raises(ValueError, match="Failed to load model"):
        load(path, verbose=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "LU-KV:" in line]
    assert len(lines) == 1 and key in lines[0] and "lukv.enabled=bool:false" in lines[0]
    assert feed(load(path, {"lukv.enabled": False}), [5]).shape == (1, tiny.n_vocab)

    cli = subprocess.run(
        [runtime.program("llama-cli"), "-m", path, "-p", "a", "-n", "1", "-st"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert cli.returncode != 0 and any(key in line and "LU-KV:" in line for line in cli.stderr.splitlines())


def test_binding_rejects_an_unpatched_library(monkeypatch: pytest.MonkeyPatch, tiny: TinyModel) -> None:
    import llama_cpp.llama_cpp as binding

    runtime._library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(binding, "_lib", ctypes.CDLL(None))
        with pytest.raises(LukvError, match="not the patched build"):
            runtime.enabled(None)
    runtime._library.cache_clear()


@pytest.mark.real_model
def test_smollm2_cells_overlap_with_reference(smollm2: Path, tmp_path: Path) -> None:
    """On quantised weights the activations differ a little: at least 97 % of the kept cells are the same."""
    from lukv_gguf.calibration import load_default

    path = tmp_path / "smollm2-lukv.gguf"
    embed(smollm2, path, metadata(uneven_budget(30, 3, 0.2), 0.2))
    model = load(path, n_ctx=2048, n_batch=1536, n_ubatch=512, flash_attn=True, kv_type=F16, logits_all=False, n_threads=2)
    tokens = model.tokenize(load_default()[0].encode())[:1536]
    model.eval(tokens)
    model.eval(tokens[:1])

    usage = runtime.usage(model)
    expected = BoundedDecoder(
        ReferenceModel.load(smollm2), metrics.get("keydiff"), usage.owned, n_recent=usage.recent, sink=SINK, recent=RECENT
    )
    for batch in np.split(np.array(tokens), 3):
        expected.decode(batch.tolist())
    expected.decode(tokens[:1])

    n_same = n_all = 0
    for layer, head in np.ndindex(usage.owned.shape):
        got, want = runtime.positions(model, layer, head), expected.positions(layer, head)
        n_same += len(np.intersect1d(got, want))
        n_all += len(want)
    assert n_same >= 0.97 * n_all


@pytest.mark.real_model
def test_smollm2_ratio_one_is_stock(smollm2: Path) -> None:
    from lukv_gguf.calibration import load_default

    options = dict(n_ctx=1024, n_ubatch=512, flash_attn=True, kv_type=F16, n_threads=2, n_threads_batch=2)
    stock, full = load(smollm2, **options), load(smollm2, {"lukv.ratio": 1.0}, **options)
    tokens = stock.tokenize(load_default()[0].encode())[:500]
    assert nmse(feed(full, tokens), feed(stock, tokens)) <= 1e-6
