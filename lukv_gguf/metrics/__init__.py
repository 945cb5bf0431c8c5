"""Intra-head metrics by name: one file a metric, listed here."""

from __future__ import annotations

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics.base import LayerState, Metric, Needs
from lukv_gguf.metrics.cake import Cake
from lukv_gguf.metrics.capkv import CapKV
from lukv_gguf.metrics.criticalkv import CriticalKV
from lukv_gguf.metrics.curdkv import CurDKV
from lukv_gguf.metrics.expectedattention import ExpectedAttention
from lukv_gguf.metrics.foresight import Foresight
from lukv_gguf.metrics.h2o import H2O
from lukv_gguf.metrics.keydiff import KeyDiff
from lukv_gguf.metrics.knorm import KNorm
from lukv_gguf.metrics.kvzip import KVZip
from lukv_gguf.metrics.random import Random
from lukv_gguf.metrics.shares import KeyDiffAnd
from lukv_gguf.metrics.snapkv import SnapKV
from lukv_gguf.metrics.streamingllm import StreamingLLM
from lukv_gguf.scorer import Scorer

__all__ = ["LayerState", "Metric", "Needs", "get", "names", "parse", "parse_list", "require_native"]

_METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Cake, CapKV, CurDKV, ExpectedAttention, Foresight, H2O, KeyDiff, KNorm, KVZip, Random, SnapKV, StreamingLLM
    )
}
_WRAPPERS = {"criticalkv-": CriticalKV, "keydiff-": KeyDiffAnd}


def names() -> list[str]:
    """Names of all metrics, sorted; those of wrapped ones too."""
    return sorted([*_METRICS, *(prefix + name for prefix, wrapper in _WRAPPERS.items() for name in wrapper.bases)])


def get(name: str, scorer: Scorer | None = None, **params: float) -> Metric:
    """The metric of that name; a trained one with its scorer.

    Raises
    ------
    LukvError
        No such metric, or it has no such parameter, or not with such a value.

    Examples
    --------
    >>> get("snapkv", window=16).params["window"]
    16
    """
    if name not in names():
        raise LukvError(f"unknown metric {name!r}; known metrics: {', '.join(names())}")
    for prefix, wrapper in _WRAPPERS.items():
        if name.startswith(prefix):
            return wrapper(_METRICS[name.removeprefix(prefix)], **params)
    if _METRICS[name].trained:
        return _METRICS[name](scorer, **params)
    return _METRICS[name](**params)


def parse(text: str, scorer: Scorer | None = None) -> Metric:
    """The metric that a user wrote: ``NAME`` or ``NAME:PARAM=VALUE:…``; a trained one with its scorer.

    Raises
    ------
    LukvError
        As `get`, or a value is not a number.

    Examples
    --------
    >>> parse("snapkv:window=16:kernel=7").params
    {'window': 16, 'kernel': 7, 'carry': 0}
    """
    name, *settings = text.strip().split(":")
    params = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            params[key.strip()] = float(value)
        except ValueError:
            raise LukvError(f"metric {text!r}: write parameters as {name}:PARAM=NUMBER") from None
    return get(name, scorer, **params)


def parse_list(text: str, scorer: Scorer | None = None) -> list[Metric]:
    """The metrics that a user wrote, separated by commas.

    Raises
    ------
    LukvError
        As `parse`, or a scorer that none of them asks for.
    """
    found = [parse(part, scorer) for part in text.split(",")]
    for metric in found:
        _ = metric.weights_digest  # raises where there are none
    if scorer is not None and not any(metric.trained for metric in found):
        trained = ", ".join(name for name, metric in _METRICS.items() if metric.trained)
        raise LukvError(f"a scorer is for the metric {trained}, not for {text}")
    return found


def require_native(metric: Metric) -> None:
    """Raise LukvError if the native cache does not have a metric, so that a model that asks for it would not load."""
    if not metric.native:
        known = ", ".join(name for name in names() if get(name).native)
        raise LukvError(f"metric {metric.name} ranks in profiles only, the native cache does not have it; it has: {known}")
