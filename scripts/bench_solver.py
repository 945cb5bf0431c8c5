#!/usr/bin/env python3
"""Time the solver alone: PAVA and the greedy allocation of all ratios, on one core."""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from lukv_gguf.allocation import concave_envelope, greedy_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--ratios", type=int, default=99)
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    falling = rng.lognormal(0.0, 1.0, (args.heads, 1)) / np.arange(1, args.positions + 1)
    gains = falling * rng.lognormal(0.0, 1.5, falling.shape)
    ratios = np.arange(1, args.ratios + 1) / (args.ratios + 1)
    totals = np.rint(ratios * gains.size).astype(np.int64)

    start = time.perf_counter()
    counts = greedy_counts(concave_envelope(gains), totals)
    seconds = time.perf_counter() - start
    exact = bool((counts.sum(axis=1) == totals).all())
    print(
        f"{args.heads} heads x {args.positions} positions x {args.ratios} ratios: "
        f"{seconds:.2f} s on one core, sums exact: {exact}"
    )


if __name__ == "__main__":
    main()
