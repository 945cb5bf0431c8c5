"""What a profile says, as a picture."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402  (the backend comes first)
from matplotlib.figure import Figure  # noqa: E402

from lukv_gguf.errors import LukvError  # noqa: E402
from lukv_gguf.gguf_header import replacing  # noqa: E402
from lukv_gguf.profile_file import GAP_RATIO, Profile  # noqa: E402
from lukv_gguf.stability import rank_correlation, split_half_correlation  # noqa: E402

FORMATS = (".png", ".svg", ".html")
_RATIOS = (0.1, 0.2, 0.5)  # of which the budgets by layer are drawn
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_PAGE_STYLE = (
    "body{font-family:sans-serif;margin:2em} svg{max-width:100%;height:auto} th{text-align:left;padding-right:1em}"
)


def plot_profile(
    profile: Profile, path: str | Path, ratio: float = 0.2, others: Mapping[str, Profile] | None = None
) -> None:
    """Draw budgets, marginal utility, optimality gap and stability, as far as the profile holds them.

    Parameters
    ----------
    profile
        Of a profile file, or made from the table of an embedded model.
    path
        ``.png``, ``.svg`` or ``.html`` (a page with the drawing and the provenance).
    ratio
        Kept fraction whose budgets are drawn head by head.
    others
        Profiles from other texts, by name, to compare with.

    Raises
    ------
    LukvError
        Another file type, a profile of another shape, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise LukvError(f"{path}: a plot ends in {', '.join(FORMATS)}")
    others = others or {}
    panels = [_draw_budgets, _draw_layers]
    if profile.marginal is not None:
        panels += [_draw_marginal, _draw_kept]
    if np.isfinite(profile.gap).all():
        panels.append(_draw_gap)
    if profile.query_budget is not None and len(profile.query_budget) > 1 or others:
        panels.append(_draw_stability)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1 * ((len(panels) + 1) // 2) + 0.4), layout="constrained")
        model = profile.provenance.get("profiled_model", "")
        figure.suptitle(f"{model}: {profile.metric}".removeprefix(": "), x=0.01, ha="left", fontweight="bold")
        axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).ravel()
        for draw, ax in zip(panels, axes):
            draw(ax, profile, ratio, others)
        for ax in axes[len(panels) :]:
            ax.remove()
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png" if path.suffix == ".png" else "svg", dpi=150)
    data = drawing.getvalue()
    if path.suffix == ".html":
        data = _page(profile, data.decode()).encode()
    with replacing(path) as file:
        file.write(data)


def plot_token_times(times_ms: Mapping[str, Sequence[float]], path: str | Path) -> None:
    """Draw a histogram of how long generated tokens took, and each of them in its order.

    Parameters
    ----------
    times_ms
        Milliseconds of each token, by name.
    path
        ``.png`` or ``.svg``.

    Raises
    ------
    LukvError
        The file cannot be written.
    """
    edges = np.linspace(0.0, 1.05 * max(np.quantile(times, 0.995) for times in times_ms.values()), 80)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        histogram, series = figure.subplots(1, 2)
        for name, times in times_ms.items():
            histogram.hist(np.minimum(times, edges[-1]), edges, histtype="step", label=f"{name}, median {np.median(times):.1f} ms")
            series.plot(times, linewidth=0.8)
        histogram.set(title="Generated tokens by time", xlabel="ms (the last bar: and more)", ylabel="tokens", yscale="log")
        histogram.legend(loc="upper right", fontsize=8)
        series.set(title="In their order", xlabel="token", ylabel="ms", ylim=(0, None))
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)


def _draw_budgets(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    _draw_heads(ax, profile.budget_at(ratio) * 100, 100.0, f"Kept of each head at {ratio:.0%} of the cache", "kept, %")


def _draw_gap(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    title = f"Optimality gap where each head keeps {GAP_RATIO:.0%}"
    _draw_heads(ax, profile.gap * 100, None, title, "of the head's importance, %")


def _draw_heads(ax: Axes, values: np.ndarray, highest: float | None, title: str, label: str) -> None:
    image = ax.imshow(
        values.T, aspect="auto", cmap="viridis", vmin=0, vmax=highest, origin="lower", interpolation="nearest"
    )
    ax.set(title=title, xlabel="layer", ylabel="KV head")
    ax.set_yticks(range(values.shape[1])[:: max(1, values.shape[1] // 8)])
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.01)


def _draw_layers(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    for i, one in enumerate(_RATIOS):
        budget = profile.budget_at(one) * 100
        layers, colour = np.arange(len(budget)), f"C{i}"
        if budget.shape[1] > 1:
            ax.fill_between(layers, budget.min(axis=1), budget.max(axis=1), color=colour, alpha=0.15, linewidth=0)
        ax.plot(layers, budget.mean(axis=1), color=colour, label=f"at {one:.0%}")
    ax.set(title="Kept by layer: mean and range of heads", xlabel="layer", ylabel="kept, %", ylim=(0, 116))
    ax.set_yticks(range(0, 101, 20))
    ax.margins(x=0.01)
    ax.legend(ncols=len(_RATIOS), loc="upper center")


def _draw_marginal(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    gains = profile.marginal / np.maximum(profile.marginal.mean(axis=-1, keepdims=True), 1e-30)
    n_protected = profile.sink + profile.recent  # ranked first, whatever they are worth
    _draw_curves(ax, profile, _smooth(gains.mean(axis=1)[:, n_protected:]), n_protected)
    ax.set(title="Marginal utility by rank, mean of heads", yscale="log", xscale="log",
           xlabel="rank behind the protected tokens, %", ylabel="relative to the average token")  # fmt: skip


def _draw_kept(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    kept = np.cumsum(profile.marginal, axis=-1, dtype=np.float64)
    kept = kept / np.maximum(kept[..., -1:], 1e-30)
    _draw_curves(ax, profile, kept.mean(axis=1) * 100)
    ax.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle=":")
    ax.set(title="Importance kept with a share of the tokens", xlabel="kept tokens, %", ylabel="kept importance, %")
    ax.margins(0.01)


def _draw_curves(ax: Axes, profile: Profile, curves: np.ndarray, first_rank: int = 0) -> None:
    """One line a layer [L, n], coloured by depth."""
    colours = matplotlib.colormaps["viridis"]
    share = (first_rank + 1 + np.arange(curves.shape[1])) / (first_rank + curves.shape[1]) * 100
    for layer in np.flatnonzero(profile.budgeted):
        ax.plot(share, curves[layer], color=colours(layer / max(1, len(curves) - 1)), linewidth=0.9, alpha=0.8)
    depth = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(curves) - 1), colours)
    ax.figure.colorbar(depth, ax=ax, label="layer", pad=0.01)


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Means over windows that grow with the rank, so that a logarithmic axis shows a line and not a band."""
    total = np.cumsum(np.pad(curves, ((0, 0), (1, 0))), axis=1)
    rank = np.arange(curves.shape[1])
    half = rank // 5 + 2
    low, high = np.maximum(rank - half, 0), np.minimum(rank + half + 1, curves.shape[1])
    return (total[:, high] - total[:, low]) / (high - low)


def _draw_stability(ax: Axes, profile: Profile, ratio: float, others: Mapping[str, Profile]) -> None:
    percent = profile.ratios * 100
    lowest = 0.8
    if profile.query_budget is not None and len(profile.query_budget) > 1:
        halves = split_half_correlation(profile.query_budget[:, :, profile.budgeted])
        ax.fill_between(percent, halves.min(axis=0), halves.max(axis=0), color="C0", alpha=0.2, linewidth=0)
        ax.plot(percent, halves.mean(axis=0), color="C0", label="halves of the queries")
        lowest = min(lowest, halves.min())
    for i, (name, other) in enumerate(others.items(), start=1):
        table = np.stack([other.budget_at(float(one)) for one in profile.ratios])
        correlation = rank_correlation(profile.budget[:, profile.budgeted], table[:, profile.budgeted])
        ax.plot(percent, correlation, color=f"C{i}", label=name)
        lowest = min(lowest, correlation.min())
    ax.set(title="Stability: rank correlation of the budgets", xlabel="of the cache, %", ylabel="Spearman's ρ",
           ylim=(np.floor(lowest * 10) / 10, 1.01))  # fmt: skip
    ax.margins(x=0.01)
    ax.legend(loc="lower left")


def _page(profile: Profile, svg: str) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in {
            "metric": profile.metric,
            "protected": f"first {profile.sink}, last {profile.recent} tokens",
            **profile.provenance,
        }.items()
    )
    title = html.escape(f"{profile.provenance.get('profiled_model', '')} {profile.metric}".strip())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_PAGE_STYLE}</style>'
        f"</head><body>{svg[svg.index('<svg') :]}<table>{rows}</table></body></html>\n"
    )
