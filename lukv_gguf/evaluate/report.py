"""What an evaluation found, for people: tables on a terminal, pictures, and one page that holds everything."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from lukv_gguf.evaluate.methods import FULL  # noqa: E402
from lukv_gguf.evaluate.results import LOWER_IS_BETTER, Result  # noqa: E402
from lukv_gguf.evaluate.store import Record  # noqa: E402
from lukv_gguf.gguf_header import replacing  # noqa: E402
from lukv_gguf.plots import STYLE  # noqa: E402

_NAMES = {"full": "full cache", "uniform": "uniform", "pyramidkv": "PyramidKV", "adakv": "Ada-KV", "lukv": "LU-KV"}
_COLOURS = {"full": "#6b7280", "uniform": "#d08700", "pyramidkv": "#7c5cbf", "adakv": "#2b7fff", "lukv": "#00997b"}
_SHORT = {
    "lm_perplexity": "perplexity",
    "lm_kl": "KL to full",
    "lm_top1": "same best token",
    "lm_greedy": "same greedy text",
}
_BLOCK = ("length", "kv_type", "query_aware", "metric", "policy", "ratio")
_FEWEST_CONTEXTS = 5  # with fewer, bootstrap intervals are too narrow to tell anything
_MARKS = {"capacity": "o", "prefill": "s", "": "D"}


def tables(results: Sequence[Result]) -> list[Table]:
    """One table for each ratio, policy, metric, type of K and V, and length: a column for each method, a row for each task.

    A ▲ or ▼ marks a score that is better or worse than the uniform budgets' by more than chance (paired 95 % interval).
    """
    made = []
    for title, names, rows in _blocks(results):
        table = Table(title=title, title_justify="left", pad_edge=False, title_style="bold")
        table.add_column("task", no_wrap=True)
        for method in rows:
            table.add_column(_name(method), justify="right")
        for name in names:
            table.add_row(_short(name), *(_cell_text(by_task.get(name)) for by_task in rows.values()))
        firsts = [next(iter(by_task.values())) for by_task in rows.values()]
        table.add_section()
        table.add_row("KV, MiB", *(f"{first['kv_bytes'] / 2**20:.1f}" for first in firsts))
        table.add_row(
            "tokens/s",
            *(f"{first['generate_tps']:.0f}" if first["generate_tps"] else "" for first in firsts),
        )
        made.append(table)
    return made


@dataclass(frozen=True)
class Picture:
    """One drawing: a name for its files, what it shows, and its bytes by kind (``svg``, ``png``)."""

    name: str
    caption: str
    data: dict[str, bytes]


def pictures(results: Sequence[Result], records: Sequence[Record]) -> list[Picture]:
    """All that there is something to draw for; the answers are for the map of needles."""
    with matplotlib.rc_context(STYLE):
        return [
            Picture(name, caption, {kind: _render(figure, kind) for kind in ("svg", "png")})
            for name, caption, figure in _draw(results, records)
        ]


def write_page(
    path: Path, results: Sequence[Result], drawn: Sequence[Picture], model: str, facts: dict[str, str]
) -> None:
    """Write one HTML page that needs nothing else.

    Parameters
    ----------
    path
        ``.html``.
    drawn
        From `pictures`.
    facts
        What a reader has to know, by name: command, numbers, versions.

    Raises
    ------
    LukvError
        It cannot be written.
    """
    with replacing(path) as file:
        file.write(_page(results, drawn, model, facts).encode())


def write_pictures(folder: Path, drawn: Sequence[Picture]) -> None:
    """Write every picture as PNG and SVG."""
    for picture in drawn:
        for kind, data in picture.data.items():
            with replacing(folder / f"{picture.name}.{kind}") as file:
                file.write(data)


def _draw(results: Sequence[Result], records: Sequence[Record]) -> Iterable[tuple[str, str, Figure]]:
    """Name, caption and picture, for those that there is something to draw for."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    overall = [name for name in tasks if name.endswith("_average")] or [
        name for name in tasks if not name.startswith("lm_")
    ][:1]
    several_ratios = len({result["ratio"] for result in results if result["method"] != FULL}) > 1
    for name in overall:
        yield (
            f"score-{name}",
            f"Mean score ({_short(name)}) with 95 % intervals.",
            _lines(results, name, several_ratios),
        )
    if "lm_kl" in tasks:
        caption = "Divergence from the full cache's predictions on held-out prose, nats per token: lower is better."
        yield "kl", caption, _lines(results, "lm_kl", several_ratios)
        curves = [
            result
            for result in results
            if result["task"] == "lm_kl" and result["method"] != FULL and result.get("by_position")
        ]
        if curves:
            yield (
                "kl-position",
                "The same by the position in the text. The eviction comes before the last quarter.",
                _positions(curves),
            )
    shown = [name for name in tasks if not name.endswith("_average") and not name.startswith("lm_")]
    if len(shown) > 1:
        yield "tasks", "Score of each task; the numbers are shares of right answers.", _heatmap(results, shown)
    needles = [record for record in records if record.get("depth") is not None]
    if needles:
        yield "needles", "Needles found, by their place in the text and the length of the text.", _needle_maps(needles)
    if overall:
        yield (
            "cost",
            "Quality beside the memory of the cache, and beside the rate of generating in this run.",
            _costs(results, overall[0]),
        )


def _new(width: float, height: float, n_column: int = 1, n_row: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_row, n_column, squeeze=False)


def _lines(results: Sequence[Result], task: str, against_ratio: bool) -> Figure:
    """Score against ratio, or bars at the only ratio; a panel for each metric and policy."""
    chosen = [result for result in results if result["task"] == task]
    panels = list(
        dict.fromkeys((r["metric"], r["policy"], r["kv_type"], r["length"]) for r in chosen if r["method"] != FULL)
    )
    n_column = min(3, max(1, len(panels)))
    figure, axes = _new(
        4.0 * n_column, 3.1 * -(-max(1, len(panels)) // n_column), n_column, -(-max(1, len(panels)) // n_column)
    )
    for panel, ax in zip(panels, axes.ravel()):
        metric, policy, kv_type, length = panel
        own = [r for r in chosen if (r["metric"], r["policy"], r["kv_type"], r["length"]) == panel]
        full = [r for r in chosen if r["method"] == FULL and r["kv_type"] == kv_type and r["length"] == length]
        for r in full if task != "lm_kl" else []:
            ax.axhline(r["score"], color=_colour(FULL), linestyle="--", linewidth=1)
            ax.annotate("full cache", (0.99, r["score"]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                        color=_colour(FULL))  # fmt: skip
        methods = list(dict.fromkeys(r["method"] for r in own))
        for i, method in enumerate(methods):
            line = sorted((r for r in own if r["method"] == method), key=lambda r: r["ratio"])
            score = np.array([r["score"] for r in line])
            low, high = np.array([r["interval"] for r in line]).T
            error = [np.maximum(score - low, 0), np.maximum(high - score, 0)]
            if against_ratio:
                ax.errorbar([r["ratio"] for r in line], score, error, color=_colour(method, i), marker="o", markersize=4,
                            linewidth=1.6, capsize=2, elinewidth=0.8, label=_name(method))  # fmt: skip
            else:
                ax.bar(
                    [i],
                    score,
                    yerr=error,
                    color=_colour(method, i),
                    width=0.7,
                    error_kw={"elinewidth": 0.9, "capsize": 3},
                )
        if against_ratio:
            ax.set(xlabel="kept of the cache")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            ax.legend(fontsize=8)
        else:
            ax.set_xticks(
                range(len(methods)), [_name(method) for method in methods], rotation=20 if len(methods) > 4 else 0
            )
        ax.set(
            title=f"{metric}, {policy}, {length} tokens" + (f", {kv_type}" if kv_type != "f16" else ""),
            ylabel=_short(task),
        )
        if task == "lm_kl":
            ax.set_ylim(bottom=0)
        else:
            ax.set_ylim(0, max(0.05, 1.18 * max(r["interval"][1] for r in own + full)))
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    return figure


def _positions(curves: Sequence[Result]) -> Figure:
    panels = list(dict.fromkeys((r["metric"], r["policy"], r["ratio"], r["length"]) for r in curves))
    n_column = min(3, len(panels))
    figure, axes = _new(4.0 * n_column, 3.0 * -(-len(panels) // n_column), n_column, -(-len(panels) // n_column))
    for panel, ax in zip(panels, axes.ravel()):
        own = [r for r in curves if (r["metric"], r["policy"], r["ratio"], r["length"]) == panel]
        for i, result in enumerate(own):
            ax.plot(
                *result["by_position"], color=_colour(result["method"], i), marker=".", label=_name(result["method"])
            )
        ax.set(
            title=f"{panel[0]}, {panel[1]}, {panel[2]:.0%} kept",
            xlabel="position in the text",
            ylabel="KL to full",
            ylim=(0, None),
        )
        ax.legend(fontsize=8)
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    return figure


def _heatmap(results: Sequence[Result], tasks: Sequence[str]) -> Figure:
    chosen = [r for r in results if r["task"] in tasks]
    rows = list(dict.fromkeys(_row_key(r) for r in chosen))
    columns = sorted({(r["length"], r["task"]) for r in chosen}, key=lambda column: (column[0], tasks.index(column[1])))
    scores = np.full((len(rows), len(columns)), np.nan)
    for r in chosen:
        scores[rows.index(_row_key(r)), columns.index((r["length"], r["task"]))] = r["score"]
    several = len({length for length, _ in columns}) > 1
    labels = [_short(task) + (f" {_length(length)}" if several else "") for length, task in columns]
    figure, axes = _new(3.2 + 0.62 * len(columns), 0.9 + 0.3 * len(rows))
    ax = axes[0, 0]
    ax.imshow(scores, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), labels, rotation=35, ha="right")
    ax.set_yticks(range(len(rows)), [_row_label(row) for row in rows])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for y, x in zip(*np.nonzero(np.isfinite(scores))):
        ax.text(x, y, f"{scores[y, x]:.2f}", ha="center", va="center", fontsize=8, color=_ink(scores[y, x]))
    return figure


def _needle_maps(needles: Sequence[Record], n_depth: int = 5) -> Figure:
    rows = list(dict.fromkeys(_row_key(r) for r in needles))
    lengths = sorted({r["length"] for r in needles})
    n_column = min(5, len(rows))
    n_row = -(-len(rows) // n_column)
    width = 1.1 + 0.35 * len(lengths)
    figure, axes = _new(1.2 + width * n_column, 0.3 + 1.45 * n_row, n_column, n_row)
    for row, ax in zip(rows, axes.ravel()):
        found = np.full((n_depth, len(lengths)), np.nan)
        for y in range(n_depth):
            for x, length in enumerate(lengths):
                scores = [
                    r["score"] for r in needles
                    if _row_key(r) == row and r["length"] == length and min(n_depth - 1, int(r["depth"] * n_depth)) == y
                ]  # fmt: skip
                if scores:
                    found[y, x] = np.mean(scores)
        image = ax.imshow(found, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
        ax.set_yticks(range(n_depth), [f"{(y + 0.5) / n_depth:.0%}" for y in range(n_depth)])
        ax.set_title("\n".join(_row_label(row).split(" · ", 1)), fontsize=7.5)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0, labelsize=7)
        for y, x in zip(*np.nonzero(np.isfinite(found))):
            ax.text(x, y, f"{found[y, x]:.1f}", ha="center", va="center", fontsize=7, color=_ink(found[y, x]))
    for ax in axes.ravel()[len(rows) :]:
        ax.remove()
    figure.colorbar(image, ax=list(axes.ravel()[: len(rows)]), label="found", shrink=0.8, pad=0.01)
    figure.supylabel("depth of the needle", fontsize=9)
    return figure


def _costs(results: Sequence[Result], task: str) -> Figure:
    chosen = [r for r in results if r["task"] == task]
    figure, axes = _new(9.0, 3.4, 2)
    sides: Sequence[tuple[Any, str, Callable[[Result], float | None]]] = (
        (axes[0, 0], "KV cache, MiB", lambda r: r["kv_bytes"] / 2**20),
        (axes[0, 1], "generating, tokens/s", lambda r: r["generate_tps"]),
    )
    methods = list(dict.fromkeys(r["method"] for r in chosen))
    for ax, label, value in sides:
        for r in chosen:
            if value(r) is not None:
                ax.scatter(
                    value(r),
                    r["score"],
                    color=_colour(r["method"], methods.index(r["method"])),
                    marker=_MARKS.get(r["policy"], "o"),
                    s=28,
                )
        ax.set(xlabel=label, ylabel=_short(task), xlim=(0, None), ylim=(0, None))
    ax = axes[0, 1]
    for i, method in enumerate(methods):
        ax.scatter([], [], color=_colour(method, i), label=_name(method))
    for policy in dict.fromkeys(r["policy"] for r in chosen if r["policy"]):
        ax.scatter([], [], color="none", edgecolor="#374151", marker=_MARKS.get(policy, "o"), label=policy)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _blocks(results: Sequence[Result]) -> Iterable[tuple[str, list[str], dict[str, dict[str, Result]]]]:
    """Title, tasks, and results by method and task, for each combination of everything else."""
    names = list(dict.fromkeys(r["task"] for r in results))
    names = [n for n in names if n.endswith("_average")] + [n for n in names if not n.endswith("_average")]
    for key in dict.fromkeys(tuple(r[name] for name in _BLOCK) for r in results if r["method"] != FULL):
        length, kv_type, query_aware, metric, policy, ratio = key
        rows: dict[str, dict[str, Result]] = {}
        for r in results:
            same_full = r["method"] == FULL and (r["length"], r["kv_type"], r["query_aware"]) == key[:3]
            if same_full or tuple(r[name] for name in _BLOCK) == key:
                rows.setdefault(r["method"], {})[r["task"]] = r
        own = [name for name in names if any(name in by_task for by_task in rows.values())]
        title = f"{ratio:.0%} of the cache, policy {policy}, metric {metric}, {length} tokens"
        title += f", {kv_type} K and V" if kv_type != "f16" else ""
        yield title + (", question known" if query_aware else ""), own, rows
    if results and all(r["method"] == FULL for r in results):
        yield "full cache", names, {FULL: {r["task"]: r for r in results}}


def _cell_text(result: Result | None) -> Text:
    if result is None:
        return Text("")
    mark = _mark(result)
    score, low, high = (_number(result["task"], value) for value in (result["score"], *result["interval"]))
    text = Text(score)
    text.append(f" {mark}" if mark else "", style="green" if mark == "▲" else "red")
    text.append(f"\n{low}–{high}", style="dim")
    return text


def _number(task: str, value: float) -> str:
    return f"{value:.3f}" if task.startswith("lm_") and task != "lm_perplexity" else f"{value:.2f}"


def _mark(result: Result) -> str:
    """Whether it differs from uniform budgets by more than chance, ▲ for better."""
    if "vs_uniform" not in result or result["contexts"] < _FEWEST_CONTEXTS:
        return ""
    low, high = result["vs_uniform"]["interval"]
    if low <= 0 <= high:
        return ""
    return "▲" if (low > 0) != (result["task"] in LOWER_IS_BETTER) else "▼"


def _ink(share: float) -> str:
    """A colour that can be read on the heat map's."""
    return "white" if share > 0.6 else "#1f2937"


def _row_key(one: Record) -> tuple[Any, ...]:
    return one["method"], one["metric"], one["policy"], one["ratio"], one["kv_type"]


def _row_label(row: tuple[Any, ...]) -> str:
    method, metric, policy, ratio, kv_type = row
    parts = [
        _name(method),
        metric,
        policy,
        f"{ratio:.0%}" if method != FULL else "",
        kv_type if kv_type != "f16" else "",
    ]
    return " · ".join(part for part in parts if part)


def _name(method: str) -> str:
    base, colon, rest = method.partition(":")
    return _NAMES.get(base, base) + (f" ({rest})" if colon else "")


def _short(task: str) -> str:
    return _SHORT.get(task, task.replace("_average", " average").replace("niah_", ""))


def _length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _colour(method: str, number: int = 0) -> str:
    return _COLOURS.get(method) or matplotlib.colors.to_hex(f"C{number % 10}")


def _render(figure: Figure, kind: str) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=130)
    return data.getvalue()


_PAGE_STYLE = """
:root{color-scheme:light;--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--good:#00795f;--bad:#b42318}
*{box-sizing:border-box} body{margin:0;background:#f6f7f9;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 80px} h1{font-size:28px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 12px} p.lead{color:var(--soft);margin:0 0 24px}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:20px;margin:0 0 16px;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:0 0 8px}
.tile{background:#fff;border:1px solid var(--line);border-radius:10px;padding:16px} .tile b{display:block;font-size:26px;line-height:1.2}
.tile span{color:var(--soft);font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;width:100%} caption{text-align:left;font-weight:600;padding-bottom:8px}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap} th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500} tbody tr:last-child td{border-bottom:0} td small{display:block;color:var(--soft);font-size:11px}
.up{color:var(--good)} .down{color:var(--bad)} figure{margin:0} figcaption{color:var(--soft);font-size:13px;margin-top:8px}
svg{max-width:100%;height:auto} .facts th,.facts td{text-align:left;white-space:normal;vertical-align:top} .facts th{width:160px;color:var(--soft);font-weight:500}
code{font-size:12px;word-break:break-all}
"""


def _page(results: Sequence[Result], drawn: Sequence[Picture], model: str, facts: dict[str, str]) -> str:
    parts = [
        f"<h1>{html.escape(model)}</h1>",
        '<p class="lead">How well a fraction of the KV cache answers, and what it costs</p>',
    ]
    parts.append(_tiles(results))
    parts.append("<h2>Pictures</h2>")
    for picture in drawn:
        svg = picture.data["svg"].decode()
        caption = html.escape(picture.caption)
        parts.append(
            f"<section><figure>{svg[svg.index('<svg') :]}<figcaption>{caption}</figcaption></figure></section>"
        )
    parts.append("<h2>Scores</h2>")
    parts += [f"<section>{_html_table(*block)}</section>" for block in _blocks(results)]
    parts.append(
        "<p class=lead>Small numbers: 95 % bootstrap intervals over contexts. <span class=up>▲</span> and <span class=down>▼</span>: "
        "better or worse than uniform budgets on the same questions by more than chance.</p>"
    )
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    parts.append(f'<h2>How it was measured</h2><section><table class="facts">{rows}</table></section>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(model)}: LU-KV evaluation</title><style>{_PAGE_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _tiles(results: Sequence[Result]) -> str:
    """The full cache and each method at the ratio nearest to 20 %, best policy and metric first."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    task = next((t for t in tasks if t.endswith("_average")), tasks[0] if tasks else "")
    chosen = [r for r in results if r["task"] == task and not r["query_aware"]] or [
        r for r in results if r["task"] == task
    ]
    tiles = []
    for method in dict.fromkeys(r["method"] for r in chosen):
        own = [r for r in chosen if r["method"] == method]
        nearest = min(abs(r["ratio"] - 0.2) for r in own) if method != FULL else None
        own = [r for r in own if nearest is None or abs(r["ratio"] - 0.2) == nearest]
        best = (min if task in LOWER_IS_BETTER else max)(own, key=lambda r: r["score"])
        where = "everything kept" if method == FULL else f"{best['ratio']:.0%} kept, {best['metric']}, {best['policy']}"
        tiles.append(
            f'<div class="tile" style="border-top:4px solid {_colour(method)}"><span>{html.escape(_name(method))}</span><b>{best["score"]:.2f}</b>'
            f"<span>{html.escape(_short(task))}; {html.escape(where)}; {best['kv_bytes'] / 2**20:.1f} MiB</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _html_table(title: str, names: Sequence[str], rows: dict[str, dict[str, Result]]) -> str:
    head = "".join(f"<th>{html.escape(_short(name))}</th>" for name in names)
    body = []
    for method, by_task in rows.items():
        cells = []
        for name in names:
            result = by_task.get(name)
            if result is None:
                cells.append("<td></td>")
                continue
            mark = _mark(result)
            shown = f' <span class="{"up" if mark == "▲" else "down"}">{mark}</span>' if mark else ""
            score, low, high = (_number(name, value) for value in (result["score"], *result["interval"]))
            counts = f"{result['n']} questions, {result['contexts']} contexts"
            cells.append(f'<td title="{counts}">{score}{shown}<small>{low}–{high}</small></td>')
        first = next(iter(by_task.values()))
        rate = f"{first['generate_tps']:.0f}" if first["generate_tps"] else ""
        cells.append(f"<td>{first['kv_bytes'] / 2**20:.1f}</td><td>{rate}</td>")
        body.append(f"<tr><td>{html.escape(_name(method))}</td>{''.join(cells)}</tr>")
    return (
        f"<table><caption>{html.escape(title)}</caption><thead><tr><th>method</th>{head}<th>KV cache, MiB</th><th>tokens/s</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )
