"""The header of a GGUF file: where each key-value pair lies, and how to rewrite them without touching the rest.

A GGUF file is ``magic version n_tensors n_kv | key-value pairs | tensor infos | padding | tensor data``. Tensor offsets
count from the start of the data, so pairs can be dropped and added while everything else is copied verbatim.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)

from lukv_gguf.errors import LukvError

ByteProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

SUPPORTED_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_MAX_DIMENSIONS = 8  # ggml has 4; more is a damaged file
_MAX_NESTING = 8
_COPY_BYTES = 8 << 20
_GET_AGAIN = "download or convert the model again"
_SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class KeyValue:
    """One key-value pair: the type of its value and its byte range in the file."""

    type: GGUFValueType
    start: int
    value_start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A parsed header.

    Attributes
    ----------
    path : the file.
    version : 2 or 3.
    n_tensors : tensors listed.
    pairs : the key-value pairs in file order.
    infos_start, infos_end : byte range of the tensor infos.
    data_start : first byte of the tensor data, aligned.
    file_size : bytes.
    alignment : ``general.alignment``, bytes.
    raw : the first `infos_end` bytes of the file.
    """

    path: Path
    version: int
    n_tensors: int
    pairs: Mapping[str, KeyValue]
    infos_start: int
    infos_end: int
    data_start: int
    file_size: int
    alignment: int
    raw: bytes

    @property
    def n_data_bytes(self) -> int:
        """Bytes from the start of the tensor data to the end of the file."""
        return max(0, self.file_size - self.data_start)

    def value(self, key: str) -> Any:
        """The value of `key`: a bool, int, float or str, an array as ndarray, an array of strings as list; or None."""
        pair = self.pairs.get(key)
        return None if pair is None else _decode(self.raw, pair.value_start, pair.type)[0]

    def array_type(self, key: str) -> GGUFValueType:
        """The type of the elements of the array `key`."""
        return GGUFValueType(struct.unpack_from("<I", self.raw, self.pairs[key].value_start)[0])


def read_header(path: str | PathLike[str]) -> GgufHeader:
    """Parse the header of a GGUF file and check that the file holds all of its tensors.

    Raises
    ------
    LukvError
        No such file, not a GGUF, an unsupported version or byte order, damaged, or truncated.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise LukvError(f"{path}: no such file")
        if not path.is_file():
            raise LukvError(f"{path}: not a file")
        with path.open("rb") as file:
            if file.read(4) != GGUF_MAGIC.to_bytes(4, "little"):
                raise LukvError(f"{path}: not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise LukvError(f"cannot read {path}: {error.strerror or error}") from None


def encode_pair(key: str, value_type: GGUFValueType, value: Any) -> bytes:
    """The bytes of one key-value pair.

    Parameters
    ----------
    key : name.
    value_type : a scalar type, STRING, or ARRAY, which here means an array of FLOAT32.
    value : what `value_type` asks for; an array of any shape is flattened in row-major order.
    """
    head = _encode_string(key) + struct.pack("<I", value_type)
    if value_type == GGUFValueType.STRING:
        return head + _encode_string(value)
    if value_type == GGUFValueType.ARRAY:
        array = np.ascontiguousarray(value, dtype="<f4")
        return head + struct.pack("<IQ", GGUFValueType.FLOAT32, array.size) + array.tobytes()
    return head + np.array(value, dtype=_SCALARS[value_type]).tobytes()


def rewrite(
    header: GgufHeader,
    target: str | PathLike[str],
    drop: Callable[[str], bool],
    add: Sequence[bytes],
    progress: ByteProgress | None = None,
) -> None:
    """Write `header`'s file to `target` with some key-value pairs dropped and others appended.

    All other pairs, the tensor infos and the tensor data are copied byte for byte. The new file is written beside the
    target under a temporary name, flushed to the disk and renamed, so `target`, which may be the file itself, is
    always either the old file or the new one. A `target` that is a symbolic link is replaced, not followed. The other
    shards of a split model are hard-linked beside a target of another name.

    Parameters
    ----------
    header : the input.
    target : path of the output.
    drop : says which keys go.
    add : encoded pairs.
    progress : called with (bytes written, bytes in all).

    Raises
    ------
    LukvError
        The input changed or cannot be read, the target cannot be written, or its name does not fit a split model.
    """
    target = Path(target)
    kept = [pair for key, pair in header.pairs.items() if not drop(key)]
    start = struct.pack("<4sIQQ", header.raw[:4], header.version, header.n_tensors, len(kept) + len(add))
    parts = [start, *(header.raw[pair.start : pair.end] for pair in kept), *add]
    parts.append(header.raw[header.infos_start : header.infos_end])
    new_header = b"".join(parts)
    if header.n_data_bytes:
        new_header += bytes(-len(new_header) % header.alignment)

    links = missing_shards(header, target)
    check_writable(target, len(new_header) + header.n_data_bytes)
    try:
        source = header.path.open("rb")
    except OSError as error:
        raise LukvError(f"cannot read {header.path}: {error.strerror or error}") from None
    with source, _linking(links), replacing(target, os.fstat(source.fileno()).st_mode) as output:
        output.write(new_header)
        source.seek(header.data_start)
        _copy(source, output, header, len(new_header), progress)


@contextlib.contextmanager
def replacing(target: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A temporary file beside `target` that takes its place once it is complete, and is removed otherwise.

    Raises
    ------
    LukvError
        It cannot be written.
    """
    temporary = None
    with _explaining_write_errors(target):
        try:
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=f".{target.name[:80]}.", suffix=".tmp", delete=False
            ) as output:
                temporary = Path(output.name)
                yield output
                output.flush()
                os.fsync(output.fileno())
            temporary.chmod(mode & 0o777)
            os.replace(temporary, target)
            temporary = None
            _sync_folder(target.parent)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def check_writable(target: str | PathLike[str], n_bytes: int) -> None:
    """Check that a file of `n_bytes` can be written beside or over `target`; leaves nothing behind.

    Raises
    ------
    LukvError
        The folder is missing or read-only, the target is a folder, or the disk has too little room.
    """
    target = Path(target)
    with _explaining_write_errors(target):
        if target.is_dir():
            raise LukvError(f"cannot write {target}: it is a folder")
        if not target.parent.is_dir():
            raise LukvError(f"cannot write {target}: no such folder: {target.parent}")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        needed_mib, free_mib = math.ceil(n_bytes / 2**20), free // 2**20
        raise LukvError(f"cannot write {target}: disk is full: {needed_mib} MiB needed, {free_mib} MiB free")


def name_beside(path: str | PathLike[str], suffix: str) -> Path:
    """`path` with `suffix` behind its stem, in front of a shard number: m.gguf → m-lukv.gguf.

    Examples
    --------
    >>> name_beside("m-00001-of-00003.gguf", "-lukv").name
    'm-lukv-00001-of-00003.gguf'
    """
    path = Path(path)
    shard = _SHARD_NAME.search(path.name)
    tail = shard[0] if shard else path.suffix if path.suffix == ".gguf" else ""
    stem = path.name.removesuffix(tail).removesuffix(suffix)
    return path.with_name(f"{stem}{suffix}{tail}")


def missing_shards(header: GgufHeader, target: str | PathLike[str]) -> list[tuple[Path, Path]]:
    """Which shards of a split model have to be linked for `target` to load, as (existing file, new name).

    llama.cpp finds the other shards by the name of the first. A model in one file, or embedded in place, needs none.

    Raises
    ------
    LukvError
        The input is not the first shard, a shard is missing, or a name does not fit.
    """
    target = Path(target)
    n_shards = int(header.value(Keys.Split.LLM_KV_SPLIT_COUNT) or 0)
    if n_shards <= 1:
        return []
    first = f"-00001-of-{n_shards:05d}.gguf"
    if int(header.value(Keys.Split.LLM_KV_SPLIT_NO) or 0) != 0:
        raise LukvError(f"{header.path}: a later shard of a split model; name the first one, …{first}")
    for path in (header.path, target):
        if not path.name.endswith(first):
            raise LukvError(f"{path}: the first shard of this split model must be named …{first}")
    links = []
    for shard in range(2, n_shards + 1):
        other = f"-{shard:05d}-of-{n_shards:05d}.gguf"
        existing, new = (path.with_name(path.name.removesuffix(first) + other) for path in (header.path, target))
        if not existing.exists():
            raise LukvError(f"{existing}: this shard of the model is missing")
        if not new.exists():
            links.append((existing, new))
        elif not new.samefile(existing):
            raise LukvError(f"{new}: exists and is not a shard of {header.path}; choose another output name")
    return links


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    size = len(data)
    try:
        (version,) = struct.unpack_from("<I", data, 4)
        if version not in SUPPORTED_VERSIONS:
            if version & 0xFFFF == 0:
                raise LukvError(f"{path}: big-endian GGUF files are not supported")
            raise LukvError(f"{path}: GGUF version {version} is not supported (only 2 and 3); convert the model again")
        n_tensors, n_pairs = struct.unpack_from("<QQ", data, 8)
        pairs: dict[str, KeyValue] = {}
        position = 24
        for _ in range(n_pairs):
            key, value_at = _decode_string(data, position)
            value_type = GGUFValueType(struct.unpack_from("<I", data, value_at)[0])
            end = _skip(data, value_at + 4, value_type)
            if key in pairs:
                raise LukvError(f"{path}: damaged GGUF: metadata key {key} appears twice")
            pairs[key] = KeyValue(value_type, position, value_at + 4, end)
            position = end
        infos_start, data_bytes = position, 0
        for _ in range(n_tensors):
            position, tensor_end = _skip_tensor_info(data, position)
            data_bytes = max(data_bytes, tensor_end)
    except (struct.error, OverflowError):  # a read past the end, by little or by more than an address can say
        raise LukvError(f"{path}: truncated GGUF: its header ends early; {_GET_AGAIN}") from None
    except ValueError:  # an unknown type, a key that is not text
        raise LukvError(f"{path}: damaged GGUF: its header cannot be read; {_GET_AGAIN}") from None
    alignment = GGUF_DEFAULT_ALIGNMENT
    if Keys.General.ALIGNMENT in pairs:
        pair = pairs[Keys.General.ALIGNMENT]
        alignment = _decode(data, pair.value_start, pair.type)[0] if pair.type == GGUFValueType.UINT32 else 0
        if alignment <= 0 or alignment & (alignment - 1):
            raise LukvError(f"{path}: damaged GGUF: {Keys.General.ALIGNMENT} must be a power of two (u32)")
    data_start = position + -position % alignment
    if data_bytes and data_start + data_bytes > size:
        raise LukvError(
            f"{path}: truncated GGUF: {size} bytes, but its tensors end at {data_start + data_bytes}; {_GET_AGAIN}"
        )
    return GgufHeader(
        path=path,
        version=version,
        n_tensors=n_tensors,
        pairs=pairs,
        infos_start=infos_start,
        infos_end=position,
        data_start=data_start,
        file_size=size,
        alignment=alignment,
        raw=data[:position],
    )


def _span(data: Any, start: int, length: int) -> int:
    if start + length > len(data):
        raise struct.error("past the end")
    return start + length


def _decode_string(data: Any, position: int, errors: str = "strict") -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = _span(data, position + 8, length)
    return data[position + 8 : end].decode("utf-8", errors), end


def _encode_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "replace")  # a file name may hold bytes that are not text
    return struct.pack("<Q", len(encoded)) + encoded


def _skip(data: Any, position: int, value_type: GGUFValueType, depth: int = 0) -> int:
    """The end of the value that starts at `position`."""
    if value_type in _SCALARS:
        return _span(data, position, np.dtype(_SCALARS[value_type]).itemsize)
    if value_type == GGUFValueType.STRING:
        return _span(data, position + 8, struct.unpack_from("<Q", data, position)[0])
    if depth == _MAX_NESTING:
        raise ValueError("arrays nested too deeply")
    element_number, count = struct.unpack_from("<IQ", data, position)
    element_type = GGUFValueType(element_number)
    position += 12
    if element_type in _SCALARS:
        return _span(data, position, count * np.dtype(_SCALARS[element_type]).itemsize)
    if element_type == GGUFValueType.STRING:  # vocabularies: hundreds of thousands of them
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            position += 8 + length_at(data, position)[0]
        return _span(data, position, 0)
    for _ in range(count):
        position = _skip(data, position, element_type, depth + 1)
    return position


def _decode(data: Any, position: int, value_type: GGUFValueType) -> tuple[Any, int]:
    """The value that starts at `position`, and its end. The header has been parsed, so nothing is out of range."""
    if value_type in _SCALARS:
        dtype = np.dtype(_SCALARS[value_type])
        return np.frombuffer(data, dtype, 1, position)[0].item(), position + dtype.itemsize
    if value_type == GGUFValueType.STRING:
        return _decode_string(data, position, "replace")
    element_number, count = struct.unpack_from("<IQ", data, position)
    element_type = GGUFValueType(element_number)
    position += 12
    if element_type in _SCALARS:
        dtype = np.dtype(_SCALARS[element_type])
        return np.frombuffer(data, dtype, count, position).copy(), position + count * dtype.itemsize
    values = []
    for _ in range(count):
        value, position = _decode(data, position, element_type)
        values.append(value)
    return values, position


def _skip_tensor_info(data: Any, position: int) -> tuple[int, int]:
    """The end of a tensor info, and the end of the tensor relative to the start of the data."""
    position = _skip(data, position, GGUFValueType.STRING)
    (n_dims,) = struct.unpack_from("<I", data, position)
    if n_dims > _MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    *dims, type_number, offset = struct.unpack_from(f"<{n_dims}QIQ", data, position + 4)
    n_bytes = 0  # of a type that gguf-py does not know: llama.cpp will judge it
    if type_number in GGMLQuantizationType._value2member_map_:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)]
        n_bytes = math.prod(dims) // block * block_bytes
    return position + 4 + 8 * n_dims + 12, offset + n_bytes


def _copy(source: BinaryIO, output: BinaryIO, header: GgufHeader, done: int, progress: ByteProgress | None) -> None:
    total = done + header.n_data_bytes
    while done < total:
        try:
            block = source.read(min(_COPY_BYTES, total - done))
        except OSError as error:
            raise LukvError(f"cannot read {header.path}: {error.strerror or error}") from None
        if not block:
            raise LukvError(f"{header.path}: the file became shorter while it was copied")
        output.write(block)
        done += len(block)
        if progress:
            progress(done, total)


@contextlib.contextmanager
def _linking(links: Sequence[tuple[Path, Path]]) -> Iterator[None]:
    """Hard links to the other shards, taken back when the rest fails."""
    made: list[Path] = []
    try:
        for existing, new in links:
            try:
                os.link(existing.resolve(), new)
            except OSError as error:
                raise LukvError(
                    f"cannot link {new} to {existing}: {error.strerror or error}; "
                    "write beside the input, or over it (-o with the input's own name)"
                ) from None
            made.append(new)
        yield
    except BaseException:
        for new in made:
            new.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _explaining_write_errors(target: Path) -> Iterator[None]:
    reasons = {
        errno.ENOSPC: "disk is full",
        errno.EDQUOT: "disk quota is used up",
        errno.EFBIG: "the file system does not take files of this size",
        errno.EROFS: "file system is read-only",
        errno.EACCES: f"no permission to write in {target.parent}",
        errno.EPERM: f"no permission to write in {target.parent}",
    }
    try:
        yield
    except OSError as error:
        raise LukvError(f"cannot write {target}: {reasons.get(error.errno, error.strerror or error)}") from None


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
