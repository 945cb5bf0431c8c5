"""KVzip natively: the model repeats a cached context, and keeps what it looked at, as the reference does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sequences import Context
from test_native import QUANTISED, RECENT, SINK, feed, load, metadata, nmse, uneven_budget
from tiny_gguf import CHAT_TEMPLATE, TinyModel, write_tiny

from lukv_gguf import metrics, runtime
from lukv_gguf.collect import reconstruct
from lukv_gguf.errors import LukvError
from lukv_gguf.metadata import embed
from lukv_gguf.metrics import LayerState
from lukv_gguf.reference import ReferenceModel, Tokenizer
from lukv_gguf.replay import Replay, make_replays

N_CONTEXT, RATIO = 300, 0.3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("kvzip") / "tiny.gguf"
    return write_tiny(path, n_layer=2, n_head=6, n_head_kv=2, d_head=64, n_ctx=4096, n_vocab=900, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def path(tiny: TinyModel) -> Path:
    return embedded(tiny)


def embedded(tiny: TinyModel, metric: str = "kvzip") -> Path:
    target = tiny.path.with_name(f"{metric}.gguf")
    meta = metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO), RATIO, "prefill")
    embed(tiny.path, target, replace(meta, metric=metric, metric_params=metrics.get(metric).params))
    return target


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(np.arange(3, 899))[:n].tolist()


CONTEXT = tokens_of(N_CONTEXT)
REPLAYS = [
    Replay(tokens_of(9, seed=start + 1) + CONTEXT[start:end], start, end) for start, end in ((131, 295), (2, 130), (130, 131))
]


def scores(tiny: TinyModel, replays: list[Replay] = REPLAYS, context: list[int] = CONTEXT) -> np.ndarray:
    """[L, H, T]."""
    model = ReferenceModel.load(tiny.path)
    return np.stack([found.numpy() for found in reconstruct(model, model.prefill(context), replays, SINK)])


def assert_best(kept: np.ndarray, scores: np.ndarray) -> None:
    """The protected tokens, and of the others those with the largest scores; of those with none, any."""
    assert set(kept) >= {*range(SINK), *range(len(scores) - RECENT, len(scores))}
    others = np.arange(SINK, len(scores) - RECENT)
    inside = np.isin(others, kept)
    if inside.any() and not inside.all():
        assert scores[others[inside]].min() >= scores[others[~inside]].max() - 1e-6


def positions(context: object, tiny: TinyModel, sequence: int = 0) -> dict[tuple[int, int], np.ndarray]:
    return {i: runtime.positions(context, *i, sequence) for i in np.ndindex(tiny.n_layer, tiny.n_head_kv)}


@pytest.mark.parametrize("flash_attn", [False, True])
def test_same_cells_as_the_reference(tiny: TinyModel, path: Path, flash_attn: bool) -> None:
    """A part longer than a batch of the repetition, one token, and ends that belong to no part."""
    model = load(path, flash_attn=flash_attn)
    feed(model, CONTEXT)
    full = runtime.usage(model).bytes
    for replay in REPLAYS:
        runtime.record_repetition(model, replay.tokens, replay.start, replay.end)
        assert (runtime.usage(model).used == N_CONTEXT).all()
    runtime.commit(model)
    usage, expected = runtime.usage(model), scores(tiny)
    assert usage.bytes < 0.6 * full and usage.used.max() > 5 * usage.used.min()
    assert usage.used.sum() == pytest.approx(RATIO * N_CONTEXT * usage.used.size, abs=4)
    for i, kept in positions(model, tiny).items():
        assert len(kept) == usage.used[i]
        assert_best(kept, expected[i])


def test_one_half_by_keydiff(tiny: TinyModel) -> None:
    """The mean key is that of the context: what is read to repeat it does not count."""
    model = load(embedded(tiny, "keydiff-kvzip"))
    feed(model, CONTEXT)
    for replay in REPLAYS:
        runtime.record_repetition(model, replay.tokens, replay.start, replay.end)
    runtime.commit(model)
    reference = ReferenceModel.load(tiny.path)
    cache = reference.prefill(CONTEXT)
    found = reconstruct(reference, cache, REPLAYS, SINK)
    for i, kept in positions(model, tiny).items():
        state = LayerState(cache.keys[i[0]], reconstruction=found[i[0]], sink=SINK, recent=RECENT)
        score = metrics.get("keydiff-kvzip").score(state)[i[1]].masked_fill(state.is_protected, float("inf"))
        assert set(kept) == set(score.argsort(descending=True, stable=True)[: len(kept)].tolist())


def test_the_sequence_is_left_as_it_was(path: Path) -> None:
    repeated, plain = load(path), load(path)
    for model in (repeated, plain):
        feed(model, CONTEXT)
    for replay in REPLAYS:
        runtime.record_repetition(repeated, replay.tokens, replay.start, replay.end)
    more = tokens_of(20, seed=5)
    assert nmse(feed(repeated, more), feed(plain, more)) < 1e-12


def test_in_parts_of_its_own(tiny: TinyModel, path: Path) -> None:
    """`runtime.kvzip` makes the requests; then the answer follows, and nothing more is evicted."""
    model = load(path, n_ctx=1024)
    with Tokenizer(path) as tokenizer:
        before, _ = tokenizer.frame_user_message()
        context = tokenizer.begin_tokens(before + " ".join(f"w{i * i % 97 + 1}" for i in range(250)))
        replays = make_replays(tokenizer, context, 100, 1024)
    feed(model, context)
    runtime.kvzip(model, chunk=100)
    expected = scores(tiny, replays, context)
    used = runtime.usage(model).used
    for i, kept in positions(model, tiny).items():
        assert_best(kept, expected[i])
    assert np.isfinite(feed(model, [7, 8, 9])).all()
    assert np.isfinite(feed(model, [10])).all()
    np.testing.assert_array_equal(runtime.usage(model).used, used + 4)


def test_quantised_keeps_nearly_the_same(tiny: TinyModel, path: Path) -> None:
    kept = []
    for options in ({}, {"kv_type": QUANTISED["q8_0"], "flash_attn": True}):
        model = load(path, **options)
        feed(model, CONTEXT)
        for replay in REPLAYS:
            runtime.record_repetition(model, replay.tokens, replay.start, replay.end)
        runtime.commit(model)
        kept.append(positions(model, tiny))
    same = sum(len(np.intersect1d(a, b)) for a, b in zip(*(k.values() for k in kept)))
    assert same >= 0.93 * sum(map(len, kept[0].values()))


def test_state_and_sequences(tiny: TinyModel, path: Path) -> None:
    """What was recorded goes with a copy and with a state, and each sequence has its own."""
    other = tokens_of(200, seed=9)
    replay = Replay(tokens_of(5, seed=10) + other[4:180], 4, 180)
    with Context(path, n_ctx=1200, n_seq_max=3) as context:
        for first in range(0, N_CONTEXT, 100):
            context.decode({0: CONTEXT[first : first + 100]})
        for first in range(0, 200, 100):
            context.decode({1: other[first : first + 100]})
        runtime.record_repetition(context.ctx, replay.tokens, replay.start, replay.end, sequence=1)
        for part in REPLAYS:
            runtime.record_repetition(context.ctx, part.tokens, part.start, part.end)
        context.copy(0, 2)
        runtime.commit(context.ctx)
        expected = {0: scores(tiny), 1: scores(tiny, [replay], other), 2: scores(tiny)}
        for sequence, of_heads in expected.items():
            for i, kept in positions(context.ctx, tiny, sequence).items():
                assert 0 < len(kept) < of_heads.shape[-1]
                assert_best(kept, of_heads[i])

    model, restored = load(path), load(path)
    feed(model, CONTEXT)
    for part in REPLAYS:
        runtime.record_repetition(model, part.tokens, part.start, part.end)
    restored.load_state(model.save_state())
    runtime.commit(restored)
    for i, kept in positions(restored, tiny).items():
        assert_best(kept, scores(tiny)[i])


def test_prompt_of_several_sequences(tiny: TinyModel, path: Path) -> None:
    """Each has its own repetition."""
    with Context(path, n_ctx=1200) as context:
        for first in range(0, N_CONTEXT, 100):
            context.decode({(0, 1, 2): CONTEXT[first : first + 100]})
        for sequence, replays in {0: REPLAYS, 2: REPLAYS[:1], 1: REPLAYS[1:]}.items():
            with pytest.raises(LukvError, match="could not evict"):
                runtime.commit(context.ctx)
            for replay in replays:
                runtime.record_repetition(context.ctx, replay.tokens, replay.start, replay.end, sequence=sequence)
        runtime.commit(context.ctx)
        for sequence, replays in {0: REPLAYS, 2: REPLAYS[:1], 1: REPLAYS[1:]}.items():
            expected = scores(tiny, replays)
            for i, kept in positions(context.ctx, tiny, sequence).items():
                assert 0 < len(kept) < N_CONTEXT
                assert_best(kept, expected[i])


def test_nothing_is_evicted_before(path: Path, capfd: pytest.CaptureFixture) -> None:
    model = load(path, verbose=True)
    feed(model, CONTEXT)
    with pytest.raises(LukvError, match="could not evict"):
        runtime.commit(model)
    with pytest.raises(RuntimeError):
        feed(model, [5])
    assert "only after the context was repeated" in capfd.readouterr().err
    assert (runtime.usage(model).used == N_CONTEXT).all()


@pytest.mark.parametrize(
    ("tokens", "start", "end", "message", "logged"),
    [
        (5, 0, 301, "positions 0 to 300", "has the positions [0, 300), the repetition has 5 tokens and is about [0, 301)"),
        (5, 7, 7, "positions 7 to 6", "is about [7, 7)"),
        (5, -1, 7, "positions -1 to 6", "is about [-1, 7)"),
        (0, 0, 7, "positions 0 to 6", "has 0 tokens"),
        (500, 0, 7, "could not read 500 more tokens", ""),
    ],
)
def test_bad_repetitions(
    path: Path, capfd: pytest.CaptureFixture, tokens: int, start: int, end: int, message: str, logged: str
) -> None:
    model = load(path, verbose=True)
    feed(model, CONTEXT)
    with pytest.raises(LukvError, match=message):
        runtime.record_repetition(model, tokens_of(tokens), start, end)
    assert logged in capfd.readouterr().err
    assert (runtime.usage(model).used == N_CONTEXT).all()
    runtime.record_repetition(model, REPLAYS[0].tokens, REPLAYS[0].start, REPLAYS[0].end)
    runtime.commit(model)
    with pytest.raises(LukvError, match="it was evicted"):
        runtime.record_repetition(model, [5, 6], 0, 7)
    assert "was evicted already" in capfd.readouterr().err


def test_where_it_does_not_apply(tiny: TinyModel, path: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="Failed to load model"):
        load(path, {"lukv.policy": "capacity"}, verbose=True)
    assert "lukv.policy is 'capacity', but the metric kvzip needs 'prefill'" in capfd.readouterr().err
    model = load(path, {"lukv.metric": "keydiff"}, verbose=True)
    feed(model, CONTEXT)
    with pytest.raises(LukvError, match="ranks by another metric"):
        runtime.kvzip(model)
    with pytest.raises(LukvError, match="ordinary KV cache"):
        runtime.kvzip(load(tiny.path))
    with pytest.raises(LukvError, match="no context"):
        runtime.kvzip(load(path))
    windowed = write_tiny(tmp_path / "gemma.gguf", "gemma2", n_layer=4, n_head=4, d_head=64).path
    options = {"lukv.ratio": 0.5, "lukv.metric": "kvzip", "lukv.policy": "prefill"}
    assert not runtime.enabled(load(windowed, options, verbose=True))
    assert "the metric kvzip is not supported for sliding windows" in capfd.readouterr().err


def test_a_sequence_that_outgrew_its_share(tiny: TinyModel, path: Path) -> None:
    """Its recent cells exceed what it owns when the repetition begins: the cells are shared out anew, nobody's are lost."""
    other = tokens_of(120, seed=9)
    replay = Replay(tokens_of(5, seed=10) + other[4:110], 4, 110)
    with Context(path, n_ctx=512, n_seq_max=2) as context, Context(path, n_ctx=512, n_seq_max=1) as alone:
        for place in (context, alone):
            for first in (0, 100):
                place.decode({0: CONTEXT[first : first + 100]})
        for first in range(0, 120, 30):
            context.decode({1: other[first : first + 30]})
        used, owned = (getattr(runtime.usage(context.ctx, 1), name) for name in ("used", "owned"))
        assert (used == 120).all() and (owned < 120).all()
        runtime.record_repetition(context.ctx, replay.tokens, replay.start, replay.end, sequence=1)
        assert (runtime.usage(context.ctx, 1).used == 120).all() and (runtime.usage(context.ctx, 0).used == 200).all()
        more = tokens_of(20, seed=5)
        assert nmse(context.decode({0: more})[0], alone.decode({0: more})[0]) < 1e-4
        part = Replay(tokens_of(5, seed=11) + CONTEXT[4:150], 4, 150)
        runtime.record_repetition(context.ctx, part.tokens, part.start, part.end)
        runtime.commit(context.ctx)
        expected = scores(tiny, [replay], other)
        for i, kept in positions(context.ctx, tiny, 1).items():
            assert_best(kept, expected[i])
