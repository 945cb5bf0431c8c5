"""LU-KV for GGUF models: per-head KV-cache budgets, found offline, kept by a patched llama.cpp."""

__version__ = "0.1.0"
