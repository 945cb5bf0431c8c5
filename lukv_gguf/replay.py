"""What KVzip reads: requests to repeat a context, each with a part of it as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lukv_gguf.errors import LukvError
from lukv_gguf.reference.tokenizer import Tokenizer

_OVERLAP = 8  # tokens before a part that tell the model where it starts
_REQUEST = "\n\nRepeat the text above, word for word, from here on: "


@dataclass(frozen=True)
class Replay:
    """A request to repeat a part of the context, and that part as the answer.

    Attributes
    ----------
    tokens
        All of them; the last `end` - `start` are the part.
    start, end
        Where the part is in the context.
    """

    tokens: Sequence[int]
    start: int
    end: int


def longest(replays: Sequence[Replay]) -> int:
    """Tokens that they need behind the context, one at a time."""
    return max((len(replay.tokens) for replay in replays), default=0)


def request_length(tokenizer: Tokenizer) -> int:
    """Tokens of the longest request, without the part that is its answer."""
    _, after = tokenizer.frame_user_message()
    return len(tokenizer.encode(_REQUEST)) + _OVERLAP + len(tokenizer.encode(after))


def make_replays(
    tokenizer: Tokenizer, prefix: list[int], chunk: int, n_context_train: int | None = None, is_chat: bool = True
) -> list[Replay]:
    """Requests to repeat the context part by part. The template is not repeated.

    Parameters
    ----------
    prefix
        The context.
    chunk
        Tokens of a part.
    n_context_train
        Tokens that context and request may have together, if there is a limit.
    is_chat
        Whether the context begins as a user's message does in the chat template.

    Raises
    ------
    LukvError
        They are more.
    """
    before, after = tokenizer.frame_user_message() if is_chat else ("", "")
    n_template = len(tokenizer.begin_tokens(before))
    replays = []
    for start in range(n_template, len(prefix), chunk):
        part = prefix[start : start + chunk]
        if start == n_template:
            request = tokenizer.encode(f"\n\nRepeat the text above, word for word.{after}")
        else:
            request = tokenizer.encode(_REQUEST)
            request += prefix[max(n_template, start - _OVERLAP) : start] + tokenizer.encode(after)
        replays.append(Replay(request + part, start, start + len(part)))
    if n_context_train is not None and len(prefix) + longest(replays) > n_context_train:
        raise LukvError(
            f"kvzip repeats {chunk} tokens behind a context of {len(prefix)}, more than the {n_context_train} that fit; "
            "take a shorter context (--n-context) or smaller parts (kvzip:chunk=…)"
        )
    return replays
