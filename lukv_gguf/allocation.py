"""Splitting a total budget over heads: convex relaxation, greedy choice, floor and blend.

Symbols, after Tang et al., "Predicting Future Utility" (arXiv 2602.08585): a head keeps the first b
positions of its ranking and loses L(b); d(i) = L(i - 1) - L(i) is the marginal gain of its i-th
position; d̆ is d projected onto non-increasing sequences, and L̆ the convex loss that belongs to it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, isotonic_regression

from lukv_gguf.errors import LukvError

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def marginal_gains(importance: FloatArray, ranking: IntArray) -> FloatArray:
    """Importance in the order of a ranking: d(i) = I_{rank i}.

    Parameters
    ----------
    importance : array [..., T]
        Importance of each position.
    ranking : int array, broadcastable to [..., T]
        Positions, best first.

    Returns
    -------
    array [..., T]
    """
    return np.take_along_axis(importance, np.broadcast_to(ranking, importance.shape), axis=-1)


def concave_envelope(marginal: FloatArray) -> FloatArray:
    """Project marginal gains onto non-increasing sequences (pool adjacent violators).

    Parameters
    ----------
    marginal : array [..., T]
        Marginal gains d(i) in rank order.

    Returns
    -------
    array [..., T]
        d̆(i): non-increasing along the last axis, with the same sum.

    References
    ----------
    Tang et al., arXiv 2602.08585, convex relaxation of the global allocation. The projection is the
    least-squares one of `scipy.optimize.isotonic_regression`, so Σ_{i <= b} d̆(i) is the smallest
    concave majorant of the gains kept, Σ_{i <= b} d(i).
    """
    marginal = np.asarray(marginal)
    flat = np.ascontiguousarray(marginal, dtype=np.float64).reshape(-1, marginal.shape[-1])
    relaxed = np.empty_like(flat, dtype=np.float64)
    for row, out in zip(flat, relaxed):
        out[:] = isotonic_regression(row, increasing=False).x
    return relaxed.reshape(marginal.shape)


def greedy_counts(relaxed_gains: FloatArray, totals: npt.ArrayLike) -> IntArray:
    """Give each total to the heads whose next position gains most.

    On non-increasing gains the greedy choice is optimal, and it equals taking the B largest gains of
    all heads together. One sort therefore serves all totals, and every head's share is a prefix of
    its ranking. Equal gains are taken by rank first, then by head: heads that gain alike share alike.

    Parameters
    ----------
    relaxed_gains : array [heads, T]
        d̆, non-increasing along the last axis.
    totals : int array [n]
        Positions to keep in all heads together, each in 0 ... heads * T.

    Returns
    -------
    int array [n, heads]
        Positions that each head keeps; row n sums to ``totals[n]``.

    Raises
    ------
    LukvError
        A total is out of range.

    References
    ----------
    Tang et al., arXiv 2602.08585, greedy allocation on the relaxed problem.
    """
    totals = np.atleast_1d(np.asarray(totals, dtype=np.int64))
    n_head, n_position = relaxed_gains.shape
    if totals.size and (totals.min() < 0 or totals.max() > n_head * n_position):
        raise LukvError(f"a total budget must lie between 0 and {n_head * n_position} cells")
    taken_head = _heads_by_gain(relaxed_gains)
    # Between two neighbouring totals, count what each head takes; their running sums are the counts.
    order = np.argsort(totals, kind="stable")
    edges = np.concatenate(([0], totals[order]))
    counts = np.zeros((totals.size, n_head), dtype=np.int64)
    for i in range(totals.size):
        counts[i] = np.bincount(taken_head[edges[i] : edges[i + 1]], minlength=n_head)
    result = np.empty_like(counts)
    result[order] = np.cumsum(counts, axis=0)
    return result


def uniform(ratio: npt.ArrayLike, n_layer: int, n_head_kv: int) -> FloatArray:
    """The same kept fraction for every head.

    Parameters
    ----------
    ratio : float or array [n]
        Kept fraction of the whole cache, in [0, 1].

    Returns
    -------
    array [L, H] or [n, L, H]
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    _check_fractions("ratio", ratio)
    return np.broadcast_to(ratio[..., None, None], (*ratio.shape, n_layer, n_head_kv)).copy()


def pyramid_kv(ratio: npt.ArrayLike, n_layer: int, n_head_kv: int, beta: float = 20.0) -> FloatArray:
    """Kept fractions that fall from the first layer to the last in equal steps, alike for all heads of a layer.

    The last layer keeps ``ratio / beta``, the first one as much above the mean as that is below it. Where the first
    would keep more than everything, it keeps everything, and the last one what the mean leaves.

    Parameters
    ----------
    ratio : float or array [n]
        Kept fraction of the whole cache, in [0, 1]: the mean of the result.
    beta : float
        At least 1; 1 is uniform.

    Returns
    -------
    array [L, H] or [n, L, H]

    References
    ----------
    Cai et al., "PyramidKV", arXiv 2406.02069; beta and the order of steps as in kvpress.
    """
    if not beta >= 1.0:
        raise LukvError(f"beta must be at least 1, is {beta:g}")
    mean = uniform(ratio, n_layer, n_head_kv)
    first = np.minimum(2.0 * mean - mean / beta, 1.0)
    step = np.linspace(1.0, -1.0, n_layer)[:, None] if n_layer > 1 else np.zeros((1, 1))
    return np.clip(mean + (first - mean) * step, 0.0, 1.0)


def ada_kv(scores: FloatArray, ratios: npt.ArrayLike, safeguard: float = 0.2) -> FloatArray:
    """Every layer keeps the same, split over its heads by where its best scores are.

    Each head keeps its best ``safeguard * ratio * T`` positions in any case; what a layer has left goes to the largest
    of its scores, whatever head they are in.

    Parameters
    ----------
    scores : array [L, H, T]
        A metric's scores, non-increasing along the last axis.
    ratios : array [n]
        Kept fractions of the whole cache, in [0, 1].
    safeguard : float
        In [0, 1]; 1 is uniform.

    Returns
    -------
    array [n, L, H]
        The mean of every layer is its ratio, to within rounding of one cell.

    References
    ----------
    Feng et al., "Ada-KV", arXiv 2407.11550. Static here: the scores are those of one text.
    """
    ratios = np.atleast_1d(np.asarray(ratios, dtype=np.float64))
    _check_fractions("ratio", ratios)
    _check_fractions("safeguard", np.asarray(safeguard))
    n_layer, n_head, n_position = scores.shape
    totals = np.rint(ratios * n_head * n_position).astype(np.int64)
    floors = np.minimum((safeguard * ratios * n_position).astype(np.int64), totals // n_head)
    counts = np.empty((len(ratios), n_layer, n_head))
    for layer, of_layer in enumerate(scores):
        # by_score[m]: what each head has among the m best of the layer. Kept in all is then Σ max(by_score[m], floor),
        # which grows with m by at most one: it meets every total.
        taken = _heads_by_gain(of_layer)[:, None] == np.arange(n_head)
        by_score = np.concatenate((np.zeros((1, n_head), np.int32), np.cumsum(taken, axis=0, dtype=np.int32)))
        for i, (floor, total) in enumerate(zip(floors, totals)):
            kept = np.maximum(by_score, floor).sum(axis=1)
            counts[i, layer] = np.maximum(by_score[np.searchsorted(kept, total)], floor)
    return counts / n_position


def apply_floor_and_blend(
    budget: FloatArray, ratio: npt.ArrayLike, floor: float = 0.0, blend: float = 0.0
) -> FloatArray:
    """Move a budget towards the uniform one and lift its smallest heads, at an unchanged mean.

    First ``(1 - blend) * budget + blend * ratio``; then each head gets at least ``floor * ratio``, paid for by
    all heads in proportion to what they hold above that.

    Parameters
    ----------
    budget : array [..., L, H]
        Kept fraction per head, in [0, 1].
    ratio : float or array [...]
        Kept fraction of the whole cache that each budget was solved for: the mean of the result.
    floor : float
        Least budget of a head as a share of the ratio, in [0, 1]; 1 is uniform.
    blend : float
        Share of the uniform budget, in [0, 1].

    Returns
    -------
    array [..., L, H]
        In [0, 1]; its mean over heads is ``ratio``.

    Raises
    ------
    LukvError
        A value is not in [0, 1].
    """
    budget = np.asarray(budget, dtype=np.float64)
    ratio = np.asarray(ratio, dtype=np.float64)
    for name, values in (("budget", budget), ("ratio", ratio), ("floor", floor), ("blend", blend)):
        _check_fractions(name, np.asarray(values))
    target = ratio[..., None, None]
    lowest = floor * target
    lifted = np.maximum((1.0 - blend) * budget + blend * target, lowest)
    mean = lifted.mean(axis=(-2, -1), keepdims=True)
    # Too much: shrink what lies above the floor. Too little (rounding in the input): fill the room
    # below 1 in proportion. Either way one linear step hits the mean and no bound is crossed.
    shrink = np.divide(target - lowest, mean - lowest, out=np.ones_like(mean), where=mean > target)
    fill = np.divide(target - mean, 1.0 - mean, out=np.zeros_like(mean), where=mean < target)
    result = lowest + shrink * (lifted - lowest)
    result += fill * (1.0 - result)
    return np.clip(result, 0.0, 1.0)


def scale_factor(fractions: FloatArray, ratio: float) -> float:
    """The factor c with which the mean of min(c * fractions, 1) is the ratio, in (0, 1); all fractions are positive."""
    return brentq(lambda c: np.minimum(c * fractions, 1.0).mean() - ratio, 0.0, 1.0 / fractions.min())


def _heads_by_gain(gains: FloatArray) -> IntArray:
    """The head of each of the gains [heads, T], largest first; equal ones by rank, then by head: [heads * T]."""
    by_rank_then_head = np.ascontiguousarray(gains.T).reshape(-1)
    return np.argsort(-by_rank_then_head, kind="stable") % len(gains)


def _check_fractions(name: str, values: FloatArray) -> None:
    if not np.all((values >= 0.0) & (values <= 1.0)):
        raise LukvError(f"{name} must lie between 0 and 1")
