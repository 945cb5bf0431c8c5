"""Intra-head metrics by name: one file a metric, listed here."""

from __future__ import annotations

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics.base import LayerState, Metric
from lukv_gguf.metrics.keydiff import KeyDiff

__all__ = ["KeyDiff", "LayerState", "Metric", "get", "names"]

_METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (KeyDiff,)}


def names() -> list[str]:
    """Names of all metrics, sorted."""
    return sorted(_METRICS)


def get(name: str, **params: float) -> Metric:
    """The metric of that name.

    Raises
    ------
    LukvError
        No such metric, or it has no such parameter.

    Examples
    --------
    >>> get("keydiff").name
    'keydiff'
    """
    if name not in _METRICS:
        raise LukvError(f"unknown metric {name!r}; known metrics: {', '.join(names())}")
    return _METRICS[name](**params)
