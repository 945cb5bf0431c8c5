"""A plain torch model read from a GGUF file: what the offline side looks into."""

from lukv_gguf.reference.config import ModelConfig
from lukv_gguf.reference.model import DecodeObserver, KVCache, ReferenceModel
from lukv_gguf.reference.tokenizer import Tokenizer

__all__ = ["DecodeObserver", "KVCache", "ModelConfig", "ReferenceModel", "Tokenizer"]
