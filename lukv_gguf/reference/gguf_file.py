"""A GGUF file, or all shards of a split one: metadata values and dequantised tensors."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import GgufHeader, read_header

_SHARD_NAME = re.compile(r"-00001-of-(\d{5})\.gguf$")
_CHUNK_WEIGHTS = 1 << 18  # dequantised together by one thread: small enough for its cache
_PLAIN_TYPES = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}


@dataclass(frozen=True)
class _StoredTensor:
    path: Path
    offset: int
    type: int
    shape: tuple[int, ...]


class GGUFFile:
    """Read access to a model's metadata and weights.

    Weights are read, not mapped: pages of a mapped file would count as this process's memory until it ends.

    Parameters
    ----------
    path
        A GGUF file; of a split model, the first shard.

    Raises
    ------
    LukvError
        The file or a shard is missing, is not a GGUF, or is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        headers = [read_header(shard) for shard in _shards(self.path)]
        self._header = headers[0]
        self._tensors = {name: tensor for header in headers for name, tensor in _tensor_infos(header)}

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.value("general.architecture", "(none)"))

    @property
    def n_weight(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self._tensors.values())

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key (arrays as lists), or `default`."""
        if key not in self._header.pairs:
            return default
        found = self._header.value(key)
        return found.tolist() if isinstance(found, np.ndarray) else found

    def has_tensor(self, name: str) -> bool:
        """Whether the model has a tensor of that name."""
        return name in self._tensors

    @property
    def n_byte(self) -> int:
        """Bytes of all tensors on the disk."""
        return sum(last - first for _, _, first, last in self.extents())

    def extents(self) -> Iterator[tuple[str, Path, int, int]]:
        """Where each tensor lies, in the order of the files: name, file, its first byte, and that of the next tensor."""
        ordered = sorted(self._tensors.items(), key=lambda item: (item[1].path, item[1].offset))
        for (name, tensor), following in zip(ordered, [*ordered[1:], None]):
            last = following[1].offset if following and following[1].path == tensor.path else tensor.path.stat().st_size
            yield name, tensor.path, tensor.offset, last

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, row-major: ``[n_out, n_in]``.

        Raises
        ------
        LukvError
            There is no such tensor.
        """
        return self._find(name).shape

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor, dequantised piece by piece, so that a float32 copy of the whole never exists.

        Raises
        ------
        LukvError
            There is no such tensor, it cannot be read, or gguf-py cannot dequantise its type.
        """
        shape = self.shape(name)
        n_row, width = math.prod(shape[:-1]), shape[-1]
        result = torch.empty(n_row, width, dtype=dtype)
        step = max(1, _CHUNK_WEIGHTS // width)

        @torch.inference_mode()  # it holds for one thread only
        def fill(start: int) -> None:
            stop = min(start + step, n_row)
            result[start:stop] = torch.from_numpy(self._read(name, start, stop - start))

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run while it computes
            list(pool.map(fill, range(0, n_row, step)))
        return result.reshape(shape)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, dequantised to float32; errors as of `tensor`."""
        return torch.from_numpy(np.concatenate([self._read(name, row, 1) for row in rows]))

    def _find(self, name: str) -> _StoredTensor:
        if name not in self._tensors:
            raise LukvError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]

    def _read(self, name: str, first_row: int, n_row: int) -> npt.NDArray[np.float32]:
        """Rows of a tensor seen as a matrix, [n_row, width]."""
        tensor = self._find(name)
        try:
            kind = gguf.GGMLQuantizationType(tensor.type)
            n_weight, n_byte = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = tensor.shape[-1] // n_weight * n_byte
            offset = tensor.offset + first_row * row_bytes
            raw = np.fromfile(tensor.path, np.uint8, n_row * row_bytes, offset=offset)
            if raw.size != n_row * row_bytes:
                raise LukvError(f"{tensor.path}: tensor {name} is cut off")
            raw = raw.view(_PLAIN_TYPES.get(kind, np.uint8)).reshape(n_row, -1)
            return np.asarray(gguf.dequantize(raw, kind), np.float32)
        except OSError as error:
            raise LukvError(f"cannot read {tensor.path}: {error.strerror or error}") from None
        except (ValueError, NotImplementedError):  # a type that gguf-py does not know, or only names
            raise LukvError(
                f"{self.path}: cannot dequantise {name} of type {_type_name(tensor.type)}; "
                "profile an f16 or q8_0 file of the model instead"
            ) from None


def _type_name(number: int) -> str:
    known = gguf.GGMLQuantizationType._value2member_map_
    return known[number].name if number in known else str(number)


def _tensor_infos(header: GgufHeader) -> Iterator[tuple[str, _StoredTensor]]:
    """The tensors of one file; `read_header` has checked that they are all there."""
    at = header.infos_start
    for _ in range(header.n_tensors):
        (n_name,) = struct.unpack_from("<Q", header.raw, at)
        name = header.raw[at + 8 : at + 8 + n_name].decode()
        at += 8 + n_name
        (n_dim,) = struct.unpack_from("<I", header.raw, at)
        *shape, kind, offset = struct.unpack_from(f"<{n_dim}QIQ", header.raw, at + 4)
        at += 4 + 8 * n_dim + 12
        yield name, _StoredTensor(header.path, header.data_start + offset, kind, tuple(reversed(shape)))


def _shards(path: Path) -> list[Path]:
    match = _SHARD_NAME.search(path.name)
    if not match:
        return [path]
    stem = path.name[: match.start()]
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{match[1]}.gguf") for i in range(int(match[1]))]
