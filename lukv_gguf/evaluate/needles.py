"""Needle questions: facts hidden in prose, asked for after the prose was cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lukv_gguf.evaluate.session import Model, Options
from lukv_gguf.reference.tokenizer import Tokenizer
from lukv_gguf.replay import longest, make_replays

_THINGS = "harbour lantern orchard violin glacier compass granary lighthouse carpenter falcon meadow cellar".split()
_PLACES = "Aldmoor Brenwick Castello Dunmarra Elverum Farrow Glenholt Hartsea Ivarstad Juniper Kestrel Lowmere".split()


@dataclass(frozen=True)
class NeedleContext:
    """A text with hidden facts: `questions` and the number that answers each of them."""

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One way to hold the cache: a model file and the overrides that select it, and for KVzip the tokens of a part."""

    name: str
    model: Path
    overrides: dict[str, Any]
    chunk: int = 0


def make_contexts(
    tokenize: Callable[[str], Sequence[int]], n_contexts: int, n_needles: int, n_tokens: int, seed: int = 0
) -> Iterator[NeedleContext]:
    """Contexts of about `n_tokens` tokens with `n_needles` facts each, spread over the whole length.

    Parameters
    ----------
    tokenize
        Text to tokens, to measure the length.
    """
    rng = np.random.default_rng(seed)
    haystack = resources.files("lukv_gguf.evaluate").joinpath("haystack.txt").read_text(encoding="utf-8")
    paragraphs = [p.strip() for p in haystack.split("\n\n") if len(p.split()) > 20]
    for _ in range(n_contexts):
        things, places = rng.permutation(_THINGS)[:n_needles], rng.permutation(_PLACES)[:n_needles]
        numbers = [str(n) for n in rng.choice(np.arange(10_000, 100_000), n_needles, replace=False)]
        names = [f"the {thing} of {place}" for thing, place in zip(things, places)]
        needles = [f"The secret number of {name} is {number}." for name, number in zip(names, numbers)]

        chosen: list[str] = []
        length = len(tokenize("\n\n".join(needles)))
        for i in rng.permutation(len(paragraphs)):
            if length >= n_tokens:
                break
            chosen.append(paragraphs[i])
            length += len(tokenize(paragraphs[i] + "\n\n"))
        for place, needle in zip(np.linspace(0, len(chosen), n_needles, endpoint=False).astype(int)[::-1], needles):
            chosen[place] = f"{needle} {chosen[place]}" if rng.random() < 0.5 else f"{chosen[place]} {needle}"
        yield NeedleContext(
            "\n\n".join(chosen),
            tuple(f"What is the secret number of {name}? Answer with the number only." for name in names),
            tuple(numbers),
        )


def ask(
    method: Method,
    contexts: Sequence[NeedleContext],
    *,
    n_ubatch: int = 512,
    n_answer: int = 24,
    n_threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[bool]]:
    """Cache each context, then ask its questions one by one, each from the cache as it was before the first.

    The context allocated is as long as the text and one question with its answer: with policy ``capacity`` the cells
    are about `ratio` of the text.

    Returns
    -------
    list of list of bool
        Which questions of each context were answered with the right number.
    """
    tokenizer = Tokenizer(method.model)
    before, after = tokenizer.frame_user_message()
    results: list[list[bool]] = []
    with Model(method.model, method.overrides, Options(n_threads, n_ubatch=n_ubatch)) as model:
        for i, context in enumerate(contexts):
            prefix = tokenizer.begin_tokens(before + context.text)
            suffixes = [tokenizer.encode(f"\n\n{question}{after}") for question in context.questions]
            replays = make_replays(tokenizer, prefix, method.chunk) if method.chunk else []
            room = max(max(map(len, suffixes)) + n_answer, longest(replays))
            with model.session(len(prefix) + room) as session:
                session.read(prefix)
                session.repeat(replays)
                session.commit()
                state = session.save()
                results.append([])
                for suffix, answer in zip(suffixes, context.answers):
                    session.load(state)
                    session.read(suffix)
                    said = session.generate(n_answer, tokenizer.end_tokens)
                    results[-1].append(answer in tokenizer.decode(said))
            if progress is not None:
                progress(i + 1, len(contexts))
    return results
