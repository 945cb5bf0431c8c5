"""The error that a user sees, and those that a damaged file raises."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class LukvError(Exception):
    """Bad input or a bad environment. The message is one line: what is wrong, and what to do."""


UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What numpy and zipfile raise for a damaged .npz; a flipped bit can ask for encryption or any compression."""
UNREADABLE_RECORD = (*UNREADABLE, TypeError, AttributeError, MemoryError)
"""The same where the arrays are then taken apart."""


@contextmanager
def reading(path: str | PathLike[str], what: str) -> Iterator[None]:
    """Turn what a missing, foreign or damaged archive raises into a `LukvError`; `what` it should have been, a word."""
    try:
        yield
    except OSError as error:
        raise LukvError(f"cannot read {path}: {error.strerror or f'not a {what}'}") from None
    except UNREADABLE_RECORD as error:
        raise LukvError(f"{path}: not a {what}, or a damaged one ({error})") from None
