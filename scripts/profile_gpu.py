"""Where the time of a model on an NVIDIA GPU goes: kernels, copies and gaps, for reading at a depth and for generating there.

    python scripts/profile_gpu.py MODEL.gguf --n-ctx 132096 --depth 131072 [--stock] [--kv-type q8_0]

Needs torch with CUDA: its profiler records what llama.cpp launches in the same process. The rates are measured before it
is switched on.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import llama_cpp
import torch
from gguf import GGMLQuantizationType
from llama_cpp import Llama

from lukv_gguf.calibration import load_default
from lukv_gguf.defaults import KV_TYPES


def short_name(kernel: str) -> str:
    """Name of a kernel without its arguments and template parameters."""
    name = re.sub(r"^void |\(anonymous namespace\)::", "", kernel)
    return re.split(r"[<(]", name, maxsplit=1)[0]


def record(work: Callable[[], None]) -> tuple[list[dict], float]:
    """Device events of the work (name, start and duration in microseconds), and its wall time in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver")
    return [event for event in events if event.get("cat") in kinds], wall * 1000.0


def report(title: str, events: list[dict], wall_ms: float, n_steps: int, step: str) -> None:
    device = sorted((e for e in events if not e["cat"].startswith("cuda")), key=lambda e: e["ts"])
    if not device:
        raise SystemExit("profile_gpu: error: the profiler saw nothing on the GPU")
    busy, end = 0.0, 0.0
    for event in device:
        busy += max(0.0, event["ts"] + event["dur"] - max(event["ts"], end))
        end = max(end, event["ts"] + event["dur"])

    groups: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in device:
        name = short_name(event["name"]) if event["cat"] == "kernel" else event["name"]
        groups[name][0] += 1
        groups[name][1] += event["dur"]
    calls: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event["cat"].startswith("cuda"):
            calls[event["name"]][0] += 1
            calls[event["name"]][1] += event["dur"]

    print(f"\n{title}: {wall_ms / n_steps:.3f} ms a {step} with the profiler, {busy / 1000 / n_steps:.3f} ms of it the GPU is busy")
    for what, table in (("on the device", groups), ("calls", calls)):
        print(f"  {what:<48} number/{step}   us/{step}")
        for name, (count, total) in sorted(table.items(), key=lambda item: -item[1][1])[:26]:
            print(f"  {name[:48]:<48} {count / n_steps:9.1f} {total / n_steps:12.1f}")


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--n-ctx", default=132096, show_default=True)
@click.option("--depth", default=131072, show_default=True, help="Tokens before generating.")
@click.option("--n-ubatch", default=512, show_default=True)
@click.option("--kv-type", type=click.Choice(KV_TYPES), default="f16", show_default=True)
@click.option("--stock", is_flag=True, help="Without LU-KV.")
@click.option("--verbose", is_flag=True, help="With llama.cpp's log, to the standard error.")
def main(model: Path, n_ctx: int, depth: int, n_ubatch: int, kv_type: str, stock: bool, verbose: bool) -> None:
    """Profile MODEL on the GPU."""
    n_gen, n_end = 128, 4 * n_ubatch
    if not torch.cuda.is_available():
        raise SystemExit("profile_gpu: error: torch finds no CUDA device")
    if depth < 3 * n_end or depth + 3 * n_gen > n_ctx:
        raise SystemExit(f"profile_gpu: error: the depth has to be {3 * n_end} to {n_ctx - 3 * n_gen} tokens")
    record(lambda: torch.zeros(1, device="cuda"))  # starting the profiler takes seconds

    kind = GGMLQuantizationType[kv_type.upper()].value
    llama = Llama(
        model_path=str(model), n_ctx=n_ctx, n_batch=max(n_ubatch, 512), n_ubatch=n_ubatch, n_gpu_layers=-1, flash_attn=True,
        type_k=kind, type_v=kind, kv_overrides={"lukv.enabled": False} if stock else None, verbose=verbose,
    )  # fmt: skip
    text = llama.tokenize(load_default()[0].encode())
    tokens = iter(text * ((depth + 3 * n_gen) // len(text) + 1))

    def read(n: int) -> None:
        llama.eval([next(tokens) for _ in range(n)])
        llama_cpp.llama_synchronize(llama.ctx)

    def generate(n: int) -> None:
        for _ in range(n):
            read(1)

    def timed(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    read(depth - 2 * n_end)
    seconds = timed(lambda: read(n_end))
    print(f"reading at {depth - n_end}: {n_end / seconds:.0f} tokens/s, {1000 * seconds * n_ubatch / n_end:.2f} ms a ubatch")
    report("reading", *record(lambda: read(n_end)), n_end // n_ubatch, "ubatch")

    generate(1)
    seconds = timed(lambda: generate(n_gen))
    print(f"\ngenerating at {depth}: {n_gen / seconds:.1f} tokens/s, {1000 * seconds / n_gen:.3f} ms a token")
    report("generating", *record(lambda: generate(n_gen)), n_gen, "token")
    llama_cpp.llama_perf_context_print(llama.ctx)


if __name__ == "__main__":
    main()
