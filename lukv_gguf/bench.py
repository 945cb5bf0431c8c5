"""Memory and speed of a model with LU-KV against stock, both sides in one run.

Each side runs in a process of its own, so that its peak memory is its own. The runs take turns, `repeat` times, and
the best rate of each side counts: what else the machine does can only make it slower.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lukv_gguf import metadata
from lukv_gguf.calibration import load_default
from lukv_gguf.errors import LukvError


@dataclass(frozen=True)
class Run:
    """What one process measures."""

    model: str
    ratio: float | None  # None: stock
    n_ctx: int
    depth: int
    n_gen: int
    n_ubatch: int
    n_threads: int
    n_gpu_layers: int
    flash_attn: bool
    kv_type: str
    cells: tuple[int, int] | None = None
    """Cells that every ubatch at the end of reading, and the first generated token, find: what is read beyond them is
    removed again. None: all that was read."""


@dataclass(frozen=True)
class BenchResult:
    """One benchmark.

    Attributes
    ----------
    ratio : kept fraction of the cache.
    n_ctx, depth : context that is allocated, and tokens in it before generation starts.
    kv_bytes_* : bytes allocated for K and V.
    prefill_tps_*, decode_tps_* : tokens per second, reading `depth` tokens and then generating.
    prefill_end_tps_* : the same for the last tokens that are read, up to four ubatches: the rate at that depth.
    token_ms_* : milliseconds that the slowest of 100 generated tokens takes (99th percentile): what a commit costs.
    *_stock_same_cells : stock with as many cells as LU-KV's heads have on average: before each of the last ubatches, and
        while tokens are generated.
    cells_prefill_end, cells_decode : these cells per head, on average; a ubatch's own are not counted.
    commit_share_prefill, commit_share_decode : part of LU-KV's time that commits take; on a GPU they also wait for its
        earlier work, so that this says nothing.
    peak_rss_* : largest resident memory of the process, bytes.
    token_times_ms : of each generated token, by side ("stock", "LU-KV", "stock, same cells"), in the order of the tokens and
        over all runs; not in `to_dict`.
    """

    ratio: float
    n_ctx: int
    depth: int
    kv_bytes_stock: int
    kv_bytes_lukv: int
    decode_tps_stock: float
    decode_tps_lukv: float
    decode_tps_stock_same_cells: float
    token_ms_stock: float
    token_ms_lukv: float
    prefill_tps_stock: float
    prefill_tps_lukv: float
    prefill_end_tps_stock: float
    prefill_end_tps_lukv: float
    prefill_end_tps_stock_same_cells: float
    cells_prefill_end: int
    cells_decode: int
    commit_share_prefill: float
    commit_share_decode: float
    peak_rss_stock: int
    peak_rss_lukv: int
    token_times_ms: dict[str, list[float]]

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "token_times_ms"}


def bench(
    model: str | Path,
    *,
    n_ctx: int,
    depth: int,
    ratio: float | None = None,
    n_gen: int = 128,
    n_ubatch: int = 512,
    n_threads: int = 2,
    n_gpu_layers: int = 0,
    flash_attn: bool = True,
    kv_type: str = "f16",
    repeat: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Measure a model with LU-KV and without.

    Parameters
    ----------
    model
        GGUF file. Without an embedded table, `ratio` must be given; the budgets are then uniform.
    n_ctx, depth
        Context to allocate, and tokens to read into it.
    ratio
        Kept fraction; the embedded one by default.
    n_gen
        Tokens to generate.
    n_gpu_layers
        Layers on the GPU, -1 for all.
    kv_type
        Type of K and V of both sides, one of `defaults.KV_TYPES`.
    repeat
        Times that every side runs.

    Raises
    ------
    LukvError
        The model cannot be used, or the tokens do not fit into the context.
    """
    if depth < 1 or n_gen < 1 or depth + n_gen > n_ctx:
        raise LukvError(f"depth {depth} and {n_gen} generated tokens do not fit into a context of {n_ctx}: raise --n-ctx")
    if ratio is None:
        embedded = metadata.read_metadata(model)
        if embedded is None:
            raise LukvError(f"{model} has no LU-KV table: embed one (lukv-gguf embed) or give --ratio for uniform budgets")
        ratio = embedded.ratio

    lukv = Run(str(model), ratio, n_ctx, depth, n_gen, n_ubatch, n_threads, n_gpu_layers, flash_attn, kv_type)
    results: dict[str, list[dict[str, Any]]] = {"stock": [], "LU-KV": [], "stock, same cells": []}
    for i in range(repeat):
        for j, name in enumerate(results):
            if progress is not None:
                progress(name, i * len(results) + j, repeat * len(results))
            side = lukv if name == "LU-KV" else replace(lukv, ratio=None)
            if name == "stock, same cells":
                side = replace(side, cells=tuple(results["LU-KV"][0]["cells"]))
            results[name].append(_measure_in_process(side))
    if progress is not None:
        progress("done", repeat * len(results), repeat * len(results))

    def best(name: str, field: str) -> float:
        return max(result[field] for result in results[name])

    return BenchResult(
        ratio=ratio,
        n_ctx=n_ctx,
        depth=depth,
        kv_bytes_stock=best("stock", "kv_bytes"),
        kv_bytes_lukv=best("LU-KV", "kv_bytes"),
        decode_tps_stock=best("stock", "decode_tps"),
        decode_tps_lukv=best("LU-KV", "decode_tps"),
        decode_tps_stock_same_cells=best("stock, same cells", "decode_tps"),
        token_ms_stock=min(result["token_ms"] for result in results["stock"]),
        token_ms_lukv=min(result["token_ms"] for result in results["LU-KV"]),
        prefill_tps_stock=best("stock", "prefill_tps"),
        prefill_tps_lukv=best("LU-KV", "prefill_tps"),
        prefill_end_tps_stock=best("stock", "prefill_end_tps"),
        prefill_end_tps_lukv=best("LU-KV", "prefill_end_tps"),
        prefill_end_tps_stock_same_cells=best("stock, same cells", "prefill_end_tps"),
        cells_prefill_end=results["LU-KV"][0]["cells"][0],
        cells_decode=results["LU-KV"][0]["cells"][1] + n_gen // 2,
        commit_share_prefill=best("LU-KV", "commit_share_prefill"),
        commit_share_decode=best("LU-KV", "commit_share_decode"),
        peak_rss_stock=best("stock", "peak_rss"),
        peak_rss_lukv=best("LU-KV", "peak_rss"),
        token_times_ms={name: [time for run in runs for time in run["token_times_ms"]] for name, runs in results.items()},
    )


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    try:
        # on Linux the other figure starts at what the process had that forked this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def _measure_in_process(run: Run) -> dict[str, Any]:
    command = [sys.executable, "-m", "lukv_gguf.bench", json.dumps(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if "LU-KV" in line or "error" in line.lower()]
        raise LukvError(f"the benchmark of {run.model} failed: {(reasons or lines or ['no output'])[-1].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(run: Run) -> dict[str, Any]:
    """Measure one side in this process."""
    from gguf import GGMLQuantizationType
    from llama_cpp import Llama, llama_synchronize

    from lukv_gguf import runtime

    kv_type = GGMLQuantizationType[run.kv_type.upper()].value
    overrides: dict[str, Any] = {"lukv.enabled": False} if run.ratio is None else {"lukv.ratio": run.ratio}
    llama = Llama(
        model_path=run.model,
        n_ctx=run.n_ctx,
        n_batch=max(run.n_ubatch, 512),
        n_ubatch=run.n_ubatch,
        n_threads=run.n_threads,
        n_threads_batch=run.n_threads,
        n_gpu_layers=run.n_gpu_layers,
        flash_attn=run.flash_attn,
        type_k=kv_type,
        type_v=kv_type,
        kv_overrides=overrides,
        verbose=False,
    )
    if run.ratio is not None and not runtime.enabled(llama):
        raise LukvError(f"LU-KV does not support this model: llama-cli -m {run.model} says why")
    text = llama.tokenize(load_default()[0].encode())
    tokens = (text * (run.depth // len(text) + 2))[: run.depth + run.n_gen]

    def evaluate(tokens: list[int]) -> float:
        """Seconds until all of it is done: a GPU still works when `eval` returns."""
        start = time.perf_counter()
        if tokens:
            llama.eval(tokens)
        llama_synchronize(llama.ctx)
        return time.perf_counter() - start

    def truncate(n_tokens: int) -> None:
        llama._ctx.kv_cache_seq_rm(0, n_tokens, -1)
        llama.n_tokens = n_tokens

    def n_cells() -> float:
        """Cells per head, on average: of layers that are not budgeted, the sequence's."""
        if run.ratio is None:
            return llama.n_tokens
        used = runtime.usage(llama).used
        return float(used[used >= 0].mean())

    def commit_seconds() -> float:
        return runtime.usage(llama).commit_ms / 1000.0 if run.ratio is not None else 0.0

    evaluate(tokens[:1])  # the first computation allocates
    llama.reset()
    llama._ctx.kv_cache_clear()

    n_end = min(4 * run.n_ubatch, run.depth)
    before, first = (run.depth - n_end, run.depth) if run.cells is None else run.cells
    committed = [commit_seconds()]

    near = evaluate(tokens[:before])
    end, cells_end = 0.0, []
    for i in range(0, n_end, run.n_ubatch):
        n = min(run.n_ubatch, n_end - i)
        if run.cells is not None:
            truncate(before)
        end += evaluate(tokens[llama.n_tokens : llama.n_tokens + n])
        cells_end.append(n_cells() - n)
    if run.cells is not None:
        truncate(min(first, llama.n_tokens))
        evaluate(tokens[llama.n_tokens : first])
    committed.append(commit_seconds())

    times, cells = [], []
    for _ in range(run.n_gen):
        times.append(evaluate([tokens[llama.n_tokens]]))
        cells.append(n_cells())
    committed.append(commit_seconds())

    return {
        "kv_bytes": runtime.memory_size(llama),
        "prefill_tps": (before + n_end) / (near + end),
        "prefill_end_tps": n_end / end,
        "decode_tps": run.n_gen / sum(times),
        "token_ms": 1000.0 * float(np.quantile(times, 0.99)),
        "token_times_ms": [1000.0 * seconds for seconds in times],
        "cells": [round(np.mean(cells_end)), max(1, round(np.mean(cells) - run.n_gen / 2))],
        "commit_share_prefill": (committed[1] - committed[0]) / (near + end),
        "commit_share_decode": (committed[2] - committed[1]) / sum(times),
        "peak_rss": peak_rss(),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Run(**json.loads(sys.argv[1])))))
    except (LukvError, ValueError) as error:
        sys.exit(f"error: {error}")
