"""Run kvpress's LUKVPress with a curve from `lukv-gguf export-curve`, and compare what it keeps with the curve.

kvpress needs an environment of its own:

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5 gguf==0.19.0
    kvpress-env/bin/python scripts/kvpress_curve.py CURVE.npy MODEL.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from kvpress import KeyDiffPress, LUKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = Path(__file__).parent / "data" / "document.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", type=Path)
    parser.add_argument("model", type=Path, help="the GGUF file that the curve was made for, with the metric keydiff")
    parser.add_argument("--pruned", type=float, default=0.8, help="share of the cache to evict")
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=16)
    arguments = parser.parse_args()

    source = {"pretrained_model_name_or_path": str(arguments.model.parent), "gguf_file": arguments.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokens = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :1000]

    press = LUKVPress(KeyDiffPress(), compression_ratio=arguments.pruned, sink=arguments.sink, window=arguments.window)
    press._budget_curves = np.load(arguments.curve)  # it would otherwise fetch one of its own models' curves
    expected = (1 - press._budget_curves[round(arguments.pruned * 100) - 1]) * tokens.shape[1]
    with torch.inference_mode(), press(model):
        model(tokens)
    kept = np.full_like(expected, tokens.shape[1])
    for i, layer in enumerate(model.model.layers):
        masked = layer.self_attn.masked_key_indices
        if masked is not None:
            np.subtract.at(kept[i], masked[1].numpy(), 1)
    print(f"{tokens.shape[1]} tokens, {kept.mean() / tokens.shape[1]:.3f} kept of {1 - arguments.pruned:.3f}")
    print(f"fewest and most of a head: {kept.min():.0f}, {kept.max():.0f}")
    print(f"largest distance from the curve: {np.abs(kept - expected).max():.2f} tokens")
    if np.abs(kept - expected).max() > 1.0:  # it rounds to whole tokens, and keeps one at least
        raise SystemExit("LUKVPress did not keep what the curve says")


if __name__ == "__main__":
    main()
