"""From answers to scores: means, bootstrap intervals, and differences to other methods on the same questions."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lukv_gguf.evaluate import longbench, ruler
from lukv_gguf.evaluate.lm import perplexity
from lukv_gguf.evaluate.methods import FULL
from lukv_gguf.evaluate.store import Record

N_BOOTSTRAP = 2000
LEVEL = 0.95
LOWER_IS_BETTER = ("lm_perplexity", "lm_kl")
_GROUP = ("length", "seed", "query_aware", "method", "metric", "ratio", "policy", "kv_type")
_FloatArray = npt.NDArray[np.float64]

Result = dict[str, Any]


def summarise(records: Iterable[Record], model: str) -> list[Result]:
    """One result for each task and cell, and the mean over the tasks of a suite.

    Contexts are drawn again with replacement, with all of their questions (2,000 times, 95 %): questions about one
    context are not independent. The same draws serve all methods, so that their differences are paired.

    Returns
    -------
    list of dict
        ``task``, ``method``, ``metric``, ``ratio``, ``policy``, ``kv_type``, ``length``, ``score``, ``n`` (questions),
        ``contexts``, ``interval``, ``vs_full`` and ``vs_uniform`` (difference and interval), and what it took:
        ``kv_bytes``, ``read_tps``, ``generate_tps``.
    """
    by_cell: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_cell[tuple(record[name] for name in _GROUP)][record["task"]].append(record)
    drawn = {
        cell: {task: _Drawn(task, of_task) for task, of_task in by_task.items()} for cell, by_task in by_cell.items()
    }
    results = []
    for cell, by_task in drawn.items():
        fields = dict(zip(_GROUP, cell))
        rivals = {
            "vs_full": {**fields, "method": FULL, "metric": "", "ratio": 1.0, "policy": ""},
            "vs_uniform": {**fields, "method": "uniform"},
        }
        found = {name: drawn.get(tuple(rival[key] for key in _GROUP), {}) for name, rival in rivals.items()}
        averages = {
            f"{suite}_average": [task for task in by_task if task in tasks] for suite, tasks in _suites().items()
        }
        parts = {
            **{task: [task] for task in by_task},
            **{name: tasks for name, tasks in averages.items() if len(tasks) > 1},
        }
        for name, tasks in parts.items():
            ours = _mean([by_task[task] for task in tasks])
            result: Result = {"task": name, "model": model, **fields, **ours.fields()}
            for rival, their_tasks in found.items():
                if (
                    fields["method"] != FULL
                    and fields["method"] != rival.removeprefix("vs_")
                    and set(tasks) <= set(their_tasks)
                ):
                    result[rival] = ours.difference(_mean([their_tasks[task] for task in tasks]))
            result.update(_work([record for task in tasks for record in by_cell[cell][task]]))
            curve = _mean_curve(by_cell[cell][name]) if name in by_task else None
            if curve is not None:
                result["by_position"] = curve
            results.append(result)
    return results


def cells(results: Iterable[Result]) -> list[tuple[str, str, float, str, str]]:
    """Method, metric, ratio, policy and type of K and V of the results, each once, in their order."""
    names = ("method", "metric", "ratio", "policy", "kv_type")
    return list(dict.fromkeys(tuple(result[name] for name in names) for result in results))


class _Drawn:
    """The score of a task under one cell, and its bootstrap distribution."""

    def __init__(self, task: str, records: Sequence[Record]) -> None:
        by_context: dict[int, list[float]] = defaultdict(list)
        for record in records:
            by_context[record["context"]].append(record["score"])
        contexts = sorted(by_context)
        sums = np.array([sum(by_context[i]) for i in contexts])
        counts = np.array([len(by_context[i]) for i in contexts])
        seed = zlib.crc32(json.dumps([task, records[0]["length"], contexts]).encode())  # not the method: paired
        picked = np.random.default_rng(seed).integers(len(contexts), size=(N_BOOTSTRAP, len(contexts)))
        transform = np.vectorize(perplexity) if task == "lm_perplexity" else np.asarray
        self.contexts, self.n = len(contexts), int(counts.sum())
        self.score = float(transform(sums.sum() / counts.sum()))
        self.draws: _FloatArray = transform(sums[picked].sum(axis=1) / counts[picked].sum(axis=1))

    def fields(self) -> Result:
        return {"score": self.score, "n": self.n, "contexts": self.contexts, "interval": _interval(self.draws)}

    def difference(self, other: _Drawn) -> Result:
        return {"difference": self.score - other.score, "interval": _interval(self.draws - other.draws)}


def _mean(parts: Sequence[_Drawn]) -> _Drawn:
    if len(parts) == 1:
        return parts[0]
    mean = object.__new__(_Drawn)
    mean.contexts, mean.n = sum(part.contexts for part in parts), sum(part.n for part in parts)
    mean.score = float(np.mean([part.score for part in parts]))
    mean.draws = np.mean([part.draws for part in parts], axis=0)
    return mean


def _interval(draws: _FloatArray) -> list[float]:
    return [float(end) for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _work(records: Sequence[Record]) -> Result:
    def rate(amount: str, seconds: str) -> float | None:
        took = sum(record[seconds] for record in records)
        return sum(record[amount] for record in records) / took if took else None

    return {
        "kv_bytes": float(np.mean([record["kv_bytes"] for record in records])),
        "read_tps": rate("n_read", "read_seconds"),
        "generate_tps": rate("n_generated", "generate_seconds"),
    }


def _mean_curve(records: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    curves = [record["by_position"] for record in records if record.get("by_position")]
    if not curves or any(len(curve[0]) != len(curves[0][0]) for curve in curves):
        return None
    return [np.mean([curve[axis] for curve in curves], axis=0).tolist() for axis in (0, 1)]


def _suites() -> dict[str, list[str]]:
    return {"ruler": ruler.tasks(), "longbench": longbench.names()}
