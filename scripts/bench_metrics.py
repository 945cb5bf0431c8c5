"""What scoring costs while a long prompt is read: the share of the time that commits take, for each metric.

    python scripts/bench_metrics.py MODEL.gguf [--tokens 8192] [--ratio 0.2] [--metric snapkv]
    python scripts/bench_metrics.py MODEL.gguf --tokens 2048 --generate 256

Uniform budgets, f16 K and V. "select" is the computation of the scores (with the norms behind W_O) and the selection, "move"
that of the surviving cells. What a metric keeps of the queries, and the attention that the cells receive, are computed with the
model: "collect" is the time of those nodes of its graph, each computed alone. All shares are of the same run: two runs
differ by more than this, as the machine's speed does. A trained metric gets weights by chance, which cost the same.

With --generate it is the time of a token after such a prompt, commits included: the median, and the mean.
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import click
import llama_cpp
import llama_cpp.llama_cpp as binding
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
    embed(model, path, build_metadata(blank_profile(metric, heads, {}), allocation="uniform", scorer=scorer))
    return path


class Collecting:
    """The time of the nodes between the cells' V and their attention, as ``llama_context_params.cb_eval``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        for function in (binding._lib.ggml_get_name, binding._lib.ggml_op_desc):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
        self.params = llama_cpp.llama_context_default_params()
        self.params.cb_eval = binding.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, tensor: int, ask: bool, _: object) -> bool:
        if not ask:  # computed
            self._since = self._since or time.perf_counter()
            return True
        op = binding._lib.ggml_op_desc(tensor)
        if self._since is None:
            return op == b"SET_ROWS" and binding._lib.ggml_get_name(tensor).startswith(b"cache_v_")
        if not op.startswith(b"FLASH_ATTN"):
            return True
        self.seconds += time.perf_counter() - self._since
        self._since = None
        return False


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--metric", "names", multiple=True, metavar="NAME[:PARAM=VALUE]…",
              help="May be given again.  [default: all]")
@click.option("--tokens", "n_tokens", default=8192, show_default=True)
@click.option("--ratio", default=0.2, show_default=True)
@click.option("--ubatch", "n_ubatch", default=512, show_default=True)
@click.option("--threads", "n_threads", default=2, show_default=True)
@click.option("--generate", "n_generate", default=0, help="Tokens that are generated after the prompt.")
def main(model: Path, names: list[str], n_tokens: int, ratio: float, n_ubatch: int, n_threads: int, n_generate: int) -> None:
    """Print one JSON object for each metric."""
    if not 0 <= n_generate < n_tokens - 1:
        raise click.UsageError("--generate has to leave tokens of --tokens for the prompt")
    commits: list[tuple[float, float]] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if found := _COMMIT.search(text.decode(errors="replace")):
            commits.append((float(found[1]), float(found[2])))

    def measure(metric: metrics.Metric) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=model.resolve().parent) as folder:
            return measure_file(with_scorer(model, metric, folder) if metric.trained else model, metric)

    def measure_file(path: Path, metric: metrics.Metric) -> dict[str, float]:
        collecting = Collecting()
        params = llama_cpp.llama_context_default_params() if n_generate else collecting.params
        with mock.patch.object(binding, "llama_context_default_params", lambda: params):
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
        collecting.seconds = 0.0
        prompt = tokens[: len(tokens) - n_generate]
        clock = [time.perf_counter()]
        for part in [prompt, *([token] for token in tokens[len(prompt) :])]:
            llama.eval(part)
            clock.append(time.perf_counter())
        seconds, *generating = np.diff(clock).tolist()
        size = runtime.usage(llama).bytes / 2**20
        llama.close()
        if n_generate:
            return {"median ms": 1e3 * np.median(generating), "mean ms": 1e3 * np.mean(generating), "MiB": size}
        select, move = (sum(times) / 1000.0 for times in zip(*commits))
        times = {"select": select, "move": move, "collect": collecting.seconds}
        shares = {f"{name} share": times[name] / seconds for name in ("select", "collect")}
        return {"seconds": seconds, "commits": len(commits), **times, "MiB": size, **shares}

    known = map(metrics.get, metrics.names())
    for text in names or [metric.name for metric in known if metric.native and "capacity" in metric.policies]:
        rounded = {key: round(float(value), 4) for key, value in measure(metrics.parse(text)).items()}
        click.echo(json.dumps({"metric": text, "tokens": n_tokens - 1, "threads": n_threads, **rounded}))


if __name__ == "__main__":
    main()
