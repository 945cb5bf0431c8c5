"""A plain torch model read from a GGUF file: what the offline side looks into."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lukv_gguf.reference.config import ModelConfig
    from lukv_gguf.reference.model import DecodeObserver, KVCache, ReferenceModel
    from lukv_gguf.reference.tokenizer import Tokenizer

__all__ = ["DecodeObserver", "KVCache", "ModelConfig", "ReferenceModel", "Tokenizer"]

_MODULES = {"ModelConfig": "config", "Tokenizer": "tokenizer"}  # the others are in model.py


def __getattr__(name: str) -> Any:  # on demand: who tokenizes does not need torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'model')}"), name)
