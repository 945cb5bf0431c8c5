"""LongBench from a local copy of its files, with its official metrics.

A folder holds ``NAME.jsonl`` (or ``data/NAME.jsonl``), one record a line: ``input``, ``context``, ``answers``,
``all_classes``. Where it also holds LongBench's own ``dataset2prompt.json`` (or ``config/dataset2prompt.json``), its
prompts are used, else those below, which ask for the same.

References
----------
Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", arXiv 2308.14508: metrics,
lengths of the answers, truncation in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate.tasks import Question, Sample

_EN = "Answer the question from the text, as briefly as you can, and write nothing else.\n\n{context}\n\nQuestion: {input}\nAnswer:"
_ZH = "请根据下面的文章简短回答问题，不要输出其他内容。\n\n{context}\n\n问题：{input}\n回答："
_SHOTS = "{context}\n{input}"


@dataclass(frozen=True)
class _Task:
    prompt: str
    score: str
    n_answer: int
    is_chat: bool = True
    first_line: bool = False


_TASKS = {
    "narrativeqa": _Task(_EN, "qa_f1", 128),
    "qasper": _Task(
        "Answer the question from the article, as briefly as you can. Write 'unanswerable' if the article does not say; "
        "write 'yes', 'no' or 'unanswerable' to a yes/no question.\n\n{context}\n\nQuestion: {input}\nAnswer:",
        "qa_f1", 128,
    ),
    "multifieldqa_en": _Task(_EN, "qa_f1", 64),
    "multifieldqa_zh": _Task(_ZH, "qa_f1_zh", 64),
    "hotpotqa": _Task(_EN, "qa_f1", 32),
    "2wikimqa": _Task(_EN, "qa_f1", 32),
    "musique": _Task(_EN, "qa_f1", 32),
    "dureader": _Task(_ZH, "rouge_l_zh", 128),
    "gov_report": _Task("Write a one-page summary of this report.\n\n{context}\n\nSummary:", "rouge_l", 512),
    "qmsum": _Task(
        "Answer the query about this meeting in one or more sentences.\n\n{context}\n\nQuery: {input}\nAnswer:", "rouge_l", 512
    ),
    "multi_news": _Task("Write a one-page summary of these news articles.\n\n{context}\n\nSummary:", "rouge_l", 512),
    "vcsum": _Task("请总结下面的会议记录。\n\n{context}\n\n会议总结：", "rouge_l_zh", 512),
    "trec": _Task(_SHOTS, "classification", 64, is_chat=False, first_line=True),
    "triviaqa": _Task(_SHOTS, "qa_f1", 32, is_chat=False, first_line=True),
    "samsum": _Task(_SHOTS, "rouge_l", 128, is_chat=False, first_line=True),
    "lsht": _Task(_SHOTS, "classification", 64, is_chat=False, first_line=True),
    "passage_count": _Task(
        "Some of these paragraphs may be repeated. How many different ones are there?\n\n{context}\n\n"
        "Write the number only. Number of different paragraphs:",
        "count", 32,
    ),
    "passage_retrieval_en": _Task(
        "Here are 30 paragraphs, and a summary of one of them. Which paragraph is it of?\n\n{context}\n\nSummary: {input}\n\n"
        'Write its number only, like "Paragraph 1". Answer:',
        "retrieval", 32,
    ),
    "passage_retrieval_zh": _Task(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定摘要出自哪一段。\n\n{context}\n\n摘要：{input}\n\n"
        '请只输出段落编号，格式为"段落1"。答案：',
        "retrieval_zh", 32,
    ),
    "lcc": _Task("Complete the code.\n{context}Next line of code:\n", "code_similarity", 64, is_chat=False),
    "repobench-p": _Task("Complete the code.\n{context}{input}Next line of code:\n", "code_similarity", 64, is_chat=False),
}  # fmt: skip


def names() -> list[str]:
    """Names of all tasks."""
    return list(_TASKS)


def tasks(folder: Path) -> list[str]:
    """The tasks whose files are in a folder.

    Raises
    ------
    LukvError
        There are none.
    """
    found = [name for name in _TASKS if _file(folder, f"{name}.jsonl", "data") is not None]
    if not found:
        raise LukvError(f"{folder}: no LongBench file here; expected NAME.jsonl, e.g. {', '.join(list(_TASKS)[:3])}")
    return found


def make_samples(task: str, tokenizer: Any, folder: Path, length: int, n: int) -> Iterator[Sample]:
    """The first `n` records of a task.

    Parameters
    ----------
    tokenizer
        A `lukv_gguf.reference.tokenizer.Tokenizer`.
    length
        Most tokens of everything together; the middle of a longer context is left out.

    Raises
    ------
    LukvError
        The file cannot be read, or a line is no record.
    """
    if task not in _TASKS:
        raise LukvError(f"unknown LongBench task {task!r}; known: {', '.join(_TASKS)}")
    path, kind = _file(folder, f"{task}.jsonl", "data"), _TASKS[task]
    if path is None:
        raise LukvError(f"{folder}: no file {task}.jsonl")
    prompt = _prompts(folder).get(task, kind.prompt)
    if "{context}" not in prompt:
        raise LukvError(f"{folder}: the prompt of {task} has no {{context}}")
    before, after = prompt.split("{context}", 1)
    for index, record in enumerate(_read(path, n)):
        question = after.replace("{input}", record["input"])
        head = before.replace("{input}", record["input"])
        frame = "".join(tokenizer.frame_user_message()) if kind.is_chat else ""
        room = length - kind.n_answer - len(tokenizer.encode(frame + head + question)) - 8
        context = head + _without_middle(tokenizer, record["context"], room, path)
        options = {"classes": record["all_classes"]} if kind.score == "classification" else {}
        questions = (Question(question, tuple(record["answers"])),)
        yield Sample(
            task, length, index, context, questions, kind.n_answer, kind.score, options, kind.is_chat, kind.first_line
        )


def _read(path: Path, n: int) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if number > n:
                    return
                try:
                    yield _checked(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise LukvError(f"{path}, line {number}: not a LongBench record ({error})") from None
    except OSError as error:
        raise LukvError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise LukvError(f"{path}: not UTF-8 text") from None


def _checked(record: Any) -> Mapping[str, Any]:
    if not isinstance(record["context"], str) or not isinstance(record["input"], str):
        raise TypeError("context and input must be text")
    answers, classes = record["answers"], record.get("all_classes") or []
    for name, texts in (("answers", answers), ("all_classes", classes)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a list of texts")
    if not answers:
        raise ValueError("no answers")
    return {**record, "all_classes": classes}


def _without_middle(tokenizer: Any, text: str, room: int, path: Path) -> str:
    if room < 16:
        raise LukvError(f"{path}: the length leaves no room for a context; choose a longer one with --lengths")
    tokens = tokenizer.encode(text)
    if len(tokens) <= room:
        return text
    half = room // 2
    return tokenizer.decode(tokens[:half]) + tokenizer.decode(tokens[-half:])


def _prompts(folder: Path) -> Mapping[str, str]:
    path = _file(folder, "dataset2prompt.json", "config")
    if path is None:
        return {}
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LukvError(f"{path}: not a file of prompts ({error})") from None
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise LukvError(f"{path}: not a file of prompts")
    return prompts


def _file(folder: Path, name: str, subfolder: str) -> Path | None:
    return next((path for path in (folder / name, folder / subfolder / name) if path.is_file()), None)
