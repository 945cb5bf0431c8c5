"""Does one profile serve all tasks? Rank correlations between budgets from different queries or texts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from lukv_gguf.errors import LukvError

FloatArray = npt.NDArray[np.floating]


def rank_correlation(first: FloatArray, second: FloatArray) -> FloatArray:
    """Spearman's rank correlation between two budgets over all heads, ratio by ratio.

    Parameters
    ----------
    first, second : array [n, L, H]

    Returns
    -------
    array [n]
        In [-1, 1]; 0 where a budget is the same for every head.

    Raises
    ------
    LukvError
        The shapes differ.
    """
    if first.shape != second.shape:
        raise LukvError(f"budgets of shapes {list(first.shape)} and {list(second.shape)} cannot be compared")
    a, b = (rankdata(table.reshape(len(table), -1), axis=1) for table in (first, second))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)


def split_half_correlation(query_budget: FloatArray, n_split: int = 20, seed: int = 0) -> FloatArray:
    """Rank correlation between the budgets of disjoint random halves of the queries.

    Parameters
    ----------
    query_budget : array [Q, n, L, H]
        Budgets of each query; with an odd Q one is left out of each split.
    n_split
        Splits to draw.

    Returns
    -------
    array [n_split, n]

    Raises
    ------
    LukvError
        Fewer than two queries.
    """
    n_half = len(query_budget) // 2
    if not n_half:
        raise LukvError("halves of the queries need at least two of them")
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(query_budget)) for _ in range(n_split)]
    return np.stack(
        [
            rank_correlation(
                query_budget[order[:n_half]].mean(axis=0), query_budget[order[n_half : 2 * n_half]].mean(axis=0)
            )
            for order in orders
        ]
    )
