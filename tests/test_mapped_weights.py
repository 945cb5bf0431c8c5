"""Pages of a mapped model are given back, and the answers stay the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_answers import PREFIX, SUFFIXES
from tiny_gguf import write_tiny

from lukv_gguf import answers
from lukv_gguf.answers import decode_answers
from lukv_gguf.mapped_weights import MappedWeights, mapped_on_demand

pytestmark = pytest.mark.skipif(not MappedWeights.is_supported(), reason="needs Linux")


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    return sum(int(kib) << 10 for kib in re.findall(rf" {re.escape(str(path.resolve()))}\n(?:.*\n)*?Rss: +(\d+) kB", text))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """About 12 MB, most of them in eight layers."""
    return write_tiny(tmp_path / "tiny.gguf", n_layer=8, d_head=64, n_ff=1024).path


def test_answers_are_the_same_and_the_file_does_not_stay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    expected = decode_answers(model, PREFIX, SUFFIXES, 6, progress=lambda *_: held.append(resident(model)))
    assert max(held) > 0.9 * model.stat().st_size

    monkeypatch.setattr(answers, "_RELEASE_BYTES", 0)
    held.clear()
    within: list[int] = []
    enter = MappedWeights._enter

    def watched(self: MappedWeights, layer: int) -> None:
        within.append(resident(model))
        enter(self, layer)

    monkeypatch.setattr(MappedWeights, "_enter", watched)
    found = decode_answers(model, PREFIX, SUFFIXES, 6, progress=lambda *_: held.append(resident(model)))
    assert found == expected
    assert max(held[:-1]) < 0.05 * model.stat().st_size  # after each call of llama.cpp; the last one is after its end
    assert len(within) >= 8 * len(held[:-1]) and max(within) < 0.5 * model.stat().st_size


def test_an_interrupt_within_a_layer_is_not_lost(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    def interrupted(self: MappedWeights, layer: int) -> None:
        entered.append(layer)
        if len(entered) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers, "_RELEASE_BYTES", 0)
    monkeypatch.setattr(MappedWeights, "_enter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_answers(model, PREFIX, SUFFIXES, 6)
    assert len(entered) == 20


def test_a_model_is_mapped_without_reading_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lukv_gguf.reference.tokenizer import import_llama_cpp

    llama = import_llama_cpp()
    params = llama.llama_model_default_params()
    params.use_extra_bufts = False
    monkeypatch.delenv("LLAMA_MMAP_NO_PREFETCH", raising=False)
    for on_demand in (False, True):
        if on_demand:
            with mapped_on_demand():
                loaded = llama.llama_model_load_from_file(str(model).encode(), params)
        else:
            loaded = llama.llama_model_load_from_file(str(model).encode(), params)
        try:
            assert (resident(model) < 0.5 * model.stat().st_size) == on_demand
        finally:
            llama.llama_model_free(loaded)
