"""What an evaluation has found so far, on the disk: one line of JSON for each answer, appended as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lukv_gguf.errors import LukvError

try:
    import fcntl
except ImportError:  # Windows: two runs at a time are then not noticed
    fcntl = None  # type: ignore[assignment]

KEY = (
    "model", "task", "length", "context", "sample", "question", "seed", "query_aware", "n_ubatch",
    "method", "metric", "ratio", "policy", "kv_type", "table",
)  # fmt: skip
"""Fields that say what a record is about. Two records with the same are the same measurement."""

Record = Mapping[str, Any]


class Store:
    """Records by their key.

    A line is written whole or, where the power fails, torn; a torn last line is cut off when the file is opened.

    Parameters
    ----------
    path
        A file of JSON lines; made when missing.

    Raises
    ------
    LukvError
        It cannot be written, another run writes to it, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[tuple[Any, ...], Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            if fcntl is not None:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LukvError(
                        f"{path}: another evaluation writes to it; wait for it, or choose another folder with -o"
                    ) from None
            self._file.seek(0)
            data = self._file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                self._file.truncate(len(whole))
        except OSError as error:
            raise LukvError(f"cannot write {path}: {error.strerror or error}") from None
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[_key(record)] = record
            except (ValueError, KeyError, TypeError):
                raise LukvError(f"{path}, line {number}: not a record of an evaluation") from None

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """The record of a measurement, if it was made."""
        return self._records.get(_key(key))

    def add(self, record: Record) -> None:
        """Append a record; once this returns, it is on the disk.

        Raises
        ------
        LukvError
            It cannot be written.
        """
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LukvError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._records[_key(record)] = record

    def close(self) -> None:
        """Close the file, and let others write to it."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)
