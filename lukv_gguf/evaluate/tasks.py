"""What a task is: contexts with questions, and how the answers are scored."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Protocol

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.scoring import SCORES


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes
    ----------
    text
        What follows the context in the user's message.
    references
        The right answers.
    answer_prefix
        How the answer begins, given to the model.
    depth
        Where the answer stands in the context, 0 (start) to 1 (end), if at one place.
    """

    text: str
    references: tuple[str, ...]
    answer_prefix: str = ""
    depth: float | None = None


@dataclass(frozen=True)
class Sample:
    """A context and its questions.

    Attributes
    ----------
    task, length, index
        Its name: the task, the tokens that everything together may take, and a number.
    context
        The user's message up to the question.
    n_answer
        Most tokens of an answer.
    score, score_options
        A function of `scoring.SCORES` and its further arguments.
    is_chat
        Whether the model's chat template goes around it.
    first_line
        Whether only the first line of an answer counts.
    """

    task: str
    length: int
    index: int
    context: str
    questions: tuple[Question, ...]
    n_answer: int
    score: str = "match_all"
    score_options: dict[str, Any] = field(default_factory=dict)
    is_chat: bool = True
    first_line: bool = False

    @property
    def key(self) -> str:
        """A hash of all that is asked."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def score_answer(self, answer: str, question: Question) -> float:
        """The score in [0, 1]."""
        if self.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        return SCORES[self.score](answer, question.references, **self.score_options)

    def is_complete(self, answer: str, question: Question) -> bool:
        """Whether more text can no longer change the score."""
        if self.first_line:
            return "\n" in answer.lstrip("\n")
        return self.score in ("match_all", "match_any") and self.score_answer(answer, question) == 1.0


class Encoder(Protocol):
    """What a task needs of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Tokens of a text."""

    def frame_user_message(self) -> tuple[str, str]:
        """What the chat template puts around a first user message."""


@dataclass(frozen=True)
class Prompt:
    """A sample in tokens: what is cached first, and what follows for each question."""

    prefix: list[int]
    suffixes: list[list[int]]


def tokenize(tokenizer: Any, sample: Sample) -> Prompt:
    """The tokens of a sample, in the model's chat template."""
    before, after = tokenizer.frame_user_message() if sample.is_chat else ("", "")
    return Prompt(
        tokenizer.begin_tokens(before + sample.context),
        [tokenizer.encode(question.text + after + question.answer_prefix) for question in sample.questions],
    )


def room_for_context(tokenizer: Encoder, length: int, n_answer: int, question: str) -> int:
    """Tokens that a context may have so that everything together has `length`.

    Parameters
    ----------
    question
        The longest text that will follow the context, with the beginning of the answer.

    Raises
    ------
    LukvError
        Nothing is left.
    """
    margin = 8  # BOS, and tokens that come out otherwise where two texts meet
    room = length - n_answer - len(tokenizer.encode("".join(tokenizer.frame_user_message()) + question)) - margin
    if room < 32:
        raise LukvError(f"a length of {length} tokens leaves no room for a context; choose a longer one with --lengths")
    return room


@cache
def novel(name: str) -> tuple[str, ...]:
    """Paragraphs of a novel in the public domain: ``persuasion`` or ``northanger_abbey`` (Jane Austen, 1817)."""
    data = resources.files("lukv_gguf.evaluate").joinpath(f"{name}.txt.xz").read_bytes()
    return tuple(lzma.decompress(data).decode().splitlines())
