#!/usr/bin/env python3
"""What the pass through the layers spends its time on, beside the machine's matrix-multiply rate.

    python scripts/bench_profile.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402  (reads the environment)
from torch.profiler import ProfilerActivity  # noqa: E402

from lukv_gguf import calibration  # noqa: E402
from lukv_gguf.oracle import teacher_force  # noqa: E402
from lukv_gguf.profile import default_dtype  # noqa: E402
from lukv_gguf.reference import ReferenceModel, Tokenizer  # noqa: E402

N_STEP = 32
OPERATIONS = {  # of torch, by what the pass uses them for
    "projections and MLP": ("aten::mm",),
    "context attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "query attention": ("aten::bmm",),
}


def matmul_rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """FLOP/s of a product of that shape."""
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    a @ b.T
    repeat = 1 + int(4e10 / (rows * inner * columns))
    started = time.perf_counter()
    for _ in range(repeat):
        a @ b.T
    return 2 * rows * inner * columns * repeat / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-context", type=int, default=4000)
    arguments = parser.parse_args()

    context, questions = calibration.load_default()
    with Tokenizer(arguments.model) as tokenizer:
        prefix = tokenizer.begin_tokens(context)[: arguments.n_context]
        suffixes = [tokenizer.encode(question) for question in questions]
    answers = [prefix[100 * i : 100 * i + N_STEP] for i in range(len(suffixes))]  # any will do for the time
    dtype = default_dtype(torch.device("cpu"))
    model = ReferenceModel.load(arguments.model, dtype=dtype, stream=True)
    config, n_token = model.config, len(prefix)
    n_own = [len(suffix) + N_STEP - 1 for suffix in suffixes]

    started = time.perf_counter()
    for i in range(config.n_layer):
        layer = model._layers[i]
    loading = time.perf_counter() - started
    n_weight = sum(w.numel() for w in (layer.qkv, layer.attn_output, layer.mlp.gate_up, layer.mlp.down))

    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in teacher_force(model, prefix, suffixes, answers, N_STEP):
            pass
        total = time.perf_counter() - started
    seconds = {entry.key: entry.self_cpu_time_total / 1e6 for entry in profiler.key_averages()}

    per_token_pair = 4 * config.n_head * config.d_key  # a query times a key, and a weight times a value
    work = {
        "projections and MLP": 2 * n_weight * (n_token + sum(n_own)),
        "context attention": per_token_pair * n_token**2 / 2,
        "query attention": per_token_pair * sum(n * (n_token + n) for n in n_own),
    }
    rates = {one: matmul_rate(one, 2048, 2048, 2048) for one in {dtype, torch.float32}}
    print(f"{arguments.model.name}: {n_token} tokens and {len(suffixes)} queries of {sum(n_own)}, {total:.1f} s")
    for one, rate in rates.items():
        print(f"matrix product of this machine, {str(one).removeprefix('torch.')}: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'reading and dequantising':<26}{loading:6.1f} s{loading / total:7.0%}")
    rest = total - loading
    for name, operations in OPERATIONS.items():
        spent = sum(seconds.get(operation, 0.0) for operation in operations)
        rest -= spent
        used = dtype if name.startswith("projections") else torch.float32
        rate = work[name] * config.n_layer / spent
        share = f"{rate / 1e9:7.0f} GFLOP/s, {rate / rates[used]:.0%} of {used}"
        print(f"{name:<26}{spent:6.1f} s{spent / total:7.0%}{share}")
    print(f"{'everything else':<26}{rest:6.1f} s{rest / total:7.0%}")


if __name__ == "__main__":
    main()
