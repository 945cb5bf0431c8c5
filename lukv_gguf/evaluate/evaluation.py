"""`lukv-gguf eval`: from a model and a grid to records, results and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lukv_gguf import __version__, defaults
from lukv_gguf.errors import LukvError
from lukv_gguf.evaluate import suites
from lukv_gguf.evaluate.methods import FULL, NAMES, REPEATING, Method, Tables, grid
from lukv_gguf.evaluate.results import Result, summarise
from lukv_gguf.evaluate.run import Plan, Progress, evaluate
from lukv_gguf.evaluate.session import Options
from lukv_gguf.evaluate.store import Record, Store
from lukv_gguf.gguf_header import read_header, replacing
from lukv_gguf.metadata import POLICIES
from lukv_gguf.reference.tokenizer import Tokenizer

PROFILE_NAME = "profile.npz"

Profiler = Callable[[Path, list[str]], None]
"""Writes a profile of the model for some metrics to a path."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes
    ----------
    suites, tasks
        Of `suites.NAMES`; only the named tasks of them, all by default.
    methods, metrics, ratios, policies, kv_types
        The grid. Metrics are by default those of the profile.
    lengths, n
        Tokens of everything together, and contexts of each task and length; by default the suite's.
    seed, query_aware
        See `run.Plan`.
    longbench
        Folder of LongBench's files.
    profile
        A profile file. By default the file's own table, and one that is made for what this does not tell.
    """

    suites: Sequence[str] = ("smoke",)
    tasks: Sequence[str] = ()
    methods: Sequence[str] = NAMES
    metrics: Sequence[str] = ()
    ratios: Sequence[float] = (defaults.RATIO,)
    policies: Sequence[str] = tuple(POLICIES)
    kv_types: Sequence[str] = ("f16",)
    lengths: Sequence[int] = ()
    n: int | None = None
    seed: int = 0
    query_aware: bool = False
    longbench: Path | None = None
    profile: Path | None = None
    options: Options = field(default_factory=Options)

    def check(self) -> None:
        """Raise LukvError for what makes no sense."""
        known = {
            "suite": (self.suites, suites.NAMES),
            "policy": (self.policies, POLICIES),
            "type of K and V": (self.kv_types, defaults.KV_TYPES),
        }
        for what, (given, names) in known.items():
            for name in given:
                if name not in names:
                    raise LukvError(f"unknown {what} {name!r}; known: {', '.join(names)}")
            if not given:
                raise LukvError(f"at least one {what} is needed")
        for method in self.methods:
            Method.parse(method)
        if any(method != FULL for method in self.methods) and not self.ratios:
            raise LukvError("at least one ratio is needed")
        for ratio in self.ratios:
            if not 0.0 < ratio <= 1.0:
                raise LukvError(f"a ratio must lie in (0, 1], not {ratio:g}")
        if any(length < 1 for length in self.lengths):
            raise LukvError("a length must be 1 token or more")


@dataclass(frozen=True)
class Evaluation:
    """What was found: results, and the answers that they come from."""

    model: str
    results: list[Result]
    records: list[Record]
    facts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"model": self.model, **self.facts, "results": self.results}


def run(model: Path, folder: Path, request: Request, profiler: Profiler, progress: Progress) -> Evaluation:
    """Evaluate a model, or go on with an evaluation that was interrupted.

    Parameters
    ----------
    model
        The GGUF file, with or without a table.
    folder
        Where ``answers.jsonl`` grows and a profile is kept; made when missing. What it holds already is not asked again.
    profiler
        Called where a profile is needed and there is none.

    Raises
    ------
    LukvError
        The request makes no sense, or something cannot be read, run or written.
    """
    request.check()
    header = read_header(model)
    with Store(folder / "answers.jsonl") as store, Tokenizer(model) as tokenizer:
        of_suite = {suite: suites.tasks(suite, request.longbench) for suite in request.suites}
        for name in request.tasks:
            if not any(name in known for known in of_suite.values()):
                raise LukvError(f"no task of these suites is called {name}; there are: {', '.join(sum(of_suite.values(), []))}")
        samples, texts = [], []
        for suite, known in of_suite.items():
            default = suites.DEFAULTS[suite]
            lengths, n = request.lengths or default.lengths, request.n or default.n
            chosen = [name for name in known if not request.tasks or name in request.tasks]
            samples += suites.samples(suite, chosen, tokenizer, lengths, n, request.seed, request.longbench)
            texts += suites.texts(suite, tokenizer, lengths, n, request.seed)
        samples = list({(sample.task, sample.length, sample.index): sample for sample in samples}.values())
        tables, metrics = _tables(model, folder, request, profiler)  # last: it may take long
        plan = Plan(
            cells=grid(request.methods, metrics, request.ratios, request.policies, request.kv_types),
            samples=samples,
            texts=texts,
            seed=request.seed,
            query_aware=request.query_aware,
            options=request.options,
        )
        records = evaluate(plan, model, tables, tokenizer, store, folder, progress)
    name = str(header.value("general.name") or model.stem)
    facts = {
        "file": model.name,
        "version": f"lukv-gguf {__version__}",
        "suites": ", ".join(request.suites),
        "seed": str(request.seed),
        "questions": "before the eviction" if request.query_aware else "after the context was cached",
        "ubatch": f"{request.options.n_ubatch} tokens",
        "threads": str(request.options.n_threads),
        "gpu_layers": str(request.options.n_gpu_layers),
        "profile": _describe(tables, metrics),
    }
    return Evaluation(name, summarise(records, name), records, facts)


def write_json(path: Path, evaluation: Evaluation) -> None:
    """Write the results as one JSON object; LukvError if that is not possible."""
    with replacing(path) as file:
        file.write(json.dumps(evaluation.to_dict(), indent=1).encode() + b"\n")


def _tables(model: Path, folder: Path, request: Request, profiler: Profiler) -> tuple[Tables, list[str]]:
    """The tables, and the metrics to run with; profiles the model where that is needed."""
    own = folder / PROFILE_NAME
    given = {text.partition(":")[0]: text for text in request.metrics}  # NAME:PARAM=VALUE; a profile has its own
    tables = Tables(model, request.profile or (own if own.exists() else None), given)
    metrics = list(given) or tables.metrics()
    methods = [method for method in request.methods if method != FULL]
    for metric in (name for name in metrics if name in REPEATING):
        if "prefill" not in request.policies:
            raise LukvError(f"the metric {metric} works with --policies prefill only")
        if request.query_aware:
            raise LukvError(f"the metric {metric} repeats a context without its questions: leave out --query-aware")
    missing = tables.missing(methods, metrics)
    if missing and request.profile is not None:
        raise LukvError(
            f"{request.profile}: holds nothing for the metric {', '.join(missing)}; profile it, or choose with --metrics"
        )
    if missing:
        wanted = dict.fromkeys([*metrics, *(tables.metrics() if tables.profile else [])])
        try:
            profiler(own, [given.get(name, name) for name in wanted])
        except ModuleNotFoundError as error:
            raise LukvError(
                f"profiling needs the Python package {error.name}; install it, or give a profile with --profile"
            ) from None
        tables = Tables(model, own, given)
    return tables, metrics


def _describe(tables: Tables, metrics: Sequence[str]) -> str:
    if tables.profile is None:
        return "the table in the file"
    facts = tables.provenance(metrics[0])
    return ", ".join(
        f"{name} {facts[name]}"
        for name in ("objective", "questions", "context_tokens", "calibration_sha256")
        if name in facts
    )
