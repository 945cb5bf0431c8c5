"""Scores of answers in [0, 1]: RULER's string matches and LongBench's official metrics.

Every function takes an answer and the references, and is registered by name in `SCORES`.

References
----------
Hsieh et al., "RULER", arXiv 2404.06654; Bai et al., "LongBench", arXiv 2308.14508.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lukv_gguf.errors import LukvError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ENGLISH_PUNCTUATION = frozenset(string.punctuation)
_CHINESE_PUNCTUATION = _ENGLISH_PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, upper or lower case: RULER's score of all but QA."""
    lowered = answer.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def match_any(answer: str, references: Sequence[str]) -> float:
    """Whether any reference stands in the answer, upper or lower case: RULER's score of QA."""
    lowered = answer.lower()
    return float(any(reference.lower() in lowered for reference in references))


def qa_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, without articles and punctuation; the best reference counts."""
    words = _english_words(answer)
    return max(_f1(words, _english_words(reference)) for reference in references)


def qa_f1_zh(answer: str, references: Sequence[str]) -> float:
    """`qa_f1` on the words of a Chinese text (jieba)."""
    words = _chinese_words(answer)
    return max(_f1(words, _chinese_words(reference)) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F of ROUGE-L as the package `rouge` computes it, which LongBench uses; the best reference counts."""
    rouge = _import("rouge").Rouge(metrics=["rouge-l"])
    scores = [0.0]
    for reference in references:
        try:
            scores.append(rouge.get_scores([answer], [reference])[0]["rouge-l"]["f"])
        except (ValueError, RecursionError):  # an empty answer, or one too long for its recursion: LongBench counts 0
            continue
    return max(scores)


def rouge_l_zh(answer: str, references: Sequence[str]) -> float:
    """`rouge_l` on the words of a Chinese text (jieba)."""
    cut = _import("jieba").cut
    return rouge_l(" ".join(cut(answer, cut_all=False)), [" ".join(cut(text, cut_all=False)) for text in references])


def classification(answer: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1 / (classes that the answer names) if the right one is among them; parts of the right one's name do not count."""

    def score(reference: str) -> float:
        named = [name for name in classes if name in answer and (name == reference or name not in reference)]
        return 1.0 / len(named) if reference in named else 0.0

    return max(map(score, references))


def retrieval(answer: str, references: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the paragraph's, as in "Paragraph 7"."""
    return max(_share_of_numbers(answer, re.search(r"Paragraph (\d+)", reference)) for reference in references)


def retrieval_zh(answer: str, references: Sequence[str]) -> float:
    """`retrieval` with references as in "段落7"."""
    return max(_share_of_numbers(answer, re.search(r"段落(\d+)", reference)) for reference in references)


def count(answer: str, references: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the right one."""
    return max(_share_of_numbers(answer, re.match(r"(.*)", str(reference))) for reference in references)


def code_similarity(answer: str, references: Sequence[str]) -> float:
    """Similarity (1 - insertions and deletions / both lengths, to the percent) of the first line of code."""
    ratio = _import("rapidfuzz").fuzz.ratio
    lines = answer.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    return max(round(ratio(line, reference)) / 100 for reference in references)


SCORES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        match_all, match_any, qa_f1, qa_f1_zh, rouge_l, rouge_l_zh, classification, retrieval, retrieval_zh, count,
        code_similarity,
    )
}  # fmt: skip


def _f1(words: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(reference)).values())
    return 2 * common / (len(words) + len(reference)) if common else 0.0


def _english_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in _ENGLISH_PUNCTUATION)
    return _ARTICLES.sub(" ", kept).split()


def _chinese_words(text: str) -> list[str]:
    words = (
        "".join(c for c in word.lower() if c not in _CHINESE_PUNCTUATION)
        for word in _import("jieba").cut(text, cut_all=False)
    )
    return [word for word in ("".join(word.split()) for word in words) if word]


def _share_of_numbers(answer: str, right: re.Match[str] | None) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right.group(1)) / len(numbers) if numbers and right else 0.0


def _import(name: str) -> Any:
    import importlib
    import logging

    try:
        module = importlib.import_module(f"{name}.fuzz" if name == "rapidfuzz" else name)
    except ImportError:
        raise LukvError(
            f"this LongBench task is scored with the Python package {name}: pip install 'lukv-gguf[longbench]'"
        ) from None
    if name == "jieba":
        module.setLogLevel(logging.ERROR)
    return importlib.import_module(name)
