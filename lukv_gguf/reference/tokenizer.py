"""The GGUF file's own tokenizer and chat template, through llama.cpp."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lukv_gguf.errors import LukvError

_CONTENT_MARK = "\N{OBJECT REPLACEMENT CHARACTER}lukv\N{OBJECT REPLACEMENT CHARACTER}"


class Tokenizer:
    """Tokenizes as llama.cpp does. Only the vocabulary is loaded, and no context is made.

    Parameters
    ----------
    path
        The GGUF file.

    Raises
    ------
    LukvError
        llama_cpp is not installed, or llama.cpp cannot read the vocabulary.
    """

    def __init__(self, path: str | Path) -> None:
        self._llama = import_llama_cpp()
        llama = self._llama
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.vocab_only = True
        self._model: Any = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LukvError(f"{path}: llama.cpp cannot read the vocabulary")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.end_tokens: frozenset[int] = frozenset(
            token for token in range(self.n_vocab) if llama.llama_vocab_is_eog(self._vocab, token)
        )
        template = llama.llama_model_chat_template(self._model, None)
        self.chat_template: str | None = template.decode() if template else None

    def close(self) -> None:
        """Free the vocabulary."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Tokens of a text, nothing added at either end."""
        data = text.encode()
        capacity = len(data) + 16
        while True:
            buffer = (self._llama.llama_token * capacity)()
            n_token = self._llama.llama_tokenize(
                self._vocab, data, len(data), buffer, capacity, False, parse_special
            )
            if n_token >= 0:
                return list(buffer[:n_token])
            capacity = -n_token

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; control tokens are left out."""
        array = (self._llama.llama_token * len(tokens))(*tokens)
        capacity = 16 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n_byte = self._llama.llama_detokenize(
                self._vocab, array, len(tokens), buffer, capacity, False, False
            )
            if n_byte >= 0:
                return buffer.raw[:n_byte].decode(errors="replace")
            capacity = -n_byte

    def begin_tokens(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence: with BOS where the model wants one."""
        tokens = self.encode(text)
        bos = self._llama.llama_vocab_bos(self._vocab)
        # Templates often write the BOS themselves.
        if self._llama.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def frame_user_message(self) -> tuple[str, str]:
        """What the chat template puts before and after the text of a first user message.

        Returns
        -------
        tuple of str
            The text up to the message, and the text from its end to where the answer begins. Both are
            empty for a model without a chat template.

        Raises
        ------
        LukvError
            The template cannot be rendered, or it does not pass the message on as it is.
        """
        if self.chat_template is None:
            return "", ""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            formatter = Jinja2ChatFormatter(
                template=self.chat_template,
                eos_token=self._token_text(self._llama.llama_vocab_eos(self._vocab)),
                bos_token=self._token_text(self._llama.llama_vocab_bos(self._vocab)),
            )
            prompt = formatter(messages=[{"role": "user", "content": _CONTENT_MARK}]).prompt
        except Exception as error:  # whatever the template's author wrote
            raise LukvError(f"the model's chat template cannot be rendered: {error}") from None
        before, mark, after = prompt.partition(_CONTENT_MARK)
        if not mark:
            raise LukvError("the model's chat template does not contain the user's message as it is")
        return before, after

    def _token_text(self, token: int) -> str:
        return self._llama.llama_vocab_get_text(self._vocab, token).decode() if token >= 0 else ""


def import_llama_cpp() -> ModuleType:
    """The binding, quiet; LukvError if it is missing."""
    try:
        import llama_cpp
    except ImportError:
        raise LukvError(
            "the Python package llama_cpp is missing; scripts/quickstart.sh builds and installs it"
        ) from None
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama_cpp
