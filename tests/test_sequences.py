"""Several sequences in one cache: held to the plain re-implementation, and what users do with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from sequences import Context
from test_native import F16, RECENT, SINK, metadata, nmse, random_tokens, uneven_budget
from tiny_gguf import TinyModel, write_tiny

from lukv_gguf import metrics, runtime
from lukv_gguf.metadata import embed
from lukv_gguf.reference import ReferenceModel
from lukv_gguf.reference.bounded import BoundedSequences, cells_for

RATIO = 0.25
N_SEQUENCES = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny(tmp_path_factory.mktemp("seq") / "tiny.gguf", n_layer=3, n_head=4, n_head_kv=2, d_head=64, n_ctx=4096)


@pytest.fixture(scope="module")
def embedded(tiny: TinyModel) -> Path:
    path = tiny.path.with_name("tiny-lukv.gguf")
    embed(tiny.path, path, metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO), RATIO))
    return path


def plain_cache(tiny: TinyModel, size: int, n_recent: int, metric: str = "keydiff") -> BoundedSequences:
    budget = uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO)
    return BoundedSequences(
        ReferenceModel.load(tiny.path),
        metrics.get(metric),
        lambda n: cells_for(budget, RATIO, n, n_min=SINK + RECENT),
        size=size,
        n_recent=n_recent,
        n_sequences=N_SEQUENCES,
        sink=SINK,
        recent=RECENT,
    )


def assert_same_cells(context: Context, plain: BoundedSequences, tiny: TinyModel) -> None:
    for sequence in range(N_SEQUENCES):
        assert context.length(sequence) == plain.lengths.get(sequence, 0)
        for layer, head in np.ndindex(tiny.n_layer, tiny.n_head_kv):
            np.testing.assert_array_equal(
                runtime.positions(context.ctx, layer, head, sequence), plain.positions(sequence, layer, head)
            )


@pytest.mark.parametrize("flash_attn", [False, True])
def test_sequences_equal_reference(tiny: TinyModel, embedded: Path, flash_attn: bool) -> None:
    """Prompts beside generation, one sequence much longer than the others: same cells, same logits."""
    plain = plain_cache(tiny, 1024, 128)
    with Context(embedded, n_ctx=1024, flash_attn=flash_attn) as context:

        def step(batch: dict[int, list[int]]) -> None:
            # without the op for all heads each sequence is an ubatch of its own
            want = plain.decode(batch) if flash_attn else {s: plain.decode({s: batch[s]})[s] for s in batch}
            got = context.decode(batch)
            for sequence in batch:
                # flash attention keeps K and V in f16 where the batch is long
                assert nmse(got[sequence], want[sequence].numpy()) < (1e-4 if flash_attn else 1e-8)
            assert_same_cells(context, plain, tiny)

        for i in range(3):
            step({0: random_tokens(128, seed=i)})
        step({1: random_tokens(100, seed=9)})
        for i in range(70):
            step({0: random_tokens(1, seed=i), 1: random_tokens(1, seed=1000 + i)} if i else {0: [5], 1: [6]})
        step({2: random_tokens(128, seed=7)})
        step({2: random_tokens(60, seed=8)})
        for i in range(10):
            step({s: random_tokens(3, seed=10 * i + s) for s in (0, 1, 2)})
        assert runtime.usage(context.ctx).evictions > 0
        # all together are no longer than the context: each keeps at least its budget, but for the rounding
        assert sum(plain.lengths.values()) < 1024
        for sequence, length in plain.lengths.items():
            usage = runtime.usage(context.ctx, sequence)
            wanted = np.minimum(cells_for(uneven_budget(3, 2, RATIO), RATIO, length, n_min=SINK + RECENT), length)
            assert (usage.owned >= wanted - 1).all()


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sequences_at_ratio_1_are_stock(tmp_path: Path, arch: str, flash_attn: bool, unified: bool) -> None:
    """Prompts and generated tokens of several sequences in one batch, with and without sliding windows."""
    model = write_tiny(tmp_path / "plain.gguf", arch, d_head=64, n_ctx=4096)
    options = dict(kv_type=F16, flash_attn=flash_attn, unified=unified, n_ctx=1536, n_seq_max=3)
    with Context(model.path, **options) as stock, Context(model.path, overrides={"lukv.ratio": 1.0}, **options) as context:
        assert runtime.enabled(context.ctx) and not runtime.enabled(stock.ctx)
        sizes = [{0: 100}, {0: 1, 1: 150}, {0: 1, 1: 1, 2: 40}, {2: 1}, {0: 2, 1: 2, 2: 2}, *[{0: 1, 1: 1, 2: 1}] * 5]
        for step, size in enumerate(sizes):
            batch = {s: random_tokens(n, 100 * step + s) for s, n in size.items()}
            got, want = context.decode(batch), stock.decode(batch)
            for s in batch:
                assert nmse(got[s], want[s]) < (1e-4 if flash_attn else 1e-6)
            if step == 3:
                for cache in (context, stock):
                    cache.remove(1, 120)
                    cache.remove(2, -1)
                    cache.copy(1, 2)


def assert_same_sequences(context: Context, other: Context, tiny: TinyModel, sequences: Sequence[int]) -> None:
    for sequence in sequences:
        assert context.length(sequence) == other.length(sequence)
        used = runtime.usage(context.ctx, sequence).used
        np.testing.assert_array_equal(used, runtime.usage(other.ctx, sequence).used)
        for layer, head in zip(*np.nonzero(used >= 0)):  # layers with a window have no budget
            kept = (runtime.positions(c.ctx, layer, head, sequence) for c in (context, other))
            np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize("n_prompt", [50, 700])
@pytest.mark.parametrize(
    ("arch", "overrides", "flash_attn"),
    [
        ("llama", {}, True),
        ("llama", {}, False),
        ("llama", {"lukv.metric": "snapkv"}, True),
        ("llama", {"lukv.metric": "h2o"}, True),
        ("llama", {"lukv.policy": "prefill"}, True),
        ("gemma3", {}, True),
    ],
)
def test_tokens_of_several_sequences(
    tmp_path: Path, arch: str, overrides: dict[str, str], flash_attn: bool, n_prompt: int
) -> None:
    """A prompt that is read for several sequences at once is one that was copied, also where it is longer than the context."""
    tiny = write_tiny(tmp_path / "plain.gguf", arch, n_layer=4, d_head=64, n_ctx=4096)
    embed(tiny.path, tmp_path / "lukv.gguf", metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO), RATIO))
    # stock's cache of the window cannot go past the context with such tokens
    n_ctx = 4096 if "lukv.policy" in overrides else 512 if arch == "llama" else 1024
    options = dict(overrides=overrides, flash_attn=flash_attn, n_ctx=n_ctx)
    with Context(tmp_path / "lukv.gguf", **options) as context, Context(tmp_path / "lukv.gguf", **options) as copied:
        for first in range(0, n_prompt, 350):
            tokens = random_tokens(min(350, n_prompt - first), first)
            got, want = context.decode({(2, 0, 3): tokens})[2, 0, 3], copied.decode({0: tokens})[0]
            assert nmse(got, want) < 1e-10
        # no cells of their own so far
        np.testing.assert_array_equal(runtime.usage(context.ctx).used, runtime.usage(copied.ctx).used)
        for sequence in (0, 2, 3):
            assert context.length(sequence) == n_prompt
            np.testing.assert_array_equal(runtime.usage(context.ctx, sequence).used, runtime.usage(copied.ctx, 0).used)
        for sequence in (2, 3):
            copied.copy(0, sequence)
        for i in range(140):
            batch = {s: random_tokens(1, 100 * i + s) for s in (0, 2, 3)}
            got, want = context.decode(batch), copied.decode(batch)
            for sequence in batch:
                assert nmse(got[sequence], want[sequence]) < 1e-10
        assert_same_sequences(context, copied, tiny, (0, 2, 3))
        assert n_prompt < 512 or runtime.usage(context.ctx).evictions > 0


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tokens_of_several_sequences_at_ratio_1_are_stock(tmp_path: Path, arch: str, flash_attn: bool) -> None:
    """What else is done to such sequences: one is saved, loses its tail, is removed, copied, kept."""
    model = write_tiny(tmp_path / "plain.gguf", arch, d_head=64, n_ctx=4096)
    options = dict(kv_type=F16, flash_attn=flash_attn, n_ctx=1536, n_seq_max=5)
    with Context(model.path, **options) as stock, Context(model.path, overrides={"lukv.ratio": 1.0}, **options) as context:

        def step(sizes: dict[int | tuple[int, ...], int]) -> None:
            batch = {s: random_tokens(n, n + i) for i, (s, n) in enumerate(sizes.items())}
            got, want = context.decode(batch), stock.decode(batch)
            for key in batch:
                assert nmse(got[key], want[key]) < (1e-4 if flash_attn else 1e-6)
            assert all(context.length(s) == stock.length(s) for s in range(5))

        step({(0, 1, 2, 3): 200})
        states = {cache: cache.save(1) for cache in (context, stock)}
        everything = context.save()
        step({(0, 1, 2, 3): 20, 4: 20})
        for cache in (context, stock):
            cache.remove(2, 210)
        step({2: 3, (0, 1): 3, 4: 3})
        for cache in (context, stock):
            cache.remove(0)
            cache.remove(-1, 215)
        step({1: 1, 2: 1, 3: 1})
        for cache in (context, stock):
            cache.remove(4)
            assert cache.restore(states[cache], 4)
            cache.copy(4, 0)
        step({0: 9, 4: 9, 3: 2})
        for cache in (context, stock):
            cache.keep(3)
        step({3: 5, (0, 1): 7})
        for cache in (context, stock):
            cache.keep(1)
        step({1: 4})

        # the sequences are the same ones again
        assert context.restore(everything)
        stock.remove(-1)
        for sequence in range(4):
            assert stock.restore(states[stock], sequence)
        used = runtime.usage(context.ctx).used
        assert (used[used >= 0] == 200).all()
        step({0: 1, 1: 1, 2: 1, 3: 1})


def test_tokens_of_several_sequences_that_are_refused(embedded: Path, capfd: pytest.CaptureFixture) -> None:
    with Context(embedded, n_seq_max=3, verbose=True) as context:

        def refused(batch: dict[int | tuple[int, ...], list[int]], line: str) -> bool:
            lengths = [context.length(s) for s in range(3)]
            capfd.readouterr()
            assert context.try_decode(batch) != 0
            assert [context.length(s) for s in range(3)] == lengths
            return line in capfd.readouterr().err

        assert refused({(0, 1): [5], 0: [6]}, "have all their tokens in common")
        assert refused({(0, 1): [5], (1, 2): [6]}, "")
        context.decode({0: [5, 6], 1: [5, 6]})
        assert refused({(0, 1): [7]}, "have all their tokens in common")
        assert refused({(1, 2): [7]}, "")
        context.decode({0: [7], 1: [7]})
        context.remove(1)
        context.decode({(1, 2): [7, 8]})
        assert refused({(0, 1): [7]}, "")
    with Context(embedded, unified=False, verbose=True) as context:
        assert context.try_decode({(0, 1): [5]}) != 0
        assert "--kv-unified" in capfd.readouterr().err
        context.decode({0: [5], 1: [6]})


def test_no_room_for_copies_of_a_prompt(embedded: Path) -> None:
    """Where the whole prompt is kept until it ends: the sequences go on together, and one by one when others are gone."""
    with Context(embedded, overrides={"lukv.policy": "prefill"}, n_ctx=512) as context:
        context.decode({(0, 1, 2): random_tokens(300)})
        assert context.try_decode({0: [5]}) != 0
        assert not llama_cpp.llama_memory_seq_rm(context.memory, 1, 100, -1)
        assert [context.length(s) for s in range(3)] == [300] * 3
        context.decode({(0, 1, 2): [5]})
        assert runtime.usage(context.ctx).evictions > 0
        context.remove(0)
        context.remove(2)
        context.decode({1: [5]})
        assert [context.length(s) for s in range(3)] == [0, 302, 0]


def test_commit_gives_sequences_their_share(tiny: TinyModel, embedded: Path) -> None:
    """Sequences that grew since they got their cells keep what they are due, not what they had with their first token."""
    plain = plain_cache(tiny, 256, 64, "random")
    with Context(embedded, overrides={"lukv.metric": "random"}, n_ctx=256, n_ubatch=64) as context:
        for cache in (plain, context):
            for i in range(10):
                cache.decode({s: random_tokens(8, 100 * i + s) for s in (0, 3)})
            for i in range(27):
                cache.decode({s: random_tokens(1, 100 * i + s) for s in range(4)})
        plain.commit()
        runtime.commit(context.ctx)
        assert_same_cells(context, plain, tiny)
        assert all((runtime.usage(context.ctx, s).owned >= SINK + RECENT).all() for s in range(4))


class CacheMachine(RuleBasedStateMachine):
    """Any operations on a live cache, and the same ones on the plain one.

    Cells are ranked by a hash of their position: scores that come from keys change places where they are almost equal.
    """

    tiny: TinyModel
    embedded: Path

    @initialize()
    def start(self) -> None:
        self.context = Context(self.embedded, overrides={"lukv.metric": "random"}, n_ctx=256, n_ubatch=64)
        self.plain = plain_cache(self.tiny, 256, 64, "random")

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__()

    @rule(sequence=st.integers(0, N_SEQUENCES - 1), sizes=st.lists(st.integers(1, 32), min_size=1, max_size=4))
    def prompt(self, sequence: int, sizes: list[int]) -> None:
        """Up to 32 tokens at a time: flash attention computes with f32 there."""
        for i, n in enumerate(sizes):
            self._decode({sequence: random_tokens(n, 10 * n + i)})

    @rule(sequences=st.sets(st.integers(0, N_SEQUENCES - 1), min_size=2), n=st.integers(1, 8), times=st.integers(1, 40))
    def generate(self, sequences: set[int], n: int, times: int) -> None:
        for i in range(times):
            self._decode({s: random_tokens(n, 100 * i + s) for s in sorted(sequences)})

    @rule(data=st.data(), n=st.integers(1, 8), times=st.integers(1, 20))
    def read_together(self, data: st.DataObject, n: int, times: int) -> None:
        """Tokens of several sequences that are the same so far, beside others."""
        empty = sorted({*range(N_SEQUENCES)} - {*self.plain.lengths})
        same = [sequences for sequences in [empty, *self.plain.twins] if len(sequences) > 1]
        if not same:
            return
        together = data.draw(st.sets(st.sampled_from(data.draw(st.sampled_from(same))), min_size=2))
        others = data.draw(st.sets(st.sampled_from(range(N_SEQUENCES)))) - together
        for i in range(times):
            self._decode({s: random_tokens(n, 100 * i + k) for k, s in enumerate([tuple(together), *sorted(others)])})

    @precondition(lambda self: self.plain.lengths)
    @rule(data=st.data())
    def remove_tail(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.plain.lengths)))
        n_past = data.draw(st.integers(0, self.plain.lengths[sequence]))
        self.context.remove(sequence, n_past)
        self.plain.truncate(sequence, n_past)

    @precondition(lambda self: self.plain.lengths)
    @rule(data=st.data())
    def keep_one(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.plain.lengths)))
        self.context.keep(sequence)
        self.plain.keep(sequence)

    @precondition(lambda self: 0 < len(self.plain.lengths) < N_SEQUENCES)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.plain.lengths)))
        target = data.draw(st.sampled_from(sorted({*range(N_SEQUENCES)} - {*self.plain.lengths})))
        self.context.copy(source, target)
        self.plain.copy(source, target)

    @precondition(lambda self: 0 < len(self.plain.lengths) < N_SEQUENCES)
    @rule(data=st.data())
    def save_and_restore(self, data: st.DataObject) -> None:
        """A state that is restored is a copy."""
        source = data.draw(st.sampled_from(sorted(self.plain.lengths)))
        target = data.draw(st.sampled_from(sorted({*range(N_SEQUENCES)} - {*self.plain.lengths})))
        assert self.context.restore(self.context.save(source), target)
        self.plain.copy(source, target)

    @precondition(lambda self: self.plain.lengths)
    @rule()
    def save_and_restore_all(self) -> None:
        """Everything goes on as if nothing had happened."""
        assert self.context.restore(self.context.save())

    @rule()
    def commit(self) -> None:
        runtime.commit(self.context.ctx)
        self.plain.commit()

    @rule()
    def check(self) -> None:
        assert_same_cells(self.context, self.plain, self.tiny)

    def _decode(self, batch: dict[int, list[int]]) -> None:
        want, got = self.plain.decode(batch), self.context.decode(batch)
        for sequence in batch:
            assert nmse(got[sequence], want[sequence].numpy()) < 1e-8
        self.check()


# a failing case takes minutes to shrink: run it with more examples and Phase.shrink by hand
PHASES = [Phase.explicit, Phase.generate]


def test_any_operations_equal_reference(tiny: TinyModel, embedded: Path) -> None:
    """The same ten examples each time; LUKV_TEST_EXAMPLES=N tries N others."""
    n = os.environ.get("LUKV_TEST_EXAMPLES")
    machine = type("Machine", (CacheMachine,), {"tiny": tiny, "embedded": embedded})
    options = settings(max_examples=int(n or 10), derandomize=not n, stateful_step_count=20, deadline=None, phases=PHASES)
    run_state_machine_as_test(machine, settings=options)


def test_more_sequences_than_there_is_room_for(embedded: Path) -> None:
    with Context(embedded, n_seq_max=2) as context:
        context.decode({0: [5, 6, 7]})
        context.decode({1: [5, 6, 7]})
        assert context.try_decode({2: [5]}) != 0
        context.remove(0)
        context.decode({0: [5, 6, 7]})


def test_memory_of_several_sequences(tiny: TinyModel, embedded: Path) -> None:
    """The cells are shared: more sequences take a little room for their tokens in flight, and never more than stock."""
    cell, heads = 2 * tiny.d_head * 2, tiny.n_layer * tiny.n_head_kv
    for n_seq_max, n_ctx in [(4, 2048), (16, 2048), (256, 512)]:
        with Context(embedded, n_ctx=n_ctx, n_seq_max=n_seq_max, kv_type=F16) as context:
            sums = n_seq_max * heads * tiny.d_head * 4  # of the metric
            size = runtime.usage(context.ctx).bytes - sums
            few = (n_seq_max - 1) * (64 + SINK + RECENT + 2)
            assert size <= 1.02 * (RATIO * n_ctx + 128 + few) * heads * cell
            assert size <= 1.02 * (n_ctx + 256) * heads * cell


def test_generation_goes_on_past_the_context(embedded: Path) -> None:
    """The cells do not become more, and llama.cpp's graph sees the true positions."""
    with Context(embedded, n_ctx=256, n_ubatch=64) as context:
        size = runtime.usage(context.ctx).bytes
        for i in range(12):
            context.decode({0: random_tokens(64, i)})
        for i in range(40):
            context.decode({0: random_tokens(1, i)})
        usage = runtime.usage(context.ctx)
        assert context.length(0) == 808 and usage.bytes == size
        assert (usage.used <= usage.owned + 64).all()


def test_states_of_other_tables(embedded: Path) -> None:
    """Refused, unless nothing was evicted yet under the policy that keeps the whole prompt."""
    tokens = random_tokens(200)
    with Context(embedded) as context, Context(embedded, overrides={"lukv.ratio": 0.3}) as other:
        context.decode({0: tokens})
        assert not other.restore(context.save(0), 0)
        assert other.length(0) == 0
        other.decode({0: tokens})  # and goes on as before

    options = {"lukv.policy": "prefill"}
    with Context(embedded, overrides=options) as context, Context(embedded, overrides=options | {"lukv.ratio": 0.5}) as other:
        context.decode({0: tokens})
        assert other.restore(context.save(0), 0)
        context.decode({0: [5]})
        other.decode({0: [5]})
        assert runtime.usage(other.ctx).used.sum() > 1.5 * runtime.usage(context.ctx).used.sum()
        assert not other.restore(context.save(0), 1)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_damaged_states(tmp_path: Path, arch: str) -> None:
    """Refused: the sequence is empty then, and another one sees nothing of it."""
    plain, path = tmp_path / "plain.gguf", tmp_path / "lukv.gguf"
    tiny = write_tiny(plain, arch, n_layer=4, d_head=64)
    embed(plain, path, metadata(uneven_budget(tiny.n_layer, tiny.n_head_kv, RATIO), RATIO))
    with Context(path, flash_attn=False) as context:  # here NaNs pass through a mask
        context.decode({1: random_tokens(150)})
        context.decode({0: random_tokens(200, 1)})
        state = context.save(0)
        context.remove(0)

        def next_logits() -> np.ndarray:
            logits = context.decode({1: [5]})[1]
            context.remove(1, 150)
            return logits

        expected = next_logits()
        rng, n = np.random.default_rng(2), len(state) // 3
        starts = [0, len(state) - n, *rng.integers(0, len(state) - n, 4)]
        damaged = [state[:start] + bytes([255]) * n + state[start + n :] for start in starts]
        truncated = [state[:end] for end in [1, len(state) - 1, *rng.integers(1, len(state), 4)]]
        for bad in damaged + truncated:
            assert not context.restore(bad, 0)
            assert context.length(0) == 0
            assert nmse(expected, next_logits()) < 1e-9
        assert context.restore(state, 0) and context.length(0) == 200
