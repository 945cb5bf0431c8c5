"""A model file that llama.cpp has mapped: its pages are given back layer by layer while it computes (Linux).

A mapped file is resident as a whole once all its layers were used, and llama.cpp even reads all of it in advance. The
pages are clean copies of the file, so they can go at any time: the system reads them again, or finds them in its cache.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lukv_gguf.reference.gguf_file import GGUFFile

_NO_PREFETCH = "LLAMA_MMAP_NO_PREFETCH"  # patches/0007: read by llama.cpp when it maps a file
_MADV_WILLNEED, _MADV_DONTNEED = 3, 4
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)$")


@contextmanager
def mapped_on_demand() -> Iterator[None]:
    """While this lasts, llama.cpp maps files without reading all of their pages first."""
    before = os.environ.get(_NO_PREFETCH)
    os.environ[_NO_PREFETCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_PREFETCH]
        else:
            os.environ[_NO_PREFETCH] = before


class MappedWeights:
    """The pages of a model that llama.cpp has loaded.

    Attributes
    ----------
    callback
        For ``llama_context_params.cb_eval``: gives a layer back when the next one begins.
    """

    def __init__(self, path: str | Path) -> None:
        import llama_cpp.llama_cpp as binding

        self._get_name = binding._lib.ggml_get_name
        self._get_name.argtypes, self._get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._pages = _pages_by_layer(GGUFFile(path))
        self._layer = -1
        self._raised: BaseException | None = None
        self.callback = binding.ggml_backend_sched_eval_callback(self._on_node)

    @staticmethod
    def is_supported() -> bool:
        """Whether pages can be given back on this system."""
        return platform.system() == "Linux"

    def finish(self) -> None:
        """Give back all pages, once llama.cpp has computed. Raises what the callback could not: an interrupt."""
        for layer in self._pages:
            self._advise(layer, _MADV_DONTNEED)
        self._layer = -1
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised

    def _on_node(self, tensor: int, ask: bool, _: Any) -> bool:
        try:
            layer = _layer_of_node(self._get_name(tensor))
            if ask:  # whether the graph has to be computed up to here before it goes on
                return layer > self._layer
            self._enter(layer)
        except BaseException as error:  # C code cannot pass it on
            self._raised = error
        return self._raised is None  # if not, the rest of the graph is left out

    def _enter(self, layer: int) -> None:
        self._advise(self._layer, _MADV_DONTNEED)
        self._advise(layer + 1, _MADV_WILLNEED)
        self._layer = layer

    def _advise(self, layer: int, advice: int) -> None:
        for start, stop in self._pages.get(layer, ()):
            self._madvise(start, stop - start, advice)


def _layer_of_node(name: bytes) -> int:
    """The layer in the name of a graph's node, -1 if it has none."""
    _, dash, number = name.rpartition(b"-")
    return int(number) if dash and number.isdigit() else -1


def _pages_by_layer(file: GGUFFile) -> dict[int, list[tuple[int, int]]]:
    """Address ranges of each layer's weights; -1 for those of no layer."""
    mappings = _mappings()
    found: dict[int, list[tuple[int, int]]] = {}
    for name, path, first, last in file.extents():
        layer = re.match(r"blk\.(\d+)\.", name)
        ranges = found.setdefault(int(layer[1]) if layer else -1, [])
        for start, stop, offset in mappings.get(os.path.realpath(path), ()):
            low = max(start, start + first - offset) // _PAGE * _PAGE
            high = min(stop, start + last - offset)
            if low >= high:
                continue
            if ranges and ranges[-1][0] <= low <= -(-ranges[-1][1] // _PAGE) * _PAGE:
                ranges[-1] = ranges[-1][0], high
            else:
                ranges.append((low, high))
    return found


def _mappings() -> dict[str, list[tuple[int, int, int]]]:
    """Address ranges of this process's mapped files, and where in the file they begin."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = _MAPPING.match(line)
        if match:
            start, stop, offset = (int(text, 16) for text in match.groups()[:3])
            found.setdefault(match[4], []).append((start, stop, offset))
    return found
