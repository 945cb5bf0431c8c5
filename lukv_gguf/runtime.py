"""The patched llama.cpp from Python: what the cache of a live model holds.

Works on a ``llama_cpp.Llama`` (or a raw ``llama_context_p``) of the patched build; the C side is
``native/include/llama-lukv.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lukv_gguf.errors import LukvError


@dataclass(frozen=True)
class CacheUsage:
    """Cells of a live cache.

    Attributes
    ----------
    used, owned : int32 arrays [n_layer, n_head_kv]
        Cells that hold a token, and cells in the budget of each head; -1 in layers that are not budgeted (sliding
        window). A head may use up to ``recent`` more than it owns, for the tokens in flight.
    recent : int
        Cells of each head for the tokens in flight.
    ratio : float
        Kept fraction that the budgets are for.
    evictions, evicted : int
        Times that cells were evicted, and how many cells that were.
    commit_ms : float
        Milliseconds that commits took so far (scores, selection, moves).
    bytes, bytes_full : int
        Bytes allocated for K and V, and what a cache that keeps everything would take.
    """

    used: np.ndarray
    owned: np.ndarray
    recent: int
    ratio: float
    evictions: int
    evicted: int
    commit_ms: float
    bytes: int
    bytes_full: int


@cache
def _library() -> ctypes.CDLL:
    import llama_cpp.llama_cpp as binding

    library = binding._lib
    if not hasattr(library, "llama_lukv_enabled"):
        raise LukvError(
            "this llama_cpp is not the patched build: install it with scripts/setup.sh (the README's first command)"
        )

    context = binding.llama_context_p_ctypes
    signatures = {
        "enabled": (ctypes.c_bool, [context]),
        "memory_size": (ctypes.c_uint64, [context]),
        "memory_size_full": (ctypes.c_uint64, [context]),
        "n_layer": (ctypes.c_int32, [context]),
        "n_head_kv": (ctypes.c_int32, [context]),
        "ratio": (ctypes.c_float, [context]),
        "n_cells_recent": (ctypes.c_int32, [context]),
        "n_evictions": (ctypes.c_int64, [context]),
        "n_evicted": (ctypes.c_int64, [context]),
        "t_commit_us": (ctypes.c_int64, [context]),
        "n_cells_owned": (ctypes.c_int32, [context, ctypes.c_int32, ctypes.c_int32]),
        "n_cells_used": (ctypes.c_int32, [context, ctypes.c_int32, ctypes.c_int32]),
        "seq_n_cells_owned": (ctypes.c_int32, [context, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        "seq_n_cells_used": (ctypes.c_int32, [context, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        "seq_get_positions": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
        ),
        "commit": (ctypes.c_bool, [context]),
        "seq_kvzip": (
            ctypes.c_int32,
            [context, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_int32, ctypes.c_int32],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"llama_lukv_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


def has_gpu() -> bool:
    """Whether llama.cpp has a GPU to run on here; servers of its RPC backend do not count."""
    import llama_cpp.llama_cpp as binding

    find = binding._lib.ggml_backend_dev_by_type
    find.argtypes, find.restype = [ctypes.c_int], ctypes.c_void_p
    return any(find(kind) for kind in (1, 2))  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU


def program(name: str) -> Path:
    """Path of a program of the patched build, e.g. ``llama-cli``.

    Raises
    ------
    LukvError
        The installed llama_cpp came without programs.
    """
    import llama_cpp

    path = Path(llama_cpp.__file__).parent / "bin" / name
    if not path.exists():
        raise LukvError(f"{name} is not installed with llama_cpp: run scripts/setup.sh (the README's first command)")
    return path


def _context(llama: Any) -> Any:
    return getattr(llama, "ctx", llama)


def enabled(llama: Any) -> bool:
    """Whether the cells of this model are budgeted per head; False for an ordinary KV cache."""
    return _library().llama_lukv_enabled(_context(llama))


def memory_size(llama: Any) -> int:
    """Bytes allocated for K and V, with or without LU-KV."""
    return _library().llama_lukv_memory_size(_context(llama))


def usage(llama: Any, sequence: int | None = None) -> CacheUsage:
    """Cells used and owned per layer and head, by one sequence or by all together.

    Sequences share what the budgets give in proportion to their lengths, so what one of them owns changes with the others.

    Raises
    ------
    LukvError
        If the model runs with an ordinary KV cache.
    """
    library, context = _library(), _context(llama)
    _require_enabled(llama)
    shape = library.llama_lukv_n_layer(context), library.llama_lukv_n_head_kv(context)

    def per_head(function: Any) -> np.ndarray:
        return np.array([[function(context, il, ih) for ih in range(shape[1])] for il in range(shape[0])], np.int32)

    used, owned = library.llama_lukv_n_cells_used, library.llama_lukv_n_cells_owned
    if sequence is not None:
        used = partial(_of_sequence, library.llama_lukv_seq_n_cells_used, sequence)
        owned = partial(_of_sequence, library.llama_lukv_seq_n_cells_owned, sequence)

    return CacheUsage(
        used=per_head(used),
        owned=per_head(owned),
        recent=library.llama_lukv_n_cells_recent(context),
        ratio=library.llama_lukv_ratio(context),
        evictions=library.llama_lukv_n_evictions(context),
        evicted=library.llama_lukv_n_evicted(context),
        commit_ms=library.llama_lukv_t_commit_us(context) / 1000.0,
        bytes=library.llama_lukv_memory_size(context),
        bytes_full=library.llama_lukv_memory_size_full(context),
    )


def _of_sequence(function: Any, sequence: int, context: Any, layer: int, head: int) -> int:
    return function(context, sequence, layer, head)


def positions(llama: Any, layer: int, head: int, sequence: int = 0) -> np.ndarray:
    """Positions of a sequence that a head can attend to, ascending: int32 [n].

    Raises
    ------
    LukvError
        If the model runs with an ordinary KV cache, or has no such head.
    """
    library, context = _library(), _context(llama)
    _require_enabled(llama)
    n = library.llama_lukv_seq_get_positions(context, sequence, layer, head, None, 0)
    if n < 0:
        raise LukvError(f"the model has no KV head ({layer}, {head})")
    result = np.empty(n, np.int32)
    library.llama_lukv_seq_get_positions(context, sequence, layer, head, result.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
    return result


def commit(llama: Any) -> None:
    """Bring every head down to its budget now; under the policy ``prefill`` this ends the prompt.

    Raises
    ------
    LukvError
        If the computation failed; the cache is then unchanged.
    """
    _require_enabled(llama)
    if not _library().llama_lukv_commit(_context(llama)):
        raise LukvError("llama.cpp could not evict: see its log for the reason")


def kvzip(llama: Any, chunk: int = 2048, sequence: int = 0) -> None:
    """Let the model repeat the context that it has cached, and evict by what it looked at: KVzip.

    The context is what a `llama_cpp.Llama` has read since its last reset, the beginning of a user's message in the chat
    template; the file must say metric ``kvzip`` and policy ``prefill``. Afterwards, questions about the context can
    follow. It takes longer than reading the context did, and `n_ctx` needs room for a part and the request.

    Parameters
    ----------
    chunk
        Tokens that are repeated at a time.

    Raises
    ------
    LukvError
        Another metric, no context, no room, or it was evicted already.

    References
    ----------
    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.
    """
    from lukv_gguf.reference import Tokenizer
    from lukv_gguf.replay import make_replays

    _require_enabled(llama)
    tokens = llama.input_ids[: llama.n_tokens].tolist()
    with Tokenizer(llama.model_path) as tokenizer:
        replays = make_replays(tokenizer, tokens, chunk, llama.n_ctx())
    if not replays:
        raise LukvError("there is no context that could be repeated: read one first")
    for replay in replays:
        record_repetition(llama, replay.tokens, replay.start, replay.end, sequence)
    commit(llama)


def record_repetition(llama: Any, tokens: Sequence[int], start: int, end: int, sequence: int = 0) -> None:
    """Read tokens that repeat the positions start ... end - 1 of a cached context, and score these by what was looked at.

    One step of `kvzip`. The sequence is left as it was; `commit` then evicts.

    Raises
    ------
    LukvError
        Another metric, no such positions, no room, or the sequence was evicted already.
    """
    _require_enabled(llama)
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    status = _library().llama_lukv_seq_kvzip(_context(llama), sequence, array, len(tokens), start, end)
    if status:
        raise LukvError({
            -1: "the cache ranks by another metric: embed kvzip (lukv-gguf embed --metric kvzip --policy prefill)",
            -2: f"sequence {sequence} has no whole context with the positions {start} to {end - 1}: it was evicted, or is shorter",
            -3: f"llama.cpp could not read {len(tokens)} more tokens behind the context: see its log; is n_ctx too small?",
        }[status])  # fmt: skip


def _require_enabled(llama: Any) -> None:
    if not enabled(llama):
        raise LukvError("this model runs with an ordinary KV cache: embed a table (lukv-gguf embed) or set lukv.ratio")
