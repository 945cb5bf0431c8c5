"""Which tasks a suite has, and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import lm, longbench, ruler
from lukv_gguf.evaluate.tasks import Sample

NAMES = ("smoke", "ruler", "longbench", "lm")
_SMOKE = ("niah_single_2", "niah_multikey_1")


@dataclass(frozen=True)
class Defaults:
    """Contexts of each task and their lengths, where the user says nothing."""

    n: int
    lengths: tuple[int, ...]


DEFAULTS = {
    "smoke": Defaults(4, (1024,)),
    "ruler": Defaults(8, (4096,)),
    "longbench": Defaults(20, (8192,)),
    "lm": Defaults(4, (4096,)),
}


def tasks(suite: str, folder: Path | None = None) -> list[str]:
    """Names of a suite's tasks; `folder` holds LongBench's files.

    Raises
    ------
    LukvError
        The files are missing.
    """
    if suite == "longbench":
        if folder is None:
            raise LukvError("the suite longbench reads a local copy of its files: say where with --longbench DIR")
        return longbench.tasks(folder)
    return {"smoke": list(_SMOKE), "ruler": ruler.tasks(), "lm": []}[suite]


def samples(
    suite: str, names: Sequence[str], tokenizer: Any, lengths: Sequence[int], n: int, seed: int, folder: Path | None
) -> list[Sample]:
    """Samples of the named tasks of a suite: `n` contexts of each length."""
    made: list[Sample] = []
    for length in lengths:
        for name in names:
            if suite == "longbench" and folder is not None:
                made += longbench.make_samples(name, tokenizer, folder, length, n)
            else:
                made += ruler.make_samples(name, tokenizer, length, n, seed)
    return made


def texts(suite: str, tokenizer: Any, lengths: Sequence[int], n: int, seed: int) -> list[lm.Text]:
    """Texts for language modelling; none for the other suites."""
    return [text for length in lengths for text in lm.make_texts(tokenizer, length, n, seed)] if suite == "lm" else []
