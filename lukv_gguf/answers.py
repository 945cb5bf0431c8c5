"""Answers of the deployed, quantised model: decoded by llama.cpp with the full cache."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from lukv_gguf import runtime
from lukv_gguf.errors import LukvError
from lukv_gguf.mapped_weights import MappedWeights, mapped_on_demand
from lukv_gguf.reference.gguf_file import GGUFFile

_RELEASE_BYTES = 1 << 30  # a larger file does not stay resident: its pages are given back layer by layer
_BATCH = 512  # tokens of one call into llama.cpp: an interrupt waits no longer than for these
_QUERIES_AT_ONCE = 63  # sequences in one cache, besides that of the shared context


def decode_answers(
    path: str | Path,
    prefix: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    n_new: int,
    *,
    end_tokens: Collection[int] = (),
    n_ctx: int = 0,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue several suffixes of one shared prefix greedily, as the file's users will see it.

    A LU-KV table in the file is switched off. The prefix is read once; the queries are sequences of one cache that
    share its cells.

    Parameters
    ----------
    path
        The GGUF file.
    prefix, suffixes
        Tokens that all queries share, and the further tokens of each, at least one.
    n_new
        Most tokens of an answer; it ends earlier at one of `end_tokens`.
    n_ctx
        Least context to ask for, where a model's RoPE depends on it.
    n_threads
        By default all cores.
    progress
        Called with tokens done and tokens in all, at most.

    Returns
    -------
    list of list of int
        The new tokens of each query, without the end token.

    Raises
    ------
    LukvError
        llama.cpp cannot load or run the model, or a suffix is empty.
    """
    if not suffixes or not all(len(suffix) for suffix in suffixes):
        raise LukvError("decoding needs at least one suffix, and one token or more in each")
    groups = [suffixes[i : i + _QUERIES_AT_ONCE] for i in range(0, len(suffixes), _QUERIES_AT_ONCE)]
    room = max(sum(len(suffix) + n_new for suffix in group) for group in groups)
    total = len(prefix) + sum(len(suffix) + n_new - 1 for suffix in suffixes)
    n_sequence = 1 + max(map(len, groups))
    with _context(path, max(n_ctx, len(prefix) + room), n_sequence, n_threads) as (llama, context, weights):
        decoder = _Decoder(llama, context, weights, path, total, progress)
        decoder.read([(token, i, 0, False) for i, token in enumerate(prefix)])
        answers = [answer for group in groups for answer in _answer(decoder, group, len(prefix), n_new, end_tokens)]
    if progress is not None:
        progress(total, total)
    return answers


def _answer(
    decoder: _Decoder, suffixes: Sequence[Sequence[int]], n_prefix: int, n_new: int, end_tokens: Collection[int]
) -> list[list[int]]:
    decoder.share_prefix(len(suffixes))
    answers: list[list[int]] = [[] for _ in suffixes]
    batch = [
        (token, n_prefix + i, row + 1, i == len(suffix) - 1)
        for row, suffix in enumerate(suffixes)
        for i, token in enumerate(suffix)
    ]
    for step in range(n_new):
        chosen = decoder.read(batch)
        batch = []
        for sequence, token in chosen:
            if token not in end_tokens:
                answers[sequence - 1].append(token)
                batch.append((token, n_prefix + len(suffixes[sequence - 1]) + step, sequence, True))
        if not batch:
            break
    return answers


class _Decoder:
    """One llama.cpp context, fed with (token, position, sequence, wants a successor)."""

    def __init__(
        self,
        llama: Any,
        context: Any,
        weights: MappedWeights | None,
        path: str | Path,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._llama, self._context, self._weights, self._path = llama, context, weights, path
        model = llama.llama_get_model(context)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._done, self._total, self._progress = 0, total, progress

    def share_prefix(self, n_query: int) -> None:
        """Make sequences 1 ... n_query continue sequence 0, whatever they held before."""
        memory = self._llama.llama_get_memory(self._context)
        for sequence in range(1, n_query + 1):
            self._llama.llama_memory_seq_rm(memory, sequence, -1, -1)
            self._llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def read(self, tokens: Sequence[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Decode tokens, and return (sequence, most likely successor) for those that want one."""
        chosen = []
        for first in range(0, len(tokens), _BATCH):
            part = tokens[first : first + _BATCH]
            batch = self._llama.llama_batch_init(len(part), 0, 1)
            try:
                batch.n_tokens = len(part)
                for i, (token, position, sequence, wanted) in enumerate(part):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                failed = self._llama.llama_decode(self._context, batch)
                if self._weights is not None:
                    self._weights.finish()
                if failed:
                    raise LukvError(f"{self._path}: llama.cpp could not decode; see its log for the reason")
            finally:
                self._llama.llama_batch_free(batch)
            chosen += [(part[i][2], self._most_likely(i)) for i in range(len(part)) if part[i][3]]
            self._done += len(part)
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)
        return chosen

    def _most_likely(self, index: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._n_vocab,)).argmax())


@contextmanager
def _context(
    path: str | Path, n_ctx: int, n_sequence: int, n_threads: int | None
) -> Iterator[tuple[Any, Any, MappedWeights | None]]:
    """A llama.cpp context with a full cache that all sequences share, and the weights if they are given back."""
    from lukv_gguf.reference.tokenizer import import_llama_cpp

    llama = import_llama_cpp()
    llama.llama_backend_init()
    off = (llama.llama_model_kv_override * 2)()  # the second one ends the list
    off[0].tag, off[0].key, off[0].value.val_bool = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL, b"lukv.enabled", False
    params = llama.llama_model_default_params()
    params.kv_overrides = ctypes.cast(off, type(params.kv_overrides))
    on_demand = MappedWeights.is_supported() and not runtime.has_gpu() and GGUFFile(path).n_byte > _RELEASE_BYTES
    params.use_extra_bufts = not on_demand  # of a large model no second, repacked copy in memory
    with mapped_on_demand() if on_demand else nullcontext():
        model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LukvError(f"{path}: llama.cpp cannot load the model")
    weights = MappedWeights(path) if on_demand else None
    try:
        options = llama.llama_context_default_params()
        if weights is not None:
            options.cb_eval = weights.callback
        options.n_ctx, options.n_seq_max, options.kv_unified, options.swa_full = n_ctx, n_sequence, True, True
        options.n_batch = options.n_ubatch = _BATCH
        if not runtime.has_gpu():  # many queries over one prefix: on a CPU a matrix product is faster
            options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = n_threads or os.cpu_count() or 1
        context = llama.llama_init_from_model(model, options)
        if not context:
            raise LukvError(f"{path}: llama.cpp cannot make a context of {n_ctx} tokens; is there enough memory?")
        try:
            yield llama, context, weights
        finally:
            llama.llama_free(context)
    finally:
        llama.llama_model_free(model)
