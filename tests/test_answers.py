"""Answers from llama.cpp: what they are, and that a LU-KV table does not touch them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny

from lukv_gguf import answers
from lukv_gguf.answers import decode_answers
from lukv_gguf.errors import LukvError
from lukv_gguf.metadata import LukvMetadata, embed
from lukv_gguf.reference import ReferenceModel


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, n).tolist()


PREFIX = random_tokens(600)
SUFFIXES = [random_tokens(5, seed=1), random_tokens(1, seed=2), random_tokens(3, seed=3)]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("queries_at_once", [63, 2])
def test_they_are_the_reference_models(
    arch: str, queries_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_QUERIES_AT_ONCE", queries_at_once)
    path = write_tiny(tmp_path / "tiny.gguf", arch).path
    model = ReferenceModel.load(path)
    prefix = model.prefill(PREFIX)
    expected = model.decode_batch(prefix, SUFFIXES, 6)
    assert decode_answers(path, PREFIX, SUFFIXES, 6) == expected
    end = {expected[0][2]}
    assert decode_answers(path, PREFIX, SUFFIXES, 6, end_tokens=end) == model.decode_batch(
        prefix, SUFFIXES, 6, end_tokens=end
    )


def test_a_table_in_the_file_changes_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf").path
    budget = np.full((3, 2), 0.1)
    table = LukvMetadata(
        ratio=0.1, metric="keydiff", sink=1, recent=1, policy="prefill",
        budget=budget, profile_ratios=[0.1], profile_budget=budget[None],
    )  # fmt: skip
    embed(path, tmp_path / "embedded.gguf", table)
    assert decode_answers(tmp_path / "embedded.gguf", PREFIX, SUFFIXES, 6) == decode_answers(path, PREFIX, SUFFIXES, 6)


def test_progress_is_told(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    decode_answers(
        write_tiny(tmp_path / "tiny.gguf").path, PREFIX, SUFFIXES, 6, progress=lambda *call: calls.append(call)
    )
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] == 600 + 5 + 1 + 3 + 3 * 5


def test_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(LukvError, match="at least one suffix"):
        decode_answers(tmp_path, [1], [[]], 3)
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(LukvError, match="x.gguf: "):
        decode_answers(tmp_path / "x.gguf", [1], [[2]], 3)
    unknown = write_tiny(tmp_path / "y.gguf").path
    unknown.write_bytes(unknown.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(LukvError, match="cannot load the model"):
        decode_answers(unknown, [1], [[2]], 3)
