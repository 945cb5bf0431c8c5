"""What scoring costs while a long prompt is read: the share of the time that commits take, for each metric.

    python scripts/bench_metrics.py MODEL.gguf [--tokens 8192] [--ratio 0.2] [--metric snapkv]

Uniform budgets, f16 K and V. "select" is the computation of the scores (with the norms behind W_O) and the selection, "move"
that of the surviving cells. What a metric keeps of the queries, and the attention that the cells receive, are computed with the
model: "collect" is what the prompt takes longer without its commits than with streamingllm, which keeps nothing, in processor
time. Its share, like the others, is of the time with the metric. A trained metric gets
weights by chance, which cost the same.
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
import time
from pathlib import Path

import click
import llama_cpp
import numpy as np

from lukv_gguf import metrics, runtime
from lukv_gguf.calibration import load_default
from lukv_gguf.embed import blank_profile, build_metadata
from lukv_gguf.gguf_header import read_header
from lukv_gguf.metadata import embed, head_sizes, model_shape
from lukv_gguf.scorer import FEATURES, Scorer

_COMMIT = re.compile(r"recent cells, selection ([\d.]+) ms, moves ([\d.]+) ms")


def with_scorer(model: Path, metric: metrics.Metric, folder: str) -> Path:
    """A copy of the model with 16 hidden units for each head."""
    header, random = read_header(model), np.random.default_rng(0)
    heads, sizes = model_shape(header), head_sizes(header)
    shapes = (16, len(FEATURES) + sum(sizes)), (16,), (16,), (len(FEATURES),)
    scorer = Scorer(*(random.standard_normal((*heads, *shape)) / 16 for shape in shapes), d_key=sizes[0], params=metric.params)
    path = Path(folder) / "scorer.gguf"
    embed(model, path, build_metadata(blank_profile(metric, heads, {}), floor=0.0, blend=0.0, allocation="uniform", scorer=scorer))
    return path


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--metric", "names", multiple=True, metavar="NAME[:PARAM=VALUE]…",
              help="May be given again.  [default: all]")
@click.option("--tokens", "n_tokens", default=8192, show_default=True)
@click.option("--ratio", default=0.2, show_default=True)
@click.option("--ubatch", "n_ubatch", default=512, show_default=True)
@click.option("--threads", "n_threads", default=2, show_default=True)
def main(model: Path, names: list[str], n_tokens: int, ratio: float, n_ubatch: int, n_threads: int) -> None:
    """Print one JSON object for each metric."""
    commits: list[tuple[float, float]] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if found := _COMMIT.search(text.decode(errors="replace")):
            commits.append((float(found[1]), float(found[2])))

    def measure(metric: metrics.Metric) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=model.resolve().parent) as folder:
            return measure_file(with_scorer(model, metric, folder) if metric.trained else model, metric)

    def measure_file(path: Path, metric: metrics.Metric) -> dict[str, float]:
        llama = llama_cpp.Llama(
            model_path=str(path),
            kv_overrides={
                "lukv.ratio": ratio,
                "lukv.metric": metric.name,
                **{f"lukv.metric.{name}": value for name, value in metric.params.items()},
            },
            n_ctx=n_tokens,
            n_batch=n_ubatch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            flash_attn=True,
            verbose=False,
        )
        llama_cpp.llama_log_set(log, None)
        tokens = np.resize(llama.tokenize(load_default()[0].encode()), n_tokens - 1).tolist()
        llama.eval(tokens[:n_ubatch])  # not timed: pages and caches
        llama.reset()
        llama._ctx.kv_cache_clear()
        commits.clear()
        started, started_cpu = time.perf_counter(), time.process_time()
        llama.eval(tokens)
        seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
        select, move = (sum(times) / 1000.0 for times in zip(*commits))
        size = runtime.usage(llama).bytes
        llama.close()
        return {"seconds": seconds, "cpu": cpu, "commits": len(commits), "select": select, "move": move, "MiB": size / 2**20}

    def prompt(found: dict[str, float]) -> float:
        return found["cpu"] * (1 - (found["select"] + found["move"]) / found["seconds"])

    plain = prompt(measure(metrics.get("streamingllm")))
    known = map(metrics.get, metrics.names())
    for text in names or [metric.name for metric in known if metric.native and "capacity" in metric.policies]:
        found = measure(metrics.parse(text))
        collect = prompt(found) - plain
        shares = {"select share": found["select"] / found["seconds"], "collect share": collect / found["cpu"]}
        rounded = {key: round(value, 4) for key, value in {**found, "collect": collect, **shares}.items()}
        click.echo(json.dumps({"metric": text, "tokens": n_tokens - 1, "threads": n_threads, **rounded}))


if __name__ == "__main__":
    main()
