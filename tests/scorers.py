"""Scorers with random weights."""

from __future__ import annotations

import numpy as np

from lukv_gguf.scorer import FEATURES, Scorer


def random_scorer(n_layer: int, n_head_kv: int, d_head: int, window: int = 32, n_hidden: int = 6) -> Scorer:
    """Weights that let the vectors and each feature matter."""
    random, heads = np.random.default_rng(7), (n_layer, n_head_kv)
    n_input = len(FEATURES) + 2 * d_head
    return Scorer(
        random.standard_normal((*heads, n_hidden, n_input)) / np.sqrt(n_input),
        random.standard_normal((*heads, n_hidden)),
        random.standard_normal((*heads, n_hidden)),
        random.standard_normal((*heads, len(FEATURES))) / 4,
        d_key=d_head,
        params={"window": window, "kernel": 5},
        provenance={"texts": "none"},
    )
