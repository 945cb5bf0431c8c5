"""Where a long profile stands, on the disk: it can be interrupted after any layer and go on later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lukv_gguf.errors import UNREADABLE, LukvError
from lukv_gguf.gguf_header import read_header
from lukv_gguf.oracle import ResidualStreams

Arrays = Mapping[str, npt.NDArray[np.floating]]


def model_identity(path: str | Path) -> list[str | int]:
    """What tells a model file from another one, for the key of a checkpoint."""
    header = read_header(path)
    return [hashlib.sha256(header.raw).hexdigest(), header.file_size, header.path.stat().st_mtime_ns]


class Checkpoint:
    """A folder with the answers, what each layer showed, and the residual streams behind the last one.

    Every file is written under another name and renamed, and the residual streams come last: whatever ends the
    program, at most the layer in work is lost. A file that cannot be read counts as not written.

    Parameters
    ----------
    folder
        Made when something is first saved.
    key
        What the run depends on. A folder of another run is not used.
    discard
        Remove what another run left.

    Raises
    ------
    LukvError
        The folder belongs to another run, and `discard` is not set.
    """

    def __init__(self, folder: Path, key: str, discard: bool = False) -> None:
        self._folder = folder
        self._key = key
        if not folder.exists():
            return
        try:
            same = (folder / "key").read_text() == key
        except OSError:
            same = False
        if not same:
            if not discard:
                raise LukvError(
                    f"{folder}: left by a run on another model or with other parameters; "
                    "remove it, or start over with -f"
                )
            discard_folder(folder)

    def answers(self) -> list[list[int]] | None:
        """The answers of the model, once they are known."""
        try:
            found = json.loads((self._folder / "answers.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, list) else None

    def save_answers(self, answers: list[list[int]]) -> None:
        """Keep the answers."""
        self._write("key", self._key.encode())
        self._write("answers.json", json.dumps(answers).encode())

    def layers(self) -> tuple[list[Arrays], ResidualStreams | None]:
        """The layers that are done, and where to go on; nothing of it unless all of it can be read."""
        streams = self._read("streams.npz")
        if streams is None or not {"layer", "prefix", "queries"} <= set(streams):
            return [], None
        n_done = int(streams["layer"])
        done = [self._read(_layer_name(i)) for i in range(n_done)]
        if None in done:
            return [], None
        arrays = [torch.from_numpy(np.array(streams[name])) for name in ("prefix", "queries")]
        return [layer for layer in done if layer is not None], ResidualStreams(n_done, *arrays)

    def save_layer(self, arrays: Arrays, streams: ResidualStreams) -> None:
        """Keep what a layer showed, and the residual streams behind it."""
        self._write_arrays(_layer_name(streams.layer - 1), arrays)
        prefix, queries = streams.prefix.cpu().numpy(), streams.queries.cpu().numpy()
        self._write_arrays("streams.npz", {"layer": np.array(streams.layer), "prefix": prefix, "queries": queries})

    def _read(self, name: str) -> Arrays | None:
        try:
            with np.load(self._folder / name, allow_pickle=False) as file:
                return dict(file)
        except UNREADABLE:
            return None

    def _write(self, name: str, data: bytes) -> None:
        with self._explaining():
            self._folder.mkdir(exist_ok=True)
            (self._folder / f"{name}.tmp").write_bytes(data)
            os.replace(self._folder / f"{name}.tmp", self._folder / name)

    def _write_arrays(self, name: str, arrays: Arrays) -> None:
        with self._explaining():
            with (self._folder / f"{name}.tmp").open("wb") as file:
                np.savez(file, **arrays)
            os.replace(self._folder / f"{name}.tmp", self._folder / name)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LukvError(f"cannot write {self._folder}: {error.strerror or error}") from None


def discard_folder(folder: Path) -> None:
    """Remove a checkpoint, if there is one.

    Raises
    ------
    LukvError
        It cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LukvError(f"cannot remove {folder}: {error.strerror or error}") from None


def _layer_name(index: int) -> str:
    return f"layer-{index:04d}.npz"
