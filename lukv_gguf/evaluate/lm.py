"""Language modelling on held-out prose: perplexity, divergence from the full cache, and the same words.

A text of `length` tokens is a context and a continuation. The context is cached and, where the cache is budgeted, brought
down to its budget; then the continuation is read, and what the model predicts for it is compared with what it predicts
with the full cache. Under the policy ``capacity`` tokens are evicted while the context is read, so there some places of
the context are compared, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.methods import Cell
from lukv_gguf.evaluate.session import Model, Session, State
from lukv_gguf.evaluate.tasks import novel
from lukv_gguf.replay import Replay, longest

MEASURES = ("perplexity", "kl", "top1", "greedy")
"""Perplexity of the continuation; mean KL(full || cell) per token, in nats; share of tokens whose best prediction is
the full cache's; share of a greedy continuation up to the first other token."""

_N_GREEDY = 64
_MOST_SCORED = 512  # tokens of the continuation, a quarter of the text at most
_N_IN_CONTEXT = 128  # places of the context that are compared
_GOLDEN = 0.6180339887  # steps that spread any number of texts evenly
_BINS = (8, 4)  # places for curves, of the context and of the continuation


@dataclass(frozen=True)
class Text:
    """A text in tokens: ``tokens[:n_context]`` is cached, the rest predicted."""

    index: int
    tokens: list[int]
    n_context: int

    @property
    def length(self) -> int:
        """Tokens of all."""
        return len(self.tokens)

    @property
    def n_cells(self) -> int:
        """Tokens that a cache has to take at once."""
        return max(self.length, self.n_context + 1 + _N_GREEDY)

    @property
    def key(self) -> str:
        """A hash of all that is read."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def continuation(self) -> range:
        """Tokens whose successors are predicted after the eviction."""
        return range(self.n_context, len(self.tokens) - 1)

    @property
    def in_context(self) -> range:
        """Some of the tokens before."""
        step = max(1, self.n_context // _N_IN_CONTEXT)
        return range(step - 1, self.n_context - 1, step)


def make_texts(tokenizer: Any, length: int, n: int, seed: int) -> Iterator[Text]:
    """Stretches of `length` tokens from a novel, spread over it.

    Raises
    ------
    LukvError
        The novel has fewer tokens, or the length is too short.
    """
    if length < 64:
        raise LukvError("language modelling needs a length of 64 tokens or more")
    paragraphs = novel("northanger_abbey")
    first = np.random.default_rng((seed, length)).random()
    for index in range(n):
        start = int(((first + index * _GOLDEN) % 1.0) * len(paragraphs))
        tokens: list[int] = []
        for i in range(start, start + len(paragraphs)):
            if len(tokens) >= length:
                break
            text = paragraphs[i % len(paragraphs)] + "\n"
            tokens += tokenizer.encode(text) if tokens else tokenizer.begin_tokens(text)
        if len(tokens) < length:
            raise LukvError(
                f"the text for language modelling has no {length} tokens; choose a shorter length with --lengths"
            )
        yield Text(index, tokens[:length], length - min(_MOST_SCORED, length // 4))


class Reference:
    """What the full cache predicts; removed from the disk at the end.

    Attributes
    ----------
    log_probs : dict of int to float16 array [n_vocab]
        By the index of the token whose successor is predicted. Half precision moves a KL divergence by about 1e-4.
    greedy : list of int
        The greedy continuation.
    values
        What `measure` finds for the full cache itself.
    """

    def __init__(self, path: Path, text: Text, n_vocab: int) -> None:
        self._path = path
        self._rows = {index: row for row, index in enumerate((*text.in_context, *text.continuation))}
        self._array = np.lib.format.open_memmap(path, "w+", np.float16, (len(self._rows), n_vocab))
        self.greedy: list[int] = []
        self.values: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        return self._array[self._rows[index]].astype(np.float32)

    def __setitem__(self, index: int, log_probs: npt.NDArray[np.float32]) -> None:
        self._array[self._rows[index]] = log_probs


def read_full(model: Model, text: Text, kv_type: str, folder: Path, end_tokens: Collection[int]) -> Reference:
    """What a model predicts with the full cache."""
    reference = Reference(folder / f"lm-{text.length}-{text.index}.npy", text, model.n_vocab)
    found = _Found(text)

    def keep(index: int, log_probs: npt.NDArray[np.float32]) -> None:
        reference[index] = log_probs
        found.add(index, log_probs, log_probs)

    with model.session(text.n_cells, kv_type, budgeted=False) as session:
        reference.greedy, work = _read(session, text, True, keep, end_tokens)
    reference.values = found.values(1.0, work)
    return reference


def measure(
    model: Model, text: Text, cell: Cell, reference: Reference, end_tokens: Collection[int], replays: Sequence[Replay] = ()
) -> Mapping[str, Mapping[str, Any]]:
    """Values of each of `MEASURES`: a score, and means by position."""
    if cell.is_full:
        return reference.values
    found = _Found(text)

    def compare(index: int, log_probs: npt.NDArray[np.float32]) -> None:
        found.add(index, log_probs, reference[index])

    n_ctx = max(text.n_cells, text.n_context + longest(replays))
    with model.session(n_ctx, cell.kv_type, not cell.is_full) as session:
        greedy, work = _read(session, text, cell.policy == "capacity", compare, end_tokens, replays)
    same = 0
    for ours, theirs in zip(greedy, reference.greedy):
        if ours != theirs:
            break
        same += 1
    n_longest = max(len(greedy), len(reference.greedy))
    return found.values(same / n_longest if n_longest else 1.0, work)


def perplexity(mean_nll: float) -> float:
    """From the mean negative log-likelihood of a token, which is what the records hold."""
    return math.exp(min(mean_nll, 700.0))


class _Found:
    """Per token: its negative log-likelihood, the divergence, and whether the best prediction is the same."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._rows: dict[int, tuple[float, float, float]] = {}

    def add(self, index: int, log_probs: npt.NDArray[np.float32], full: npt.NDArray[np.float32]) -> None:
        likely = full > -30.0  # the rest weighs nothing, and may be minus infinity in half precision
        p = full[likely]
        divergence = float(np.sum(np.exp(p) * (p - log_probs[likely]), dtype=np.float64))
        nll = -float(log_probs[self._text.tokens[index + 1]])
        self._rows[index] = (nll, max(0.0, divergence), float(log_probs.argmax() == full.argmax()))

    def values(self, greedy: float, work: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        inside, behind = (
            [i for i in part if i in self._rows] for part in (self._text.in_context, self._text.continuation)
        )
        means = np.mean([self._rows[i] for i in behind], axis=0)
        bins = [
            part for one, n in zip((inside, behind), _BINS) if one for part in np.array_split(one, min(n, len(one)))
        ]
        curves = np.array([np.mean([self._rows[i] for i in part], axis=0) for part in bins])
        positions = [int(part.mean()) for part in bins]
        result = {
            name: {
                "score": float(mean),
                "by_position": [positions, [round(float(value), 5) for value in curve]],
                **work,
            }
            for name, mean, curve in zip(MEASURES, means, curves.T)
        }
        return {**result, "greedy": {"score": greedy, **work}}


def _read(
    session: Session, text: Text, with_context: bool, on_log_probs: Any, end_tokens: Collection[int], replays: Sequence[Replay] = ()
) -> tuple[list[int], dict[str, Any]]:
    """Read a text, and continue its context greedily; returns the continuation and what it took."""

    def normalised(index: int, logits: npt.NDArray[np.float32]) -> None:
        shifted = logits - logits.max()
        on_log_probs(index, shifted - np.log(np.sum(np.exp(shifted), dtype=np.float64)).astype(np.float32))

    n = text.n_context
    session.read(text.tokens[:n], frozenset(text.in_context) if with_context else (), normalised)
    session.repeat(replays)
    session.commit()
    state: State = session.save()
    session.read(text.tokens[n:-1], range(len(text.continuation)), lambda i, logits: normalised(n + i, logits))
    session.load(state)
    session.read(text.tokens[n : n + 1])
    greedy = session.generate(_N_GREEDY, end_tokens)
    return greedy, session.work()
