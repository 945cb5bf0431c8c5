"""Scorers with random weights."""

from __future__ import annotations

import numpy as np
from tiny_gguf import TinyModel

from lukv_gguf.scorer import FEATURES, Scorer


def random_scorer(tiny: TinyModel, window: int = 16, kernel: int = 5, n_hidden: int = 6) -> Scorer:
    """Weights that let the vectors and each feature matter."""
    random, heads = np.random.default_rng(7), (tiny.n_layer, tiny.n_head_kv)
    n_input = len(FEATURES) + 2 * tiny.d_head
    return Scorer(
        random.standard_normal((*heads, n_hidden, n_input)) / np.sqrt(n_input),
        random.standard_normal((*heads, n_hidden)),
        random.standard_normal((*heads, n_hidden)),
        random.standard_normal((*heads, len(FEATURES))) / 4,
        d_key=tiny.d_head,
        params={"window": window, "kernel": kernel},
        provenance={"texts": "none"},
    )
