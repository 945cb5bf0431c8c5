"""A GGUF file, or all shards of a split one: metadata values and dequantised tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from lukv_gguf.errors import LukvError

_SHARD_NAME = re.compile(r"-00001-of-(\d{5})\.gguf$")


class GGUFFile:
    """Read access to a model's metadata and weights; the file stays memory-mapped.

    Parameters
    ----------
    path
        A GGUF file; of a split model, the first shard.

    Raises
    ------
    LukvError
        The file is missing, is not a GGUF, or is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        readers = [_open(shard) for shard in self._shards()]
        self._fields = readers[0].fields
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.value("general.architecture", "(none)"))

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key, or `default`."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def has_tensor(self, name: str) -> bool:
        """Whether the model has a tensor of that name."""
        return name in self._tensors

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, dequantised, row-major as ``[n_out, n_in]``.

        Raises
        ------
        LukvError
            There is no such tensor, or gguf-py cannot dequantise its type.
        """
        if name not in self._tensors:
            raise LukvError(f"{self.path}: tensor {name} is missing")
        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise LukvError(
                f"{self.path}: cannot dequantise {name} of type {tensor.tensor_type.name}; "
                "profile an f16 or q8_0 file of the model instead"
            ) from None

    def _shards(self) -> list[Path]:
        match = _SHARD_NAME.search(self.path.name)
        if not match:
            return [self.path]
        stem = self.path.name[: match.start()]
        return [self.path.with_name(f"{stem}-{i + 1:05d}-of-{match[1]}.gguf") for i in range(int(match[1]))]


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError:
        raise LukvError(f"{path}: no such file") from None
    except OSError as error:
        raise LukvError(f"{path}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise LukvError(f"{path}: not a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError):
        raise LukvError(f"{path}: damaged or cut-off GGUF file; fetch it again") from None
