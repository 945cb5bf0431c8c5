"""The metric foresight: its formula, the traces and the training of a scorer, the file, and the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import random_scorer
from tiny_gguf import CHAT_TEMPLATE, TinyModel, write_tiny

from lukv_gguf import cli, metrics, oracle
from lukv_gguf.collect import Collector
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import encode_pair, read_header, rewrite
from lukv_gguf.metadata import SCORER_TYPES, read_metadata
from lukv_gguf.metrics import LayerState
from lukv_gguf.metrics.foresight import Foresight, network
from lukv_gguf.profile import Protocol
from lukv_gguf.reference import ReferenceModel
from lukv_gguf.scorer import ARRAYS, FEATURES, Scorer, load_scorer, save_scorer
from lukv_gguf.train_scorer import BLOCK, Example, Training, _TextState, golden_eviction, ranking_loss, train_layer

N_TOKEN, WINDOW = 90, 12
CONTEXT = " ".join(f"w{i * i % 39 + 1} and {i}" for i in range(80))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny(tmp_path_factory.mktemp("scorer") / "tiny.gguf", n_head=6, n_head_kv=2, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def scorer(tiny: TinyModel) -> Scorer:
    return random_scorer(3, 2, 16, WINDOW)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def test_formula(tiny: TinyModel, scorer: Scorer) -> None:
    """In plain numpy, in double precision, from queries and keys of the model."""
    states: list[LayerState] = []
    plain: list[np.ndarray] = []
    metric = Foresight(scorer)
    collector = Collector(metric.needs, 3, 4)
    model = ReferenceModel.load(tiny.path)
    model.prefill(np.random.default_rng(0).integers(3, 299, N_TOKEN).tolist(), observer=lambda *a: states.append(collector(*a)))
    for layer, state in enumerate(states):
        got = metric.score(state).numpy()
        for head in range(2):
            k, v = state.keys[head].double().numpy(), state.values[head].double().numpy()
            attention = []
            for g in range(3):
                scores = state.queries[3 * head + g].double().numpy() @ k.T / np.sqrt(16)
                scores[np.arange(N_TOKEN) > np.arange(N_TOKEN - WINDOW, N_TOKEN)[:, None]] = -np.inf
                attention.append(np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True))
            attention = np.concatenate(attention)
            unit = k / np.linalg.norm(k, axis=1, keepdims=True)
            anchor = unit.mean(axis=0)
            features = np.stack([
                unit @ anchor / np.linalg.norm(anchor),
                np.log(np.linalg.norm(k, axis=1)),
                np.log(np.linalg.norm(v, axis=1)),
                np.log(attention.mean(axis=0) + 1e-7),
                np.log(np.convolve(attention.mean(axis=0), np.ones(5) / 5, "same") + 1e-7),
                np.log(np.sqrt((attention**2).mean(axis=0)) + 1e-7),
                np.log(N_TOKEN - np.arange(N_TOKEN)),
            ])  # fmt: skip
            angles = np.arange(N_TOKEN)[:, None] * 10000.0 ** (-np.arange(0, 16, 2) / 16)
            pairs = (k[:, 0::2] + 1j * k[:, 1::2]) * np.exp(-1j * angles)
            before = np.stack([pairs.real, pairs.imag], axis=-1).reshape(N_TOKEN, 16)
            plain.append(before)
            x = np.concatenate([
                features, *(t.T / np.sqrt((t**2).mean(axis=1)) for t in (before, v))
            ])  # fmt: skip
            hidden = scorer.input[layer, head] @ x + scorer.bias[layer, head][:, None]
            expected = scorer.output[layer, head] @ (hidden / (1 + np.exp(-hidden))) + scorer.skip[layer, head] @ features
            np.testing.assert_allclose(got[head], expected, rtol=1e-4, atol=1e-4)


def test_golden_eviction_keeps_what_is_needed() -> None:
    """A cell that only a question needs, one that only the text needs, and one that nobody needs any more."""
    n, d = 8 * BLOCK, 4
    random = torch.Generator().manual_seed(0)
    blocks = torch.rand(8, 1, n, generator=random) * 1e-3
    for block in range(8):
        blocks[block, :, (block + 1) * BLOCK :] = 0
    blocks[7, 0, 5] = 1.0
    blocks[1, 0, 9] = 1.0
    importance = torch.rand(2, 1, n, generator=random) * 1e-3
    importance[0, 0, 7] = 1.0
    vectors = [torch.randn(1, n, d, generator=random) for _ in range(4)]
    state = _TextState(vectors[0], vectors[1], vectors[2], vectors[3], blocks=blocks)
    metric, training = Foresight(window=8), Training(ratio=0.25, window=8)
    examples = golden_eviction(state, importance, metric, training)
    n_keep = n // 4
    assert [example.future.shape[1] for example in examples] == [n_keep + BLOCK] * 4 + [n]
    keys = [example.inputs[0, :, len(FEATURES) : len(FEATURES) + d] for example in examples]
    of_key = torch.nn.functional.normalize(vectors[2][0], dim=-1) * 2

    def has(example: int, cell: int) -> bool:
        return bool((keys[example] - of_key[cell]).abs().sum(dim=-1).min() < 1e-4)

    assert all(has(i, 5) and has(i, 7) for i in range(5))
    assert has(0, 9) and not has(3, 9)
    for example in examples:
        torch.testing.assert_close(example.future.sum(dim=-1), torch.ones(1))
    # the last cells are those with most future at the step before
    assert examples[-1].future[0, 7] == examples[-1].future.max()


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_losses_prefer_the_right_order(n: int, seed: int) -> None:
    future = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) + torch.arange(n) * 1e-3
    for name in ("mass", "hinge"):
        right, wrong = (ranking_loss(sign * 10 * future, future, name) for sign in (1, -1))
        assert right < wrong
        one = ranking_loss(torch.zeros(1, n), future, name)
        assert one.item() == pytest.approx(np.log(2) if name == "mass" else 0.01, rel=1e-5)


def learnable(n_cell: int = 1000, seed: int = 0) -> Example:
    """Two heads with opposite needs: one wants a direction of the value, the other the sum of two features."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, n_cell, len(FEATURES) + 16, generator=random)
    inputs[..., : len(FEATURES)] = inputs[..., : len(FEATURES)] * 5 - 20
    logits = torch.stack([2 * inputs[0, :, -3].abs(), inputs[1, :, 2] + inputs[1, :, 4]])
    return Example(inputs, logits.softmax(dim=-1))


def test_training_finds_what_there_is_to_find() -> None:
    training, protocol = Training(n_step=400, n_hidden=8), Protocol()
    arrays = train_layer([learnable(seed=i) for i in range(4)], training, protocol, 0)
    assert {name: arrays[name].shape for name in ARRAYS} == {"input": (2, 8, 23), "bias": (2, 8), "output": (2, 8), "skip": (2, 7)}
    unseen = learnable(seed=99)
    scores = network(*(torch.from_numpy(arrays[name]) for name in ARRAYS), unseen.inputs)
    for got, future in zip(scores, unseen.future):
        best = future.sort(descending=True).values[:200].sum()
        assert future[got.topk(200).indices].sum() > 0.9 * best


def test_training_is_reproducible() -> None:
    training = Training(n_step=5)
    first, again = (train_layer([learnable()], training, Protocol(), 3) for _ in range(2))
    other = train_layer([learnable()], dataclasses.replace(training, seed=1), Protocol(), 3)
    for name in ARRAYS:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["input"], other["input"])


def test_file(scorer: Scorer, tmp_path: Path) -> None:
    save_scorer(tmp_path / "s.npz", scorer)
    found = load_scorer(tmp_path / "s.npz")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(scorer, name))
    assert (found.d_key, found.params, found.digest) == (scorer.d_key, scorer.params, scorer.digest)
    assert found.provenance["texts"] == "none" and "trained_on" in found.provenance
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "half.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-200])
    for name, message in (("other", "not a scorer"), ("text", "not a scorer"), ("half", "not a scorer"), ("gone", "cannot read")):
        with pytest.raises(LukvError, match=message):
            load_scorer(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": np.zeros((3, 2, 5))}, "bias has shape"),
        ({"skip": np.full((3, 2, 7), np.nan)}, "skip holds values that are not finite"),
        ({"d_key": 40}, "has no room"),
        ({"input": np.zeros((3, 2))}, "input has shape"),
    ],
)
def test_a_scorer_is_always_valid(scorer: Scorer, changes: dict, message: str) -> None:
    with pytest.raises(LukvError, match=message):
        dataclasses.replace(scorer, **changes)


def test_metric_without_its_scorer(scorer: Scorer) -> None:
    with pytest.raises(LukvError, match="needs a scorer"):
        metrics.parse_list("keydiff,foresight")
    with pytest.raises(LukvError, match="a scorer is for the metric foresight, not for keydiff"):
        metrics.parse_list("keydiff", scorer)
    with pytest.raises(LukvError, match="trained with {'window': 12, 'kernel': 5}, not"):
        metrics.parse("foresight:window=16", scorer)
    with pytest.raises(LukvError, match="kernel must be odd"):
        metrics.parse("foresight:kernel=4")
    with pytest.raises(LukvError, match="the scorer is for 3 layers x 2 KV heads with keys of 16 and values of 16, the model has 4"):
        metrics.parse("foresight", scorer).check_model(4, 2, 16, 16)
    assert metrics.parse("foresight", scorer).params == {"window": 12, "kernel": 5}


QUESTIONS = ["what is w7?", "how many?"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "context.txt").write_text(CONTEXT)
    (folder / "questions.json").write_text(json.dumps({"questions": QUESTIONS}))
    return folder / "context.txt", folder / "questions.json"


def test_from_training_to_the_embedded_model(tiny: TinyModel, text: tuple[Path, Path], tmp_path: Path) -> None:
    path, profile, target = tmp_path / "s.npz", tmp_path / "p.npz", tmp_path / "lukv.gguf"
    given_text = "--context", text[0], "--questions", text[1], "--n-context", 400, "--k-max", 4
    command = "train-scorer", tiny.path, "-o", path, *given_text, "--steps", 20, "--hidden", 4, "--window", 8
    result = run(*command)
    assert result.exit_code == 0, result.output
    scorer = load_scorer(path)
    assert scorer.shape == (3, 2, 16, 16) and scorer.n_hidden == 4 and scorer.params["window"] == 8
    assert scorer.digest in result.output and scorer.provenance["questions"] == "2"
    assert not list(tmp_path.glob("*.partial"))
    assert "exists" in run(*command).output
    assert run(*command, "-f").exit_code == 0 and load_scorer(path).digest == scorer.digest

    options = "--metric", "foresight", "--scorer", path
    result = run("profile", tiny.path, "-o", profile, *options, *given_text)
    assert result.exit_code == 0, result.output
    result = run("embed", tiny.path, "-o", target, "--profile", profile, *options)
    assert result.exit_code == 0, result.output
    meta = read_metadata(target)
    assert meta.metric == "foresight" and meta.metric_params == scorer.params and meta.scorer.digest == scorer.digest

    other = tmp_path / "other.npz"
    save_scorer(other, random_scorer(3, 2, 16, window=8))
    for wrong, message in (
        (("--metric", "foresight", "--scorer", other), "was made with another scorer"),
        (("--metric", "foresight"), "needs a scorer"),
        (("--metric", "foresight", "--scorer", tmp_path / "gone.npz"), "cannot read"),
        (("--metric", "keydiff", "--scorer", other, "--allocation", "uniform"), "holds nothing for the metric keydiff"),
    ):
        result = run("embed", tiny.path, "-o", tmp_path / "never.gguf", "--profile", profile, *wrong)
        assert result.exit_code == 1 and message in result.output
    result = run("embed", tiny.path, "-o", tmp_path / "never.gguf", "--scorer", other, "--allocation", "uniform")
    assert result.exit_code == 1 and "keydiff is none" in result.output
    assert not (tmp_path / "never.gguf").exists()


def test_an_interrupted_training_goes_on(
    tiny: TinyModel, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lukv_gguf import train_scorer

    texts = ["--context", text[0], "--questions", text[1]] * 2  # two texts
    options = *texts, "--n-context", 300, "--k-max", 3, "--steps", 5
    assert run("train-scorer", tiny.path, "-o", tmp_path / "whole.npz", *options).exit_code == 0
    trained, train = [], train_layer

    def interrupted(*arguments):
        trained.append(arguments[-1])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(train_scorer, "train_layer", interrupted)
    result = run("train-scorer", tiny.path, "-o", tmp_path / "s.npz", *options)
    assert result.exit_code == cli.EXIT_INTERRUPTED and "the same command goes on" in result.output
    assert not (tmp_path / "s.npz").exists()
    assert run("train-scorer", tiny.path, "-o", tmp_path / "s.npz", *options).exit_code == 0
    assert trained == [0, 1, 1, 2]
    assert load_scorer(tmp_path / "s.npz").digest == load_scorer(tmp_path / "whole.npz").digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "gone.txt", "--questions", "gone.json"], "cannot read"),
        (["--learning-rate", "0"], "learning rate above 0"),
        (["--golden-ratio", "1.5"], "must be in (0, 1]"),
        (["--n-context", "30"], "too short to train on"),
        (["--device", "abacus"], "not available"),
    ],
)
def test_bad_options(tiny: TinyModel, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("train-scorer", tiny.path, "-o", tmp_path / "s.npz", *options)
    assert result.exit_code == 1 and message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", sorted(SCORER_TYPES))
def test_damaged_keys_are_named(tiny: TinyModel, scorer: Scorer, tmp_path: Path, key: str) -> None:
    from test_metadata import make_metadata

    from lukv_gguf.metadata import embed

    path, damaged = tmp_path / "lukv.gguf", tmp_path / "damaged.gguf"
    embed(tiny.path, path, make_metadata(metric="foresight", metric_params=scorer.params, scorer=scorer))
    assert read_metadata(path).scorer.digest == scorer.digest
    header = read_header(path)
    rewrite(header, damaged, lambda k: k == key, [])
    with pytest.raises(LukvError, match=f"{key} is missing"):
        read_metadata(damaged)
    value = header.value(key)
    wrong = value[:-1] if isinstance(value, np.ndarray) else value + 1
    rewrite(header, damaged, lambda k: k == key, [encode_pair(key, SCORER_TYPES[key], wrong)])
    with pytest.raises(LukvError, match="lukv.scorer.input has|" + key):
        read_metadata(damaged)


def test_scorer_for_another_model(tiny: TinyModel, scorer: Scorer, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", n_head=4, n_head_kv=2, d_head=32)
    save_scorer(tmp_path / "s.npz", scorer)
    result = run("embed", other.path, "--metric", "foresight", "--scorer", tmp_path / "s.npz", "--allocation", "uniform")
    assert result.exit_code == 1 and "the scorer is for 3 layers x 2 KV heads with keys of 16" in result.output
