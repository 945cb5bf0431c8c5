"""The metrics and their registry: each one against its formula in plain numpy, on states of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny

from lukv_gguf import cli, metrics
from lukv_gguf.collect import Collector
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Metric, Needs
from lukv_gguf.metrics.shares import _turns
from lukv_gguf.reference import ReferenceModel
from lukv_gguf.reference.bounded import BoundedDecoder

N_TOKEN, SINK, RECENT, WINDOW, FUTURE = 90, 3, 4, 12, 50
ALL = Needs(True, WINDOW, True, True, FUTURE, True, True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("metrics") / "tiny.gguf", n_head=6, n_head_kv=2).path


@pytest.fixture(scope="module")
def model(path: Path) -> ReferenceModel:
    return ReferenceModel.load(path)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(0).integers(3, 299, N_TOKEN).tolist()


@pytest.fixture(scope="module")
def states(model: ReferenceModel, tokens: list[int]) -> list[LayerState]:
    found: list[LayerState] = []
    collector = Collector(ALL, SINK, RECENT)
    model.prefill(tokens, observer=lambda *layer: found.append(collector(*layer)))
    return found


@pytest.fixture(scope="module")
def queries(model: ReferenceModel, tokens: list[int]) -> list[np.ndarray]:
    """All queries of each layer after RoPE, [n_head, T, d]."""
    found: list[np.ndarray] = []
    model.prefill(tokens, observer=lambda _, index, layer, q, k, v: found.append(q.double().numpy()))
    return found


def causal_attention(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Attention weights [T, T] of a head."""
    scores = q @ k.T / np.sqrt(k.shape[1])
    scores[np.triu_indices(len(k), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def attention_of_groups(state: LayerState, q: np.ndarray) -> np.ndarray:
    """[H, G, T, T]."""
    keys = state.keys.double().numpy()
    return np.array([[causal_attention(q[3 * h + g], keys[h]) for g in range(3)] for h in range(2)])


def pooled(values: np.ndarray, kernel: int) -> np.ndarray:
    """Average pooling along the last axis, zeros beyond the ends."""
    return np.apply_along_axis(lambda row: np.convolve(row, np.ones(kernel) / kernel, "same"), -1, values)


def rotate(x: np.ndarray, position: float) -> np.ndarray:
    """RoPE as llama's GGUF files have it, pairs side by side: x [..., d]."""
    d = x.shape[-1]
    angles = position * 10000.0 ** (-np.arange(0, d, 2) / d)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angles) - x[..., 1::2] * np.sin(angles)
    out[..., 1::2] = x[..., 0::2] * np.sin(angles) + x[..., 1::2] * np.cos(angles)
    return out


def test_knorm(states: list[LayerState]) -> None:
    for state in states:
        np.testing.assert_allclose(metrics.get("knorm").score(state), -np.linalg.norm(state.keys, axis=-1), rtol=1e-6)


def test_keydiff_is_minus_the_cosine_with_the_mean_direction() -> None:
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    scores = metrics.get("keydiff").score(LayerState(keys))
    assert scores.shape == (2, 50)
    for head, got in zip(keys.double().numpy(), scores.numpy()):
        unit = head / np.linalg.norm(head, axis=1, keepdims=True)
        anchor = unit.mean(axis=0)
        np.testing.assert_allclose(got, -unit @ anchor / np.linalg.norm(anchor), atol=1e-6)


def test_keydiff_keeps_the_odd_one_out() -> None:
    keys = torch.ones(1, 20, 4)
    keys[0, 7] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert metrics.get("keydiff").score(LayerState(keys)).argmax().item() == 7


def test_keydiff_does_not_see_the_length_of_keys() -> None:
    keys = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(1, 30, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    metric = metrics.get("keydiff")
    torch.testing.assert_close(metric.score(LayerState(keys)), metric.score(LayerState(keys * lengths)))


def test_streamingllm_ranks_by_position() -> None:
    scores = metrics.get("streamingllm").score(LayerState(torch.zeros(2, 4, 8), positions=torch.tensor([0, 5, 6, 90])))
    assert scores.tolist() == [[0, 5, 6, 90]] * 2


def murmur_mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_random_is_the_same_everywhere() -> None:
    metric = metrics.get("random", seed=5)
    scores = metric.score(LayerState(torch.zeros(2, 300, 8), layer=7, head=1))
    for head, position in ((0, 0), (1, 299)):
        x = 5
        for number in (7, 1 + head, position):
            x = murmur_mix((murmur_mix(x) + number) % 2**32)
        assert scores[head, position].item() == pytest.approx((x >> 8) / 2**24, abs=1e-9)
    part = metric.score(LayerState(torch.zeros(1, 2, 8), positions=torch.tensor([3, 299]), layer=7, head=2))
    assert part.tolist() == [[scores[1, 3].item(), scores[1, 299].item()]]
    assert 0.45 < scores.mean() < 0.55 and 0.25 < scores.std() < 0.33
    assert abs(np.corrcoef(scores[0], scores[1])[0, 1]) < 0.15
    assert not torch.equal(scores, metrics.get("random").score(LayerState(torch.zeros(2, 300, 8), layer=7, head=1)))


@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv(states: list[LayerState], queries: list[np.ndarray], kernel: int) -> None:
    metric = metrics.get("snapkv", window=WINDOW, kernel=kernel)
    for state, q in zip(states, queries):
        seen = attention_of_groups(state, q)[:, :, -WINDOW:].mean(axis=2)[..., :-WINDOW]
        got = metric.score(state).numpy()
        np.testing.assert_allclose(got[:, :-WINDOW], pooled(seen, kernel).mean(axis=1), rtol=1e-4, atol=1e-7)
        assert got[:, -WINDOW:].min() > 1.0 and (np.diff(got[:, -WINDOW:]) > 0).all()


def test_cake(states: list[LayerState], queries: list[np.ndarray]) -> None:
    metric = metrics.get("cake", window=WINDOW, gamma=30.0)
    for state, q in zip(states, queries):
        window = attention_of_groups(state, q)[:, :, -WINDOW:]
        seen = window.mean(axis=2) + 30.0 * window.var(axis=2, ddof=1)
        got = metric.score(state).numpy()
        np.testing.assert_allclose(
            got[:, :-WINDOW], pooled(seen[..., :-WINDOW], 5).mean(axis=1), rtol=1e-3, atol=1e-6
        )
        assert got[:, -WINDOW:].min() > got[:, :-WINDOW].max()


def test_a_window_metric_sees_cells_that_are_left(states: list[LayerState]) -> None:
    """Evicted cells take no attention, and the queries do not see cells behind them."""
    keep = torch.tensor([0, 1, 2, 9, 30, 31, 40, 79, 83, 86, 89])
    state = replace(states[1], keys=states[1].keys[:, keep], positions=keep, n_past=N_TOKEN)
    got = metrics.get("snapkv", window=WINDOW, kernel=1).score(state)
    keys, q = state.keys.double().numpy(), state.queries.double().numpy()
    for head in range(2):
        seen = []
        for g in range(3):
            for i in range(WINDOW):
                visible = keep.numpy() <= N_TOKEN - WINDOW + i
                weights = np.exp(q[3 * head + g, i] @ keys[head].T / 4.0) * visible
                seen.append(weights / weights.sum())
        np.testing.assert_allclose(got[head, :7], np.mean(seen, axis=0)[:7], rtol=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "cake", "criticalkv-snapkv"])
def test_carry_keeps_the_largest_of_what_was_said(states: list[LayerState], name: str) -> None:
    plain, carrying = metrics.get(name, window=WINDOW), metrics.get(name, window=WINDOW, carry=1)
    now = plain.carry(states[0])
    past = torch.rand(now.shape, generator=torch.Generator().manual_seed(0)) * now.max()
    past[:, -WINDOW:] = 0.0
    both = carrying.carry(replace(states[0], past=past))
    torch.testing.assert_close(both, torch.maximum(now, past))
    assert (both > now).any() and (both > past).any() and carrying.needs.past and not plain.needs.past
    torch.testing.assert_close(carrying.score(states[0]), plain.score(states[0]))  # all cells are new
    if not name.startswith("critical"):
        scores = carrying.score(replace(states[0], past=past))
        torch.testing.assert_close(scores[:, :-WINDOW], both[:, :-WINDOW])


def test_without_queries_there_is_no_attention() -> None:
    state = LayerState(torch.randn(1, 6, 8), queries=torch.empty(2, 0, 8), n_past=6)
    scores = metrics.get("snapkv", window=2).score(state)
    assert scores[0, :4].tolist() == [0, 0, 0, 0] and scores[0, 4] < scores[0, 5]
    assert metrics.get("cake", window=2).score(state)[0, :4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("average", [0, 1])
def test_h2o(states: list[LayerState], queries: list[np.ndarray], average: int) -> None:
    for state, q in zip(states, queries):
        expected = attention_of_groups(state, q).sum(axis=2).mean(axis=1)
        if average:
            expected = expected / np.arange(N_TOKEN, 0, -1)
        np.testing.assert_allclose(metrics.get("h2o", average=average).score(state), expected, rtol=1e-4)


def query_statistics(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of queries before RoPE, brought to the next positions: [n_head, d], [n_head, d, d]."""
    plain = np.stack([rotate(q[:, i], -i) for i in range(SINK, N_TOKEN)], axis=1)
    mean, covariance = plain.mean(axis=1), np.array([np.cov(head.T, bias=True) for head in plain])
    turns = np.mean([rotate(np.eye(q.shape[-1]), N_TOKEN + i).T for i in range(FUTURE)], axis=0)
    return mean @ turns.T, turns @ covariance @ turns.T


@pytest.mark.parametrize("options", [{}, {"vnorm": 0}, {"covariance": 0}])
def test_expectedattention(states: list[LayerState], queries: list[np.ndarray], options: dict[str, int]) -> None:
    for state, q in zip(states, queries):
        mean, covariance = query_statistics(q)
        got = metrics.get("expectedattention", future=FUTURE, **options).score(state).numpy()
        for head, keys in enumerate(state.keys.double().numpy()):
            expected = np.zeros(N_TOKEN - SINK)
            for g in range(3 * head, 3 * head + 3):
                scores = keys[SINK:] @ mean[g] / 4.0
                if options.get("covariance", 1):
                    scores += np.einsum("ti,ij,tj->t", keys[SINK:], covariance[g], keys[SINK:]) / 32.0
                weights = np.exp(scores - scores.max())
                expected += weights / weights.sum() / 3
            if options.get("vnorm", 1):
                expected = (expected + 0.02) * np.linalg.norm(state.values[head].double(), axis=-1)[SINK:]
            np.testing.assert_allclose(got[head, SINK:], expected, rtol=2e-3, atol=1e-7)


def test_capkv(states: list[LayerState], queries: list[np.ndarray]) -> None:
    for state, q in zip(states, queries):
        mean, _ = query_statistics(q)
        got = metrics.get("capkv", future=FUTURE, tau=3.0).score(state).numpy()
        for head, (keys, values) in enumerate(zip(state.keys.double().numpy()[:, SINK:], state.values.double().numpy()[:, SINK:])):
            expected = np.zeros(N_TOKEN - SINK)
            for g in range(3 * head, 3 * head + 3):
                cosines = keys @ mean[g] / np.linalg.norm(keys, axis=1) / np.linalg.norm(mean[g])
                weights = np.exp(3.0 * (cosines - cosines.max()))
                capacity = np.eye(values.shape[1]) + (values.T * (weights + 1e-6)) @ values
                expected += weights * np.einsum("ti,ij,tj->t", values, np.linalg.inv(capacity), values) / 3
            np.testing.assert_allclose(got[head, SINK:], expected, rtol=1e-3)


@pytest.mark.parametrize("block", [16, 0])
def test_curdkv(states: list[LayerState], block: int) -> None:
    for state in states:
        shares = []
        for vectors in (state.keys.double().numpy(), state.values.double().numpy()):
            squares = (vectors**2).sum(axis=-1)
            ends = range(0, N_TOKEN, block or N_TOKEN)
            parts = [squares[:, i : i + (block or N_TOKEN)] for i in ends]
            shares.append(np.concatenate([part / part.sum(axis=1, keepdims=True) for part in parts], axis=1))
        np.testing.assert_allclose(metrics.get("curdkv", block=block).score(state), shares[0] * shares[1], rtol=1e-5)


def test_output_norms(states: list[LayerState], model: ReferenceModel) -> None:
    for layer, state in enumerate(states):
        weight = model.output_weight(layer).double()
        for head, g in np.ndindex(2, 3):
            expected = (state.values[head].double() @ weight[head, g]).abs().sum(dim=-1)
            np.testing.assert_allclose(state.output_norms[head, g], expected, rtol=1e-5)


@pytest.mark.parametrize("base", ["snapkv", "expectedattention"])
def test_criticalkv_is_a_choice_in_two_stages(states: list[LayerState], base: str) -> None:
    params = {"window": WINDOW} if base == "snapkv" else {"future": FUTURE}
    of_base = params | ({"vnorm": 0} if base == "expectedattention" else {})
    for state in states:
        first = metrics.get(base, **of_base).score(state).masked_fill(state.is_protected, torch.inf)
        product = (first + 1e-4) * state.output_norms.mean(dim=1)
        got = metrics.get(f"criticalkv-{base}", **params).score(state)
        for head in range(2):
            for budget in (8, 21, 40, 89):
                chosen = set(first[head].argsort(descending=True, stable=True)[: budget // 2].tolist())
                rest = [i for i in product[head].argsort(descending=True, stable=True).tolist() if i not in chosen]
                chosen |= set(rest[: budget - len(chosen)])
                assert set(got[head].argsort(descending=True)[:budget].tolist()) == chosen


@pytest.mark.parametrize(
    ("other", "params", "defaults", "share"),
    [
        ("expectedattention", {"future": FUTURE}, {"covariance": 0, "vnorm": 0}, None),
        ("expectedattention", {"future": FUTURE, "covariance": 1, "vnorm": 1}, {}, 0.625),
        ("kvzip", {}, {}, 0.25),
    ],
)
def test_keydiff_and_another_share_a_budget(
    states: list[LayerState], other: str, params: dict[str, int], defaults: dict[str, int], share: float | None
) -> None:
    for state in states:
        reconstruction = torch.rand(2, state.keys.shape[1], generator=torch.Generator().manual_seed(0))
        state = replace(state, reconstruction=reconstruction)
        got = metrics.get(f"keydiff-{other}", **params, **({} if share is None else {"share": share})).score(state)
        orders = [
            metric.score(state).masked_fill(state.is_protected, torch.inf).argsort(descending=True, stable=True).tolist()
            for metric in (metrics.get("keydiff"), metrics.get(other, **params, **defaults))
        ]
        for head in range(2):
            for budget in (8, 21, 40, 89):
                chosen = orders[0][head][: int((0.75 if share is None else share) * budget)]
                chosen = chosen + [i for i in orders[1][head] if i not in chosen][: budget - len(chosen)]
                assert set(got[head].argsort(descending=True)[:budget].tolist()) == set(chosen)


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))), st.floats(0, 1))
def test_turns_hold_for_every_budget(orders: tuple[list[int], list[int]], share: float) -> None:
    first, second = orders
    ranking = _turns(first, second, share).argsort()[::-1]
    for budget in range(len(first) + 1):
        chosen = first[: int(share * budget)]
        chosen = chosen + [i for i in second if i not in chosen][: budget - len(chosen)]
        assert set(ranking[:budget].tolist()) == set(chosen)


def test_a_decoder_that_evicts_nothing_collects_the_same(
    model: ReferenceModel, tokens: list[int], states: list[LayerState]
) -> None:
    class Everything(Metric):
        name, needs = "everything", ALL

        def score(self, state: LayerState) -> torch.Tensor:
            raise AssertionError("nothing is evicted")

    decoder = BoundedDecoder(model, Everything(), np.full((3, 2), N_TOKEN), n_recent=64, sink=SINK, recent=RECENT)
    for batch in (tokens[:40], tokens[40:41], tokens[41:80], tokens[80:]):
        decoder.decode(batch)
    for layer, want in enumerate(states):
        for head in range(2):
            got, group = decoder._state(layer, head), slice(3 * head, 3 * head + 3)
            pairs = [
                (got.keys[0], want.keys[head]), (got.values[0], want.values[head]), (got.queries, want.queries[group]),
                (got.query_mean, want.query_mean[group]), (got.query_covariance, want.query_covariance[group]),
                (got.future_rotation, want.future_rotation), (got.output_norms[0], want.output_norms[head]),
                (got.attention_sums, want.attention_sums[group]),
                (got.is_protected, want.is_protected), (got.is_sink, want.is_sink),
            ]  # fmt: skip
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_anchor_of_keydiff_remembers_evicted_keys(
    model: ReferenceModel, tokens: list[int], states: list[LayerState]
) -> None:
    """The keys of the first layer do not depend on what was evicted; those of a tail that was removed at once do not count."""
    metric = metrics.get("keydiff")
    decoder = BoundedDecoder(model, metric, np.full((3, 2), 12), n_recent=32, sink=SINK, recent=RECENT)
    for batch in (tokens[:30], tokens[30:60], tokens[60:80], tokens[5:12]):
        decoder.decode(batch)
        if batch == tokens[60:80]:
            decoder.commit()
    decoder.truncate(80)
    decoder.decode(tokens[80:])
    decoder.commit()
    for head, keys in enumerate(states[0].keys):
        unit = keys.double().numpy() / np.linalg.norm(keys.double().numpy(), axis=1, keepdims=True)
        kept = decoder.positions(0, head)
        assert len(kept) == 12
        total, left = unit.sum(axis=0), unit[kept].sum(axis=0)
        assert total @ left / np.linalg.norm(total) / np.linalg.norm(left) < 0.98  # it makes a difference
        state = decoder._state(0, head)
        np.testing.assert_allclose(state.key_sum[0], total, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(metric.score(state)[0], -unit[kept] @ total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3", "smollm3", "granite"])
def test_queries_before_rope(arch: str, tmp_path: Path) -> None:
    """The rotation is undone, whatever its scaling: the mean query at one next position is that of rotated queries."""
    model = ReferenceModel.load(write_tiny(tmp_path / "tiny.gguf", arch, rope_factors=arch == "phi3", n_layer=4).path)
    tokens = np.random.default_rng(1).integers(3, 299, 30).tolist()
    collector, found = Collector(Needs(query_mean=True, n_future=1)), []

    def look(model, index, layer, q, k, v):
        state = collector(model, index, layer, q, k, v)
        found.append((layer, q, state.query_mean @ state.future_rotation.T))

    model.prefill(tokens, observer=look)
    for layer, q, got in found:
        plain = q.transpose(0, 1)
        if layer.rope is not None:
            at = torch.arange(30)
            once = layer.rope.rotate(layer.rope.unrotate(plain, layer.rope.at(at)), layer.rope.at(at))
            torch.testing.assert_close(once, plain, rtol=1e-3, atol=1e-4)
            plain = layer.rope.unrotate(plain, layer.rope.at(at))
            plain = layer.rope.rotate(plain, layer.rope.at(torch.full((30,), 30)))
        torch.testing.assert_close(got, plain.mean(dim=0), rtol=1e-3, atol=1e-4)


def test_every_metric_is_found_by_its_name() -> None:
    assert "keydiff" in metrics.names()
    for name in metrics.names():
        metric = metrics.get(name)
        assert metric.name == name and metric.summary and metric.cost
        assert all(isinstance(value, (int, float)) for value in metric.params.values())
    assert metrics.parse(" snapkv:window=16 : kernel=7").params == {"window": 16, "kernel": 7, "carry": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "unknown metric 'nonsense'; known metrics: .*keydiff"),
        ("criticalkv", "unknown metric"),
        ("criticalkv-knorm", "unknown metric"),
        ("keydiff-keydiff", "unknown metric"),
        ("keydiff:window=8", "keydiff has no parameter window"),
        ("snapkv:window", "write parameters as snapkv:PARAM=NUMBER"),
        ("snapkv:window=0", "window must be a whole number of at least 1"),
        ("snapkv:window=1.5", "window must be a whole number"),
        ("snapkv:kernel=4", "kernel must be odd"),
        ("keydiff-kvzip:share=1.5", "share must be a number of at most 1"),
        ("expectedattention:epsilon=nan", "epsilon must be a number"),
        ("random:seed=-1", "seed must be a whole number"),
        ("random:seed=9999999999", "seed must be a whole number"),
    ],
)
def test_bad_metrics_are_told(text: str, message: str) -> None:
    with pytest.raises(LukvError, match=message):
        metrics.parse(text)


def test_union_of_needs() -> None:
    needs = Needs.union([Needs(window=3, values=True), Needs(window=5), Needs(query_mean=True)])
    assert needs == Needs(values=True, window=5, query_mean=True)
    assert needs.names() == ["values", "window 5", "query_mean"] and Needs.union([]) == Needs()


def test_the_command_lists_them() -> None:
    result = CliRunner().invoke(cli.cli, ["metrics"])
    assert result.exit_code == 0 and "expectedattention: keeps what" in result.output
    listed = json.loads(CliRunner().invoke(cli.cli, ["metrics", "--json"]).output)["metrics"]
    assert [row["name"] for row in listed] == metrics.names()
    by_name = {row["name"]: row for row in listed}
    assert by_name["keydiff"]["runs"] == ["profile", "native"]
    assert by_name["snapkv"] | {"runs": None} == {
        "name": "snapkv", "summary": metrics.get("snapkv").summary, "parameters": {"window": 32, "kernel": 5, "carry": 0},
        "needs": ["window 32"], "cost": "w G T d", "runs": None,
    }  # fmt: skip
