"""One model in llama.cpp, read into and asked with tokens: the evaluation's hands."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lukv_gguf import runtime
from lukv_gguf.errors import LukvError
from lukv_gguf.reference.tokenizer import import_llama_cpp
from lukv_gguf.replay import Replay

_BATCH = 512  # tokens of one call into llama.cpp: an interrupt waits no longer than for these


@dataclass(frozen=True)
class Options:
    """How contexts are made.

    Attributes
    ----------
    n_threads, n_gpu_layers, n_ubatch
        As llama.cpp's.
    """

    n_threads: int = 2
    n_gpu_layers: int = 0
    n_ubatch: int = 512


@dataclass(frozen=True)
class State:
    """A saved sequence: llama.cpp's bytes, and the position of the next token."""

    data: Any
    n_past: int

    @property
    def n_bytes(self) -> int:
        """Size in memory."""
        return len(self.data)


class Model:
    """A loaded model: weights, and the metadata overrides that it was loaded with.

    Parameters
    ----------
    path
        The GGUF file.
    overrides
        Metadata keys to bool, int, float or str, in place of the file's.

    Raises
    ------
    LukvError
        llama.cpp cannot load it: the file is unusable, or its LU-KV table is.
    """

    def __init__(
        self, path: str | Path, overrides: Mapping[str, Any] | None = None, options: Options | None = None
    ) -> None:
        self._llama = import_llama_cpp()
        self._options = options or Options()
        self._llama.llama_backend_init()
        self._overrides = _override_array(self._llama, overrides or {})
        params = self._llama.llama_model_default_params()
        params.kv_overrides = ctypes.cast(self._overrides, type(params.kv_overrides))
        params.n_gpu_layers = self._options.n_gpu_layers
        self.path = Path(path)
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LukvError(f"{path}: llama.cpp cannot load the model: llama-cli -m {path} says why")
        self.n_vocab: int = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))

    def session(self, n_ctx: int, kv_type: str = "f16", budgeted: bool | None = None) -> Session:
        """A new context with one sequence.

        Parameters
        ----------
        n_ctx
            Tokens.
        kv_type
            Type of K and V.
        budgeted
            Whether its cells have to be budgeted per head; None for either.

        Raises
        ------
        LukvError
            It cannot be made, or is not as `budgeted` says: the runtime does not support LU-KV for this model.
        """
        session = Session(self._llama, self._model, self.n_vocab, n_ctx, kv_type, self._options)
        if budgeted is not None and runtime.enabled(session.context) != budgeted:
            session.close()
            raise LukvError(f"{self.path}: LU-KV does not support this model: llama-cli -m {self.path} says why")
        return session

    def close(self) -> None:
        """Free the weights."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """A context with one sequence.

    Attributes
    ----------
    context
        llama.cpp's handle, for `lukv_gguf.runtime`.
    n_past : int
        Position of the next token.
    n_read, read_seconds, n_generated, generate_seconds
        Work since `work` was last called: tokens of prompts, tokens chosen, and what they took.
    """

    def __init__(self, llama: Any, model: Any, n_vocab: int, n_ctx: int, kv_type: str, options: Options) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, 1
        params.n_batch = max(_BATCH, options.n_ubatch)
        params.n_ubatch = options.n_ubatch
        params.n_threads = params.n_threads_batch = options.n_threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = getattr(llama, f"GGML_TYPE_{kv_type.upper()}")
        params.swa_full = True
        self._llama, self._n_vocab, self._n_batch = llama, n_vocab, params.n_batch
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise LukvError(
                f"llama.cpp cannot make a context of {n_ctx} tokens with {kv_type} K and V; is there enough memory?"
            )
        self._batch = llama.llama_batch_init(self._n_batch, 0, 1)
        for i in range(self._n_batch):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
        self.n_past = 0
        self.n_read = self.n_generated = 0
        self.read_seconds = self.generate_seconds = 0.0

    def read(
        self,
        tokens: Sequence[int],
        wanted: Collection[int] = (),
        on_logits: Callable[[int, npt.NDArray[np.float32]], None] | None = None,
    ) -> None:
        """Append tokens to the sequence.

        Parameters
        ----------
        tokens
            What to read; the logits behind the last one are kept.
        wanted, on_logits
            For each index in `wanted`, called with the index and the logits behind that token, [n_vocab], valid during
            the call only.

        Raises
        ------
        LukvError
            llama.cpp could not compute.
        """
        started = time.perf_counter()
        wanted = wanted if isinstance(wanted, (set, frozenset, range)) else frozenset(wanted)
        for first in range(0, len(tokens), self._n_batch):
            part = tokens[first : first + self._n_batch]
            is_last = first + len(part) == len(tokens)
            chosen = [i for i in range(len(part)) if first + i in wanted]
            self._batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self._batch.token[i], self._batch.pos[i], self._batch.logits[i] = token, self.n_past + i, False
            for i in (*chosen, *([len(part) - 1] if is_last else [])):
                self._batch.logits[i] = True
            if self._llama.llama_decode(self.context, self._batch):
                raise LukvError(
                    f"llama.cpp could not decode {len(part)} tokens behind {self.n_past}; is there enough memory?"
                )
            self.n_past += len(part)
            for i in chosen:
                on_logits(first + i, self._logits(i))
        self._llama.llama_synchronize(self.context)
        self.n_read += len(tokens)
        self.read_seconds += time.perf_counter() - started

    def repeat(self, replays: Sequence[Replay]) -> None:
        """Let the model repeat what it has read, which is what KVzip scores by."""
        for replay in replays:
            runtime.record_repetition(self.context, replay.tokens, replay.start, replay.end)

    def commit(self) -> None:
        """Bring every head down to its budget, where the cache is budgeted."""
        if runtime.enabled(self.context):
            runtime.commit(self.context)

    def generate(
        self,
        n_new: int,
        end_tokens: Collection[int] = (),
        is_done: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        """Continue greedily behind what was read last.

        Parameters
        ----------
        n_new
            Most tokens to choose.
        end_tokens
            Tokens that end the answer and do not belong to it.
        is_done
            Ends it early, asked after each token.

        Returns
        -------
        list of int
            The new tokens.
        """
        started = time.perf_counter()
        answer: list[int] = []
        while len(answer) < n_new:
            token = int(self._logits(-1).argmax())
            if token in end_tokens:
                break
            answer.append(token)
            if len(answer) == n_new or (is_done is not None and is_done(answer)):
                break
            n_read, read_seconds = self.n_read, self.read_seconds
            self.read([token])
            self.n_read, self.read_seconds = n_read, read_seconds  # counted below
        self.n_generated += len(answer)
        self.generate_seconds += time.perf_counter() - started
        return answer

    def save(self) -> State:
        """The sequence as it is now."""
        size = self._llama.llama_state_seq_get_size(self.context, 0)
        data = (ctypes.c_uint8 * size)()
        if self._llama.llama_state_seq_get_data(self.context, data, size, 0) != size:
            raise LukvError("llama.cpp could not save the state of the sequence")
        return State(data, self.n_past)

    def load(self, state: State) -> bool:
        """Take the sequence back to a saved state, also another context's; False if this context cannot hold it."""
        if not self._llama.llama_state_seq_set_data(self.context, state.data, len(state.data), 0):
            return False
        self.n_past = state.n_past
        return True

    def work(self) -> dict[str, float]:
        """What was read and generated since this was last called, what that took, and what the cache holds."""
        found = {
            "kv_bytes": runtime.memory_size(self.context),
            "n_read": self.n_read,
            "read_seconds": round(self.read_seconds, 4),
            "n_generated": self.n_generated,
            "generate_seconds": round(self.generate_seconds, 4),
        }
        self.n_read = self.n_generated = 0
        self.read_seconds = self.generate_seconds = 0.0
        return found

    def close(self) -> None:
        """Free the context."""
        if self.context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self.context)
            self.context = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _logits(self, index: int) -> npt.NDArray[np.float32]:
        return np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self.context, index), (self._n_vocab,))


def _override_array(llama: Any, overrides: Mapping[str, Any]) -> Any:
    array = (llama.llama_model_kv_override * (len(overrides) + 1))()  # one with an empty key ends the list
    for entry, (key, value) in zip(array, overrides.items()):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, str(value).encode()
    return array
