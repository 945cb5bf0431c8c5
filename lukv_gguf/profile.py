"""The offline protocol: from a model, a context and questions to the budgets Φ of all ratios."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lukv_gguf import defaults, metrics, oracle
from lukv_gguf.allocation import concave_envelope, greedy_counts, marginal_gains
from lukv_gguf.answers import decode_answers
from lukv_gguf.checkpoint import Checkpoint, model_identity
from lukv_gguf.collect import Collector, reconstruct
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import read_header
from lukv_gguf.metrics import LayerState, Metric, Needs
from lukv_gguf.profile_file import GAP_RATIO, Profile
from lukv_gguf.reference import KVCache, ReferenceModel, Tokenizer
from lukv_gguf.refine import N_PART, refine_budgets, shift_odds
from lukv_gguf.replay import Replay, make_replays, request_length
from lukv_gguf.scorer import Scorer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, steps done, and steps in all."""

ENGINES = ("auto", "llama", "torch")
_TORCH_WEIGHTS = 10**9  # more, and the reference model no longer answers with all its weights in memory


@dataclass(frozen=True)
class Protocol:
    """How a model is profiled.

    Attributes
    ----------
    sink, recent : int
        Tokens at the start and at the end of the context that are always ranked first.
    n_context : int
        Most tokens of the context, template included; the paper uses about 4,000.
    n_query : int, optional
        M, how many of the questions are asked; all by default, 30 in the paper.
    max_new_tokens : int
        K_max, the most decoding steps of an answer.
    n_ratio : int
        Ratios of the grid: 1 / (n + 1) ... n / (n + 1).
    objective, group
        See `oracle.decode_oracle`.
    engine : str
        Who answers. ``llama``: the deployed model in llama.cpp, and the reference model, one layer in memory at a time,
        is then taken over the answers. ``torch``: the reference model, with all its weights in memory. ``auto``:
        ``torch`` for a model of at most 10⁹ weights, where it is the faster one, or that fits a CUDA device, else ``llama``.
    refine : int, optional
        Steps of `refine.refine_budgets`, which needs the engine ``torch``; 0 for none. By default `defaults.REFINE_STEPS`
        (`defaults.REFINE_STEPS_GPU`) with that engine, and none with the other.
    refine_ratio : float
        The kept fraction at which the budgets are refined; others follow by `refine.shift_odds`.

    Raises
    ------
    LukvError
        A value that makes no sense.
    """

    sink: int = defaults.SINK
    recent: int = defaults.RECENT
    n_context: int = defaults.N_CONTEXT
    n_query: int | None = None
    max_new_tokens: int = defaults.K_MAX
    n_ratio: int = defaults.N_RATIO
    objective: oracle.Objective = "relative"
    group: oracle.Group = "mean"
    engine: str = "auto"
    refine: int | None = None
    refine_ratio: float = defaults.RATIO

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 0:
            raise LukvError("sink and recent must be 0 or more")
        if min(self.n_context, self.max_new_tokens, self.n_ratio, self.n_query or 1) < 1:
            raise LukvError("n_context, n_query, max_new_tokens and n_ratio must be 1 or more")
        if self.refine is not None and self.refine < 0:
            raise LukvError("refine must be 0 or more")
        if not 0.0 < self.refine_ratio <= 1.0:
            raise LukvError(f"refine_ratio must be in (0, 1], is {self.refine_ratio:g}")
        if self.engine not in ENGINES:
            raise LukvError(f"unknown engine {self.engine!r}; known: {', '.join(ENGINES)}")
        oracle.check_choices(self.objective, self.group)

    @property
    def ratios(self) -> FloatArray:
        """Kept fractions of the grid, ascending."""
        return np.arange(1, self.n_ratio + 1) / (self.n_ratio + 1)


def profile_model(
    path: str | Path,
    *,
    context: str,
    questions: Sequence[str],
    metric: str = "keydiff",
    metric_params: Mapping[str, float] | None = None,
    scorer: Scorer | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    start_over: bool = False,
    **protocol: Any,
) -> Profile:
    """Profile a model for one metric; parameters as of `profile_metrics` and `Protocol`."""
    chosen = metrics.get(metric, scorer, **(metric_params or {}))
    profiles = profile_metrics(
        path,
        [chosen],
        context=context,
        questions=questions,
        protocol=Protocol(**protocol),
        dtype=dtype,
        device=device,
        progress=progress,
        checkpoint=checkpoint,
        start_over=start_over,
    )
    return profiles[chosen.name]


def profile_metrics(
    path: str | Path,
    chosen_metrics: Sequence[Metric],
    *,
    context: str,
    questions: Sequence[str],
    protocol: Protocol | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    start_over: bool = False,
) -> dict[str, Profile]:
    """Profile a model: which head needs how much of its cache, for several metrics from one pass.

    The model reads the context once. Then it answers each question about it with full attention, all in
    one batch, as the user's message in its chat template. For each question the allocation is solved at
    every ratio of the grid, and the kept fractions are averaged over the questions.

    Parameters
    ----------
    path
        The GGUF file.
    chosen_metrics
        Those that will rank at run time, one profile each.
    context
        A long text; what exceeds the protocol's length is cut off.
    questions
        Questions about different parts of it, one query each.
    protocol
        By default `Protocol()`.
    dtype
        Type of the weights, by default the smaller one that the device computes with. The error of bfloat16 is below
        that of llama.cpp's own quantised activations.
    device
        Where the reference model computes: ``cpu``, ``cuda``, ``mps``.
    progress
        Called as the work goes on.
    checkpoint
        A folder that keeps what is done, so that the same call after an interruption goes on from there. Remove it with
        `checkpoint.discard_folder` once the result is stored. Not used by the engine ``torch``.
    start_over
        Drop a checkpoint of another call instead of raising.

    Returns
    -------
    dict of Profile
        By the metric's name.

    Raises
    ------
    LukvError
        The model cannot be read or is not supported, or an argument makes no sense.

    References
    ----------
    Tang et al., "Predicting Future Utility", arXiv 2602.08585: offline profiling.
    """
    protocol = protocol or Protocol()
    tell = progress if progress is not None else _silent
    questions = list(questions[: protocol.n_query])
    if not questions:
        raise LukvError("profiling needs at least one question")
    if not chosen_metrics or len({metric.name for metric in chosen_metrics}) < len(chosen_metrics):
        raise LukvError("profiling needs at least one metric, and each of them once")
    place = find_device(device)
    dtype = dtype or default_dtype(place)

    tell("load", 0, 1)
    engine = _choose_engine(path, protocol.engine, place, dtype)
    n_refine = protocol.refine or 0
    if protocol.refine is None and engine == "torch":
        n_refine = defaults.REFINE_STEPS if place.type == "cpu" else defaults.REFINE_STEPS_GPU
    if protocol.refine_ratio == 1.0:
        n_refine = 0  # nothing is evicted
    if n_refine and engine != "torch":
        raise LukvError("refining the budgets needs all weights in memory: --engine torch, or --refine 0")
    model = ReferenceModel.load(path, dtype=dtype, device=place, stream=engine == "llama")
    with Tokenizer(path) as tokenizer:
        n_repeated = request_length(tokenizer) + N_PART if n_refine else 0
        if n_repeated > model.config.n_context_train // 4:
            if protocol.refine:
                raise LukvError(f"a context length of {model.config.n_context_train} is too short to refine budgets: --refine 0")
            n_refine = n_repeated = 0
        prefix, suffixes = _tokenize(tokenizer, model, context, questions, protocol, n_repeated)
        end_tokens = tokenizer.end_tokens
        chunk = max(metric.needs.chunk for metric in chosen_metrics)
        replays = make_replays(tokenizer, prefix, chunk, model.config.n_context_train) if chunk else []
        parts = make_replays(tokenizer, prefix, N_PART) if n_refine else []
        parts = parts[:-1] if len(parts) > 1 and parts[-1].end - parts[-1].start < N_PART // 2 else parts
    n_token = len(prefix)
    for metric in chosen_metrics:
        metric.check_model(model.config.n_layer, model.config.n_head_kv, model.config.d_key, model.config.d_value)
    if n_token <= protocol.sink + protocol.recent:
        raise LukvError(
            f"a context of {n_token} tokens is too short for {protocol.sink} + {protocol.recent} protected tokens"
        )
    tell("load", 1, 1)

    run = _Run(path, model, prefix, suffixes, end_tokens, replays, chosen_metrics, protocol, dtype, tell)
    saved = None
    if engine == "torch":
        seen = _measure_in_memory(run)
    else:
        saved = Checkpoint(checkpoint, run.key(), start_over) if checkpoint is not None else None
        seen = _measure_by_layer(run, saved)

    provenance = {
        "profiled_model": str(read_header(path).value("general.name") or Path(path).stem),
        "architecture": model.config.family.architecture,
        "objective": protocol.objective,
        "group": protocol.group,
        "engine": engine,
        "weights": str(dtype).removeprefix("torch."),
        "context_tokens": str(n_token),
        "calibration_sha256": hashlib.sha256("\0".join((context, *questions)).encode()).hexdigest()[:16],
        "questions": str(len(questions)),
        "max_new_tokens": str(protocol.max_new_tokens),
        "decoded_tokens": str(sum(map(len, seen.answers))),
    }
    budgeted = ~np.array(model.config.windowed)
    if not n_refine:
        seen.cache = None
    at = int(np.abs(protocol.ratios - protocol.refine_ratio).argmin())
    if n_refine:
        provenance |= {"refine_steps": str(n_refine), "refine_ratio": f"{protocol.ratios[at]:g}"}
    profiles = {}
    for i, metric in enumerate(chosen_metrics):
        ranking, scores = rank(seen.scores[metric.name], protocol.sink, protocol.recent)
        solution = solve_budgets(
            seen.importance,
            ranking,
            protocol.ratios,
            lambda done, n, i=i: tell("solve", i * n + done, len(chosen_metrics) * n),
            budgeted,
        )
        budget = solution.query_budget.mean(axis=0)
        if n_refine:
            refined = refine_budgets(
                model,
                seen.cache,
                parts,
                ranking,
                protocol.sink + protocol.recent,
                budget[at],
                n_refine,
                budgeted=budgeted,
                progress=lambda done, n, i=i: tell("refine", i * n + done, len(chosen_metrics) * n),
            )
            budget[:, budgeted] = shift_odds(budget[:, budgeted], protocol.ratios, at, refined[budgeted])
        profiles[metric.name] = Profile(
            metric=metric.name,
            metric_params=dict(metric.params),
            sink=protocol.sink,
            recent=protocol.recent,
            ratios=protocol.ratios,
            budget=budget,
            gap=solution.gap,
            provenance={**provenance, "scorer": metric.weights_digest} if metric.trained else provenance,
            budgeted=budgeted,
            marginal=solution.marginal,
            scores=scores.astype(np.float32),
            query_budget=solution.query_budget.astype(np.float32),
        )
    return profiles


def find_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises
    ------
    LukvError
        There is none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise LukvError(f"device {name!r} is not available to torch here") from None
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """The type of weights that a device computes fastest with: bfloat16 where it has instructions for it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():  # torch has no public one
        return torch.bfloat16
    return torch.float32


@dataclass
class _Run:
    """What a measurement needs to know."""

    path: str | Path
    model: ReferenceModel
    prefix: list[int]
    suffixes: list[list[int]]
    end_tokens: frozenset[int]
    replays: list[Replay]
    metrics: Sequence[Metric]
    protocol: Protocol
    dtype: torch.dtype
    tell: Progress

    def key(self) -> str:
        """A hash of all that a layer's measurement depends on."""
        description = [
            *model_identity(self.path),
            self.prefix,
            self.suffixes,
            sorted((metric.name, sorted(metric.params.items()), metric.weights_digest) for metric in self.metrics),
            {name: asdict(self.protocol)[name] for name in ("max_new_tokens", "objective", "group")},
            [self.protocol.sink, self.protocol.recent],
            [replay.tokens for replay in self.replays],
            str(self.dtype),
        ]
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()

    @property
    def collector(self) -> Collector:
        """Takes what the metrics need."""
        needs = Needs.union(metric.needs for metric in self.metrics)
        return Collector(needs, self.protocol.sink, self.protocol.recent)

    def scores(self, state: LayerState) -> dict[str, npt.NDArray[np.float32]]:
        """Each metric's scores of a layer, [H, T]."""
        return {metric.name: score_layer(metric, state).float().cpu().numpy() for metric in self.metrics}


def score_layer(metric: Metric, state: LayerState) -> torch.Tensor:
    """The scores of a metric, which sees as many queries as it asks for."""
    if state.queries is not None:
        state = replace(state, queries=state.queries[:, max(0, state.queries.shape[1] - metric.needs.window) :])
    return metric.score(state)


_IMPORTANCE = "importance"  # beside the names of metrics


@dataclass
class _Seen:
    """Importance [Q, L, H, T], each metric's scores [L, H, T], the answers, and the cache where it was kept."""

    importance: npt.NDArray[np.float32]
    scores: dict[str, npt.NDArray[np.float32]]
    answers: list[list[int]]
    cache: KVCache | None = None


def _measure_in_memory(run: _Run) -> _Seen:
    collector, states = run.collector, []
    cache = run.model.prefill(
        run.prefix,
        lambda done, total: run.tell("prefill", done, total),
        lambda *layer: states.append(collector(*layer)),
    )
    protocol = run.protocol
    seen = oracle.decode_oracle(
        run.model,
        cache,
        run.suffixes,
        protocol.max_new_tokens,
        objective=protocol.objective,
        group=protocol.group,
        end_tokens=run.end_tokens,
        progress=lambda done, total: run.tell("decode", done, total),
    )
    run.tell("decode", protocol.max_new_tokens, protocol.max_new_tokens)
    if run.replays:
        repeated = reconstruct(run.model, cache, run.replays, protocol.sink)
        states = [replace(state, reconstruction=found) for state, found in zip(states, repeated)]
    layers = [run.scores(state) for state in states]
    return _Seen(seen.importance, _stack_layers(layers), seen.answers, cache)


def _measure_by_layer(run: _Run, saved: Checkpoint | None) -> _Seen:
    protocol, config = run.protocol, run.model.config
    answers = saved.answers() if saved is not None else None
    if answers is None:
        answers = decode_answers(
            run.path,
            run.prefix,
            run.suffixes,
            protocol.max_new_tokens,
            end_tokens=run.end_tokens,
            n_ctx=config.rope.n_context_original + 1 if run.model.has_long_rope else 0,
            progress=lambda done, total: run.tell("answer", done, total),
        )
        if saved is not None:
            saved.save_answers(answers)
    layers, start = saved.layers() if saved is not None else ([], None)
    if start is not None:
        start = replace(start, prefix=start.prefix.to(run.model.device), queries=start.queries.to(run.model.device))
        run.tell("measure", start.layer, config.n_layer)
    passed = oracle.teacher_force(
        run.model,
        run.prefix,
        run.suffixes,
        answers,
        protocol.max_new_tokens,
        objective=protocol.objective,
        group=protocol.group,
        collector=run.collector,
        replays=run.replays,
        start=start,
    )
    for layer in passed:
        layers.append({_IMPORTANCE: layer.importance.cpu().numpy(), **run.scores(layer.state)})
        if saved is not None:
            saved.save_layer(layers[-1], layer.streams)
        run.tell("measure", layer.streams.layer, config.n_layer)
    importance = np.stack([layer.pop(_IMPORTANCE) for layer in layers], axis=1)
    return _Seen(importance, _stack_layers(layers), answers)


def _stack_layers(layers: Sequence[Mapping[str, npt.NDArray[np.float32]]]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def _choose_engine(path: str | Path, engine: str, device: torch.device, dtype: torch.dtype) -> str:
    if engine != "auto":
        return engine
    from lukv_gguf.reference.gguf_file import GGUFFile

    n_weight = GGUFFile(path).n_weight
    fits = device.type == "cuda" and 2 * dtype.itemsize * n_weight <= torch.cuda.mem_get_info(device)[0]
    return "torch" if n_weight <= _TORCH_WEIGHTS or fits else "llama"


def rank_positions(metric: Metric, cache: KVCache, sink: int, recent: int) -> IntArray:
    """Rank the cached positions of each head by a metric, protected tokens first.

    Returns
    -------
    int array [L, H, T]
        Positions, best first; equal scores in the order of the text.
    """
    scores = [
        metric.score(LayerState(keys, values, layer=i, sink=sink, recent=recent))
        for i, (keys, values) in enumerate(zip(cache.keys, cache.values))
    ]
    return rank(torch.stack(scores).float().cpu().numpy(), sink, recent)[0]


def rank(scores: npt.NDArray[np.floating], sink: int, recent: int) -> tuple[IntArray, FloatArray]:
    """Rank positions by their scores [..., T], protected tokens first.

    Returns
    -------
    ranking : int array [..., T]
        Positions, best first; equal scores in the order of the text.
    ranked : array [..., T]
        Their scores; infinite for protected tokens.
    """
    scores = np.array(scores)
    scores[..., :sink] = np.inf
    scores[..., scores.shape[-1] - recent :] = np.inf
    ranking = np.argsort(-scores, axis=-1, kind="stable")
    return ranking, np.take_along_axis(scores, ranking, axis=-1)


@dataclass(frozen=True)
class Solution:
    """Budgets of each query.

    Attributes
    ----------
    query_budget : array [Q, n, L, H]
        Kept fraction per head; its mean over heads is the ratio, to within rounding of one cell.
    gap : array [L, H]
        Optimality gap at `GAP_RATIO` as a share of the head's importance, mean over queries.
    marginal : float32 array [L, H, T]
        d(i) in rank order, mean over queries.
    """

    query_budget: FloatArray
    gap: FloatArray
    marginal: npt.NDArray[np.float32]


def solve_budgets(
    importance: npt.NDArray[np.floating],
    ranking: IntArray,
    ratios: FloatArray,
    progress: Callable[[int, int], None] | None = None,
    budgeted: npt.NDArray[np.bool_] | None = None,
) -> Solution:
    """Solve the allocation for each query at each ratio.

    Parameters
    ----------
    importance : array [Q, L, H, T]
    ranking : int array [L, H, T]
        Positions, best first.
    ratios : array [n]
        Kept fractions of the whole cache.
    budgeted : bool array [L], optional
        Layers that take part; the others keep the ratio.

    Raises
    ------
    LukvError
        No layer takes part.
    """
    n_query, n_layer, n_head_kv, n_position = importance.shape
    budgeted = np.ones(n_layer, dtype=bool) if budgeted is None else budgeted
    n_head = int(budgeted.sum()) * n_head_kv
    if not n_head:
        raise LukvError("every layer of this model has a sliding window: there is nothing to budget")
    totals = np.rint(ratios * n_head * n_position).astype(np.int64)
    query_budget = np.empty((n_query, len(ratios), n_layer, n_head_kv))
    query_budget[:] = ratios[:, None, None]
    gap = np.zeros((n_layer, n_head_kv))
    marginal = np.zeros((n_layer, n_head_kv, n_position), dtype=np.float32)
    for i, of_query in enumerate(importance):
        gains = marginal_gains(of_query, ranking)
        marginal += gains / n_query
        counts = greedy_counts(concave_envelope(gains[budgeted]).reshape(n_head, n_position), totals)
        query_budget[i][:, budgeted] = counts.reshape(len(ratios), -1, n_head_kv) / n_position
        total = of_query.sum(axis=-1, dtype=np.float64)
        missed = oracle.optimality_gap(of_query, ranking, round(GAP_RATIO * n_position))
        gap += np.divide(missed, total, out=np.zeros_like(total), where=total > 0)
        if progress is not None:
            progress(i + 1, n_query)
    return Solution(query_budget, gap / n_query, marginal)


def _tokenize(
    tokenizer: Tokenizer,
    model: ReferenceModel,
    context: str,
    questions: Sequence[str],
    protocol: Protocol,
    n_repeated: int = 0,
) -> tuple[list[int], list[list[int]]]:
    """The shared prefix, and each question with the rest of the template; `n_repeated` tokens fit behind the prefix, too."""
    before, after = tokenizer.frame_user_message()
    suffixes = [tokenizer.encode(f"\n\n{question}{after}") for question in questions]
    room = model.config.n_context_train - max(n_repeated, max(map(len, suffixes)) + protocol.max_new_tokens)
    if room < 1:
        raise LukvError("the questions do not fit the model's context length")
    return tokenizer.begin_tokens(before + context)[: min(protocol.n_context, room)], suffixes


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""
