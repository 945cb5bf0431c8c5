"""The offline protocol: from a model, a context and questions to the budgets Φ of all ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lukv_gguf import metrics, oracle
from lukv_gguf.allocation import apply_floor_and_blend, concave_envelope, greedy_counts, marginal_gains
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Metric
from lukv_gguf.reference import KVCache, ReferenceModel, Tokenizer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, steps done, and steps in all."""

GRID_RATIOS = np.arange(1, 100) / 100.0
GAP_RATIO = 0.2  # the kept fraction at which a profile reports the optimality gap


@dataclass(frozen=True)
class Profile:
    """Budgets of a model for one metric.

    Attributes
    ----------
    metric, metric_params, sink, recent
        What the budgets were solved for; they hold for nothing else. `sink` and `recent` are the
        protected tokens at the start and at the end.
    ratios : array [n]
        Kept fractions of the whole cache, ascending.
    budget : array [n, L, H]
        Φ: kept fraction per head, as solved. The mean of ``budget[i]`` is ``ratios[i]``.
    gap : array [L, H]
        Optimality gap of the metric where every head keeps `GAP_RATIO`, as a share of the head's total
        importance; mean over queries.
    provenance
        How the profile came about.
    """

    metric: str
    metric_params: Mapping[str, float]
    sink: int
    recent: int
    ratios: FloatArray
    budget: FloatArray
    gap: FloatArray
    provenance: Mapping[str, str]

    def budgets(self, floor: float = 0.0, blend: float = 0.0) -> FloatArray:
        """Budgets to use: Φ blended with uniform, with a floor.

        Returns
        -------
        array [n, L, H]
            The mean of entry i is ``ratios[i]``.

        Raises
        ------
        LukvError
            `floor` or `blend` is not in [0, 1].
        """
        return apply_floor_and_blend(self.budget, self.ratios, floor, blend)

    def budget_at(self, ratio: float, floor: float = 0.0, blend: float = 0.0) -> FloatArray:
        """Budget for any ratio, linear between the grid's, empty at 0 and full at 1.

        Returns
        -------
        array [L, H]
            Its mean is `ratio`.

        Raises
        ------
        LukvError
            `ratio` is not in (0, 1], or `floor` or `blend` not in [0, 1].
        """
        if not 0.0 < ratio <= 1.0:
            raise LukvError(f"ratio must lie in (0, 1], not {ratio:g}")
        shape = (1, *self.budget.shape[1:])
        grid = np.concatenate(([0.0], self.ratios, [1.0]))
        table = np.concatenate((np.zeros(shape), self.budget, np.ones(shape)))
        right = int(np.clip(np.searchsorted(grid, ratio), 1, len(grid) - 1))
        weight = (ratio - grid[right - 1]) / (grid[right] - grid[right - 1])
        between = (1.0 - weight) * table[right - 1] + weight * table[right]
        return apply_floor_and_blend(np.clip(between, 0.0, 1.0), ratio, floor, blend)


def profile_model(
    path: str | Path,
    *,
    context: str,
    questions: list[str],
    metric: str = "keydiff",
    metric_params: Mapping[str, float] | None = None,
    sink: int = 4,
    recent: int = 16,
    n_context: int = 4000,
    max_new_tokens: int = 32,
    objective: oracle.Objective = "relative",
    group: oracle.Group = "mean",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Profile:
    """Profile a model: which head needs how much of its cache.

    The model reads the context once. Then it answers each question about it with full attention, all in
    one batch, as the user's message in its chat template. For each question the allocation is solved at
    every ratio of the grid, and the kept fractions are averaged over the questions.

    Parameters
    ----------
    path
        The GGUF file.
    context
        A long text; what exceeds `n_context` tokens is cut off.
    questions
        Questions about different parts of it, one query each.
    metric, metric_params
        The metric that will rank at run time.
    sink, recent
        Tokens at the start and at the end of the context that are always ranked first.
    n_context
        Most tokens of the context, template included.
    max_new_tokens
        K_max, the most decoding steps of an answer.
    objective, group
        See `oracle.decode_oracle`.
    dtype
        Type of the weights. bfloat16 halves memory, and its error is below that of llama.cpp's own
        quantised activations.
    progress
        Called as the work goes on.

    Returns
    -------
    Profile

    Raises
    ------
    LukvError
        The model cannot be read or is not supported, or an argument makes no sense.

    References
    ----------
    Tang et al., "Predicting Future Utility", arXiv 2602.08585: offline profiling.
    """
    tell = progress if progress is not None else _silent
    if not questions:
        raise LukvError("profiling needs at least one question")
    if sink < 0 or recent < 0 or n_context < 1 or max_new_tokens < 1:
        raise LukvError("sink and recent must be 0 or more, n_context and max_new_tokens 1 or more")
    oracle.check_choices(objective, group)
    chosen_metric = metrics.get(metric, **(metric_params or {}))

    tell("load", 0, 1)
    model = ReferenceModel.load(path, dtype=dtype)
    with Tokenizer(path) as tokenizer:
        prefix_tokens, suffixes = _tokenize(tokenizer, model, context, questions, n_context, max_new_tokens)
        end_tokens = tokenizer.end_tokens
    n_token = len(prefix_tokens)
    if n_token <= sink + recent:
        raise LukvError(f"a context of {n_token} tokens is too short for {sink} + {recent} protected tokens")
    tell("load", 1, 1)

    prefix = model.prefill(prefix_tokens, lambda done, total: tell("prefill", done, total))
    ranking = rank_positions(chosen_metric, prefix, sink, recent)
    seen = oracle.decode_oracle(
        model,
        prefix,
        suffixes,
        max_new_tokens,
        objective=objective,
        group=group,
        end_tokens=end_tokens,
        progress=lambda done, total: tell("decode", done, total),
    )
    tell("decode", max_new_tokens, max_new_tokens)
    budget, gap = solve_budgets(seen.importance, ranking, GRID_RATIOS, lambda i, n: tell("solve", i, n))
    return Profile(
        metric=chosen_metric.name,
        metric_params=dict(chosen_metric.params),
        sink=sink,
        recent=recent,
        ratios=GRID_RATIOS.copy(),
        budget=budget,
        gap=gap,
        provenance={
            "architecture": model.config.family.architecture,
            "objective": objective,
            "group": group,
            "context_tokens": str(n_token),
            "questions": str(len(questions)),
            "max_new_tokens": str(max_new_tokens),
            "decoded_tokens": str(sum(len(answer) for answer in seen.answers)),
        },
    )


def rank_positions(metric: Metric, cache: KVCache, sink: int, recent: int) -> IntArray:
    """Rank the cached positions of each head by a metric, protected tokens first.

    Returns
    -------
    int array [L, H, T]
        Positions, best first; equal scores in the order of the text.
    """
    rankings = []
    for keys, values in zip(cache.keys, cache.values):
        scores = metric.score(LayerState(keys=keys, values=values)).clone()
        scores[:, :sink] = torch.inf
        scores[:, cache.n_token - recent :] = torch.inf
        rankings.append(torch.argsort(scores, dim=-1, descending=True, stable=True))
    return torch.stack(rankings).cpu().numpy()


def solve_budgets(
    importance: npt.NDArray[np.floating],
    ranking: IntArray,
    ratios: FloatArray,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Solve the allocation for each query at each ratio, and average over queries.

    Parameters
    ----------
    importance : array [Q, L, H, T]
    ranking : int array [L, H, T]
        Positions, best first.
    ratios : array [n]
        Kept fractions of the whole cache.

    Returns
    -------
    budget : array [n, L, H]
        Kept fraction per head; its mean over heads is the ratio, to within rounding of one cell.
    gap : array [L, H]
        Optimality gap at `GAP_RATIO` as a share of the head's importance, mean over queries.
    """
    n_query, n_layer, n_head_kv, n_position = importance.shape
    n_head = n_layer * n_head_kv
    totals = np.rint(ratios * n_head * n_position).astype(np.int64)
    counts = np.zeros((len(ratios), n_head), dtype=np.int64)
    gap = np.zeros((n_layer, n_head_kv))
    for i, of_query in enumerate(importance):
        gains = marginal_gains(of_query, ranking).reshape(n_head, n_position)
        counts += greedy_counts(concave_envelope(gains), totals)
        total = of_query.sum(axis=-1, dtype=np.float64)
        missed = oracle.optimality_gap(of_query, ranking, round(GAP_RATIO * n_position))
        gap += np.divide(missed, total, out=np.zeros_like(total), where=total > 0)
        if progress is not None:
            progress(i + 1, n_query)
    budget = counts.reshape(len(ratios), n_layer, n_head_kv) / (n_query * n_position)
    return budget, gap / n_query


def _tokenize(
    tokenizer: Tokenizer,
    model: ReferenceModel,
    context: str,
    questions: list[str],
    n_context: int,
    max_new_tokens: int,
) -> tuple[list[int], list[list[int]]]:
    """The shared prefix, and each question with the rest of the template."""
    before, after = tokenizer.frame_user_message()
    suffixes = [tokenizer.encode(f"\n\n{question}{after}") for question in questions]
    room = model.config.n_context_train - max(map(len, suffixes)) - max_new_tokens
    if room < 1:
        raise LukvError("the questions do not fit the model's context length")
    return tokenizer.begin_tokens(before + context)[: min(n_context, room)], suffixes


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""
