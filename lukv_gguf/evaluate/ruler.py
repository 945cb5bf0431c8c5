"""The task families of RULER, made here: what is hidden, how much of it and how it is scored are RULER's.

The wording and the prose are this project's own (the haystack is a novel instead of essays, the documents of the QA
tasks are made up instead of SQuAD's and HotpotQA's), so the scores compare methods on one model, not with published ones.

References
----------
Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654, and its
default configuration: numbers of needles, chains, words and frequencies.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.tasks import Encoder, Question, Sample, novel, room_for_context

Maker = Callable[[Encoder, int, int, np.random.Generator], Sample]

_NOISE = (
    "The kettle is on.", "The rain has stopped for now.", "A cart goes down the lane.", "Somebody whistles in the yard.",
    "It will soon be noon.",
)  # fmt: skip
_MAX_QUESTIONS = 4  # of one context with several needles
_N_COMMON, _COMMON_TIMES, _RARE_TIMES = 10, 30, 3
_N_HOPS = 4
_N_FREQUENT, _ZETA = 3, 2.0
_N_TYPES = 4  # keys of multikey_1 and multiquery, values of multivalue


def tasks() -> list[str]:
    """Names of all tasks."""
    return list(_MAKERS)


def make_samples(task: str, tokenizer: Encoder, length: int, n: int, seed: int) -> Iterator[Sample]:
    """Contexts of a task, each about `length` tokens with its longest question and answer.

    A context depends on the task, the length, the seed and its own number only.

    Raises
    ------
    LukvError
        No such task, or the length is too short for it.
    """
    if task not in _MAKERS:
        raise LukvError(f"unknown RULER task {task!r}; known: {', '.join(_MAKERS)}")
    number = list(_MAKERS).index(task)
    for index in range(n):
        yield _MAKERS[task](tokenizer, length, index, np.random.default_rng((seed, number, length, index)))


def fill(n_tokens: int, tokenizer: Encoder, build: Callable[[int], str], most: int) -> int:
    """The largest number of units, up to `most`, whose text `build(number)` has at most `n_tokens` tokens."""
    if len(tokenizer.encode(build(1))) > n_tokens:
        raise LukvError(f"{n_tokens} tokens are too few for this task; choose a longer length with --lengths")
    low, step = 1, 1
    while low + step <= most and len(tokenizer.encode(build(low + step))) <= n_tokens:
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if low + step <= most and len(tokenizer.encode(build(low + step))) <= n_tokens:
            low += step
    return low


def _niah(
    task: str, haystack: str, key_kind: str, value_kind: str, n_keys: int = 1, n_values: int = 1, n_queries: int = 1
) -> Maker:
    """Needles in a haystack: `n_keys` of them in prose or noise, or nothing but needles."""

    def make(tokenizer: Encoder, length: int, index: int, rng: np.random.Generator) -> Sample:
        noun = "pass code" if value_kind == "uuid" else "pass number"
        n_answer = {1: 24, _N_TYPES: 80}[max(n_values, n_queries)] if value_kind == "number" else 56
        head = f"Some {noun}s are hidden in the following text. Keep them in mind, they will be asked for later.\n"

        def ask(keys: Sequence[str], values: Sequence[str], depth: float | None) -> Question:
            names = " and ".join((", ".join(keys[:-1]), keys[-1])) if len(keys) > 1 else keys[0]
            many = len(values) > 1
            what = f"all the {noun}s" if many else f"the {noun}"
            return Question(
                f"\nWhat {'are' if many else 'is'} {what} of {names} in the text?",
                tuple(values),
                f"{'All the' if many else 'The'} {noun}{'s' if many else ''} of {names} in the text {'are' if many else 'is'}",
                depth,
            )

        def needle(key: str, value: str) -> str:
            return f"One of the {noun}s of {key} is {value}."

        longest = ask([_key(key_kind, rng) for _ in range(n_queries)], ["1"] * max(n_values, n_queries), None)
        room = room_for_context(tokenizer, length, n_answer, longest.text + longest.answer_prefix)
        if haystack == "needles":
            per_needle = len(tokenizer.encode(needle(_key(key_kind, rng), _value(value_kind, rng)) + "\n"))
            most = room // max(1, per_needle - 4) + 1
            keys = _distinct(lambda: _key(key_kind, rng), most)
            values = [_value(value_kind, rng) for _ in keys]
            lines = [needle(key, value) for key, value in zip(keys, values)]
            n = fill(room, tokenizer, lambda n: head + "\n".join(lines[:n]), most)
            asked = np.sort(rng.choice(n, min(_MAX_QUESTIONS, n), replace=False))
            questions = [ask([keys[i]], [values[i]], float(i / max(1, n - 1))) for i in asked]
            return Sample(task, length, index, head + "\n".join(lines[:n]), tuple(questions), n_answer)

        keys = _distinct(lambda: _key(key_kind, rng), n_keys)
        values = [[_value(value_kind, rng) for _ in range(n_values)] for _ in keys]
        needles = [needle(key, value) for key, of_key in zip(keys, values) for value in of_key]
        units = _noise_units(room) if haystack == "noise" else _prose_units(room, rng)
        order = rng.permutation(len(needles))
        # one needle somewhere in each of as many equal parts of the text
        depths = (np.arange(len(needles)) + rng.random(len(needles))) / len(needles)

        def build(n: int) -> str:
            text = list(units[:n])
            for depth, i in sorted(zip(depths, order), reverse=True):
                text.insert(round(float(depth) * n), needles[i])
            return head + " ".join(text)

        text = build(fill(room, tokenizer, build, len(units)))
        depth_of = {int(i): float(depth) for depth, i in zip(depths, order)}
        if n_queries > 1:
            questions = [ask(keys[:n_queries], [value for of_key in values[:n_queries] for value in of_key], None)]
        else:
            questions = [
                ask([key], of_key, depth_of[i] if n_values == 1 else None)
                for i, (key, of_key) in enumerate(zip(keys, values))
            ]
        return Sample(task, length, index, text, tuple(questions), n_answer)

    return make


def _variable_tracking(tokenizer: Encoder, length: int, index: int, rng: np.random.Generator) -> Sample:
    """A chain of assignments in noise: which variables have the value?"""

    def chain(value: str) -> tuple[list[str], list[str]]:
        names = _distinct(lambda: _letters(rng, 5).upper(), _N_HOPS + 1)
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:]))]
        return names, lines

    def ask(value: str) -> str:
        return f"\nWhich variables have the value {value}, directly or through other variables?"

    def answer_prefix(value: str) -> str:
        return f"The text sets {_N_HOPS + 1} variables to {value}, namely"

    n_answer = 32
    example_value, value = (str(rng.integers(10_000, 100_000)) for _ in range(2))
    example_names, example_lines = chain(example_value)
    names, lines = chain(value)
    example = (
        "An example: " + " ".join([*_NOISE[:2], *example_lines, _NOISE[2]]) + ask(example_value)
        + f" {answer_prefix(example_value)} {', '.join(example_names)}.\n\n"
    )  # fmt: skip
    head = example + "Follow the variables that are set in this text.\n"
    room = room_for_context(tokenizer, length, n_answer, ask(value) + answer_prefix(value))
    units = _noise_units(room)
    depths = np.sort(rng.random(len(lines)))

    def build(n: int) -> str:
        text = list(units[:n])
        for depth, line in reversed(list(zip(depths, lines))):  # later ones first: two at one place stay in order
            text.insert(round(float(depth) * n), line)
        return head + " ".join(text)

    text = build(fill(room, tokenizer, build, len(units)))
    question = Question(ask(value), tuple(names), answer_prefix(value))
    return Sample("vt", length, index, text, (question,), n_answer)


def _common_words(tokenizer: Encoder, length: int, index: int, rng: np.random.Generator) -> Sample:
    """A list in which ten words stand far more often than the others."""
    n_answer = 72
    words = [_vocabulary()[i] for i in rng.permutation(len(_vocabulary()))]

    def numbered(listed: Sequence[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))

    def build(n_rare: int, common_times: int, rare_times: int, chosen: Sequence[str], seed: int) -> str:
        listed = [
            *np.repeat(chosen[:_N_COMMON], common_times),
            *np.repeat(chosen[_N_COMMON : _N_COMMON + n_rare], rare_times),
        ]
        return numbered([listed[i] for i in np.random.default_rng(seed).permutation(len(listed))])

    question = f"\nWhich {_N_COMMON} words are the most common ones in the list?"
    prefix = f"The {_N_COMMON} most common words in the list are:"
    example_words = words[-40:]
    head = "This list has some words that stand in it more often than others. Remember them.\n"
    example = (
        head + build(20, 10, 1, example_words, int(rng.integers(1 << 30))) + question
        + f" {prefix} {numbered(example_words[:_N_COMMON])}\n\n"
    )  # fmt: skip
    room = room_for_context(tokenizer, length, n_answer, question + prefix)
    seed = int(rng.integers(1 << 30))
    times = (_COMMON_TIMES, _RARE_TIMES)
    # RULER takes a smaller list where its numbers would not fit
    if len(tokenizer.encode(example + head + build(1, *times, words, seed))) > room:
        times = (_COMMON_TIMES // 3, 1)
        example = ""
    most = len(words) - _N_COMMON - len(example_words)
    n = fill(room, tokenizer, lambda n: example + head + build(n, *times, words, seed), most)
    text = example + head + build(n, *times, words, seed)
    return Sample("cwe", length, index, text, (Question(question, tuple(words[:_N_COMMON]), prefix),), n_answer)


def _frequent_words(tokenizer: Encoder, length: int, index: int, rng: np.random.Generator) -> Sample:
    """Made-up words whose frequencies follow a zeta distribution; the most frequent place is taken by dots."""
    n_answer = 36
    head = "Count how often each made-up word stands in the following coded text. The dots '....' do not count.\n"
    question = f"\nWhich {_N_FREQUENT} made-up words stand most often in the coded text?"
    prefix = f"The {_N_FREQUENT} most frequent words of the coded text are:"
    room = room_for_context(tokenizer, length, n_answer, question + prefix)
    words = _distinct(lambda: _letters(rng, 6), max(20, room // 40))
    shares = (np.arange(len(words)) + 1.0) ** -_ZETA
    shares /= shares.sum()
    seed = int(rng.integers(1 << 30))

    def counts(n: int) -> Any:
        return np.maximum(np.rint(shares * n), 1).astype(int)

    def build(n: int) -> str:
        listed = np.repeat(["....", *words[1:]], counts(n))
        return head + " ".join(listed[np.random.default_rng(seed).permutation(len(listed))])

    smallest = 60  # below that, the first four ranks are no longer apart
    n = smallest + fill(room, tokenizer, lambda n: build(smallest + n), room)
    return Sample(
        "fwe", length, index, build(n), (Question(question, tuple(words[1 : 1 + _N_FREQUENT]), prefix),), n_answer
    )


_TRADES = "clockmaker surveyor printer beekeeper glazier botanist ferryman cartographer locksmith weaver".split()
_HABITS = (
    "kept a diary in green ink", "walked to work along the canal", "never learned to swim", "played the viola badly",
    "collected railway timetables", "wrote letters to the newspaper every Sunday", "was afraid of geese",
    "painted the same hill forty times", "could recite whole almanacs", "grew pears against the south wall",
)  # fmt: skip
_HOUSES = "museum library observatory theatre archive conservatory lyceum arboretum".split()
_THINGS = (
    "a model of the harbour made of cork", "nine hundred maps of the coast", "the first bell of the town hall",
    "a collection of barometers", "letters of several sea captains", "a garden of medicinal plants",
    "the plans of a bridge that was never built", "two globes, one of them unfinished",
)  # fmt: skip
_DOCUMENT_HEAD = "Here are some documents. Questions about them will follow.\n\n"


def _questions_about_documents(task: str, n_hops: int) -> Maker:
    """Short documents about people and houses: questions that one document answers, or two together."""

    def make(tokenizer: Encoder, length: int, index: int, rng: np.random.Generator) -> Sample:
        n_answer = 20
        longest = (
            "\nAnswer in a few words. In which town was the founder of the conservatory of Ashmarstead born? Answer:"
        )
        room = room_for_context(tokenizer, length, n_answer, longest)
        n_people = max(2, room // 90)
        people = _distinct(lambda: f"{_name(rng)} {_name(rng)}", n_people)
        towns = _distinct(
            lambda: _name(rng) + rng.choice(["ford", "mouth", "stead", "wick", "holm", "by"]), 2 * n_people
        )
        documents, facts = [], []
        for i, person in enumerate(people):
            born_in, house_in = towns[2 * i : 2 * i + 2]
            trade, house = str(rng.choice(_TRADES)), str(rng.choice(_HOUSES))
            born, founded = int(rng.integers(1790, 1900)), int(rng.integers(1905, 1960))
            habits, (thing,) = rng.choice(_HABITS, 2, replace=False), rng.choice(_THINGS, 1)
            documents.append(
                f"{person} was born in {born_in} in {born} and was trained as a {trade}. Neighbours said that {person} "
                f"{habits[0]} and {habits[1]}."
            )
            documents.append(
                f"The {house} of {house_in} was founded by {person} in {founded}. Visitors find {thing} there. It is closed on Mondays."
            )
            facts.append(
                [
                    (f"In which town was {person} born?", born_in),
                    (f"Which trade was {person} trained in?", trade),
                    (f"Who founded the {house} of {house_in}?", person),
                ]
                if n_hops == 1
                else [
                    (f"In which town was the founder of the {house} of {house_in} born?", born_in),
                    (f"Which trade was the founder of the {house} of {house_in} trained in?", trade),
                ]
            )
        shuffles = np.random.default_rng(int(rng.integers(1 << 30))).random(2 * n_people)

        def order(n: int) -> Any:  # of the documents of n people
            return np.argsort(shuffles[: 2 * n])

        def build(n: int) -> str:
            return _DOCUMENT_HEAD + "\n\n".join(
                f"Document {i}:\n{documents[j]}" for i, j in enumerate(order(n), start=1)
            )

        n = fill(room, tokenizer, build, n_people)
        asked = np.sort(rng.choice(n, min(_MAX_QUESTIONS, n), replace=False))
        questions = []
        for i in asked:
            text, reference = facts[i][int(rng.integers(len(facts[i])))]
            questions.append(Question(f"\n\nAnswer in a few words. {text}", (reference,), "Answer:"))
        return Sample(task, length, index, build(n), tuple(questions), n_answer, "match_any")

    return make


_MAKERS: dict[str, Maker] = {
    "niah_single_1": _niah("niah_single_1", "noise", "word", "number"),
    "niah_single_2": _niah("niah_single_2", "prose", "word", "number"),
    "niah_single_3": _niah("niah_single_3", "prose", "word", "uuid"),
    "niah_multikey_1": _niah("niah_multikey_1", "prose", "word", "number", n_keys=_N_TYPES),
    "niah_multikey_2": _niah("niah_multikey_2", "needles", "word", "number"),
    "niah_multikey_3": _niah("niah_multikey_3", "needles", "uuid", "uuid"),
    "niah_multivalue": _niah("niah_multivalue", "prose", "word", "number", n_values=_N_TYPES),
    "niah_multiquery": _niah("niah_multiquery", "prose", "word", "number", n_keys=_N_TYPES, n_queries=_N_TYPES),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa_1": _questions_about_documents("qa_1", 1),
    "qa_2": _questions_about_documents("qa_2", 2),
}


@cache
def _vocabulary() -> list[str]:
    """Words of the novels with five to nine letters, not the most frequent ones."""
    text = " ".join((*novel("persuasion"), *novel("northanger_abbey")))
    frequency = Counter(re.findall(r"(?<![\w'-])[a-z]{5,9}(?![\w'-])", text))
    return sorted(word for word, times in frequency.items() if times < 50)


def _prose_units(n_tokens: int, rng: np.random.Generator) -> list[str]:
    """Sentences of a novel from a random place on, as many as any tokenizer may need."""
    text = novel("persuasion") + novel("northanger_abbey")
    start = int(rng.integers(len(text)))
    units: list[str] = []
    length = 0
    for i in range(start, start + 20 * len(text)):  # around the end, again and again where a context is that long
        units += re.split(r"(?<=[.!?]) ", text[i % len(text)])
        length += len(text[i % len(text)])
        if length > 8 * n_tokens:
            break
    return units


def _noise_units(n_tokens: int) -> list[str]:
    return [_NOISE[i % len(_NOISE)] for i in range(n_tokens)]


def _key(kind: str, rng: np.random.Generator) -> str:
    if kind == "uuid":
        return _value(kind, rng)
    words = _vocabulary()
    return f"{words[rng.integers(len(words))]}-{words[rng.integers(len(words))]}"


def _value(kind: str, rng: np.random.Generator) -> str:
    return (
        str(uuid.UUID(bytes=rng.bytes(16), version=4)) if kind == "uuid" else str(rng.integers(1_000_000, 10_000_000))
    )


def _letters(rng: np.random.Generator, n: int) -> str:
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), n))


def _name(rng: np.random.Generator) -> str:
    starts = "Al Bar Cor Dun El Far Gris Hol Ing Jor Kel Lan Mor Nor Ol Per Quil Ros Sel Tor Ul Ves Wen Yar Zel".split()
    ends = "a ada an ara ene eth ia in is ma mund na o ren rik sa ta vin wen ys".split()
    return str(rng.choice(starts)) + str(rng.choice(ends))


def _distinct(draw: Callable[[], str], n: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(100 * n + 1000):
        if len(found) == n:
            break
        found[draw()] = None
    if len(found) < n:
        raise LukvError(f"this task cannot make {n} different names; choose a shorter length with --lengths")
    return list(found)
