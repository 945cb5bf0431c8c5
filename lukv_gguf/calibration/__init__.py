"""The calibration text and its questions: what a profile is made from.

The default context is about 4,000 tokens of original prose, written for this project and part of no benchmark. Each of
its 30 questions is about a different part of it: facts, exact quotations, lists and summaries. A shorter program and a
shorter dialogue, with 15 questions each, show whether a profile depends on the kind of text.
"""

from __future__ import annotations

import json
from importlib import resources
from os import PathLike
from pathlib import Path

from lukv_gguf.errors import LukvError


def load_default(name: str = "prose") -> tuple[str, list[str]]:
    """Return a context and its questions that ship with the package: ``prose``, ``code`` or ``dialogue``."""
    suffix = "" if name == "prose" else f"_{name}"
    folder = resources.files(__name__)
    context = folder.joinpath(f"context{suffix}.txt").read_text(encoding="utf-8")
    return context, json.loads(folder.joinpath(f"questions{suffix}.json").read_text(encoding="utf-8"))["questions"]


def load(context_path: str | PathLike[str], questions_path: str | PathLike[str]) -> tuple[str, list[str]]:
    """Read a context and its questions from files.

    Parameters
    ----------
    context_path : UTF-8 text.
    questions_path : JSON, ``{"questions": ["…", …]}``, with at least one question.

    Returns
    -------
    The context and the list of questions.

    Raises
    ------
    LukvError
        A file is missing, unreadable, empty, or not of the form above.
    """
    context = _read_text(context_path)
    if not context.strip():
        raise LukvError(f"{context_path}: the context is empty")
    try:
        data = json.loads(_read_text(questions_path))
    except (ValueError, RecursionError) as error:
        raise LukvError(f"{questions_path}: not valid JSON: {error}") from None
    questions = data.get("questions") if isinstance(data, dict) else None
    if not (isinstance(questions, list) and questions and all(isinstance(q, str) and q.strip() for q in questions)):
        raise LukvError(f'{questions_path}: expected {{"questions": ["...", ...]}}, at least one and none empty')
    return context, questions


def _read_text(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LukvError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise LukvError(f"cannot read {path}: {error.strerror or error}") from None
