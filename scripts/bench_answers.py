#!/usr/bin/env python3
"""Where the time goes while llama.cpp answers the calibration questions: wall and processor seconds.

    python scripts/bench_answers.py MODEL.gguf [--n-context N]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from lukv_gguf import answers, calibration, defaults  # noqa: E402
from lukv_gguf.reference import Tokenizer  # noqa: E402
from lukv_gguf.reference.gguf_file import GGUFFile  # noqa: E402


class Watch:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-context", type=int, default=defaults.N_CONTEXT)
    arguments = parser.parse_args()

    context, questions = calibration.load_default()
    with Tokenizer(arguments.model) as tokenizer:
        prefix = tokenizer.begin_tokens(context)[: arguments.n_context]
        suffixes = [tokenizer.encode(question) for question in questions]
        end_tokens = tokenizer.end_tokens

    calls: list[tuple[int, float, float]] = []
    read = answers._Decoder.read

    def timed(self: answers._Decoder, tokens: Sequence[Any]) -> Any:
        watch = Watch()
        chosen = read(self, tokens)
        calls.append((len(tokens), *watch.read()))
        return chosen

    answers._Decoder.read = timed
    whole = Watch()
    answers.decode_answers(arguments.model, prefix, suffixes, defaults.K_MAX, end_tokens=end_tokens)
    total = whole.read()

    file = GGUFFile(arguments.model)
    shapes = [file.shape(name) for name, *_ in file.extents() if name.startswith("blk.")]
    n_weight = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    parts = {"context": calls[:1], "questions": calls[1:2], "answers": calls[2:]}
    print(f"{'':>10} {'tokens':>7} {'wall s':>8} {'CPU s':>8}  GFLOP of the weights' products per CPU s")
    for name, found in parts.items():
        n_token, wall, processor = (sum(values) for values in zip(*found))
        print(f"{name:>10} {n_token:7} {wall:8.1f} {processor:8.1f}  {2 * n_weight * n_token / processor / 1e9:.0f}")
    print(f"{'all':>10} {sum(n for n, *_ in calls):7} {total[0]:8.1f} {total[1]:8.1f}")


if __name__ == "__main__":
    main()
