"""Sequences of a live context, through llama.cpp's own interface."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np


class Context:
    """A model with a context for several sequences. Close it, or use it in a `with`."""

    def __init__(
        self,
        path: Path,
        *,
        overrides: Mapping[str, float | bool | str] | None = None,
        n_ctx: int = 768,
        n_ubatch: int = 128,
        n_seq_max: int = 4,
        kv_type: int = 0,
        flash_attn: bool = True,
        unified: bool = True,
        n_gpu_layers: int = 0,
        verbose: bool = False,
    ) -> None:
        # the binding makes the array of overrides for us
        self._loader = llama_cpp.Llama(
            model_path=str(path), kv_overrides=dict(overrides or {}), n_ctx=64, n_batch=64, verbose=verbose, n_threads=1,
            n_gpu_layers=n_gpu_layers,
        )  # fmt: skip
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ubatch
        params.n_seq_max, params.kv_unified = n_seq_max, unified
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = 1 if flash_attn else 0
        params.op_offload = n_gpu_layers > 0
        self.ctx = llama_cpp.llama_init_from_model(self._loader.model, params)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = self._loader.n_vocab()
        self._batch = llama_cpp.llama_batch_init(n_ctx, 0, n_seq_max)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.ctx)
        self._loader.close()

    def length(self, sequence: int) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self.memory, sequence) + 1

    def try_decode(self, tokens: Mapping[int | tuple[int, ...], Sequence[int]]) -> int:
        """A tuple stands for sequences that get the same tokens."""
        batch, n = self._batch, 0
        lengths: dict[int, int] = {}
        for key, ids in tokens.items():
            sequences = key if isinstance(key, tuple) else (key,)
            start = lengths.get(sequences[0], self.length(sequences[0]))
            lengths |= dict.fromkeys(sequences, start + len(ids))
            for i, token in enumerate(ids):
                batch.token[n], batch.pos[n], batch.logits[n] = token, start + i, True
                batch.n_seq_id[n] = len(sequences)
                for s, sequence in enumerate(sequences):
                    batch.seq_id[n][s] = sequence
                n += 1
        batch.n_tokens = n
        return llama_cpp.llama_decode(self.ctx, batch)

    def decode(
        self, tokens: Mapping[int | tuple[int, ...], Sequence[int]]
    ) -> dict[int | tuple[int, ...], np.ndarray]:
        """Logits of the tokens that continue each sequence, [n, n_vocab]."""
        assert self.try_decode(tokens) == 0
        n = self._batch.n_tokens
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), (n, self.n_vocab)).astype(np.float64)
        result, first = {}, 0
        for sequence, ids in tokens.items():
            result[sequence] = logits[first : first + len(ids)].copy()
            first += len(ids)
        return result

    def remove(self, sequence: int, first: int = -1, last: int = -1) -> None:
        assert llama_cpp.llama_memory_seq_rm(self.memory, sequence, first, last)

    def copy(self, source: int, target: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def keep(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, sequence)

    def save(self, sequence: int | None = None) -> bytes:
        if sequence is None:
            size = llama_cpp.llama_state_get_size(self.ctx)
            data = (ctypes.c_uint8 * size)()
            return bytes(data[: llama_cpp.llama_state_get_data(self.ctx, data, size)])
        size = llama_cpp.llama_state_seq_get_size(self.ctx, sequence)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: llama_cpp.llama_state_seq_get_data(self.ctx, data, size, sequence)])

    def restore(self, state: bytes, sequence: int | None = None) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if sequence is None:
            return llama_cpp.llama_state_set_data(self.ctx, data, len(state)) == len(state)
        return llama_cpp.llama_state_seq_set_data(self.ctx, data, len(state), sequence) == len(state)
