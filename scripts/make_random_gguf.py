"""Write a model of the llama architecture with random weights: for measurements of memory and speed, not of answers.

    python scripts/make_random_gguf.py OUT.gguf [--shape 8b] [--type q4_0] [--ratio 0.2 [--metric keydiff]]

With --ratio the file carries a LU-KV table whose budgets are as uneven as those of a real model: drawn from the measured
kept fractions of SmolLM2-135M at ratio 0.2.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import gguf
import numpy as np

from lukv_gguf import defaults, metadata, metrics
from lukv_gguf.errors import LukvError

# quantiles 0, 0.05, ... 1 of the budgets that `lukv-gguf embed` gives SmolLM2-135M with its defaults
QUANTILES = [0.0303, 0.0318, 0.0342, 0.0361, 0.0407, 0.0420, 0.0454, 0.0465, 0.0504, 0.0761, 0.0998,
             0.1134, 0.1344, 0.1815, 0.2184, 0.2895, 0.3810, 0.4454, 0.5747, 0.6828, 0.8347]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    d_head: int
    n_ff: int
    n_vocab: int


SHAPES = {
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128256),
    "small": Shape(8, 1024, 16, 4, 64, 2816, 32000),
}
TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "f16": gguf.GGMLQuantizationType.F16}


class RandomWeights:
    """Matrices of random numbers with the variance 1/n_in."""

    def __init__(self, kind: gguf.GGMLQuantizationType, seed: int = 0) -> None:
        self.kind = kind
        self.rng = np.random.default_rng(seed)

    def matrix(self, n_out: int, n_in: int) -> np.ndarray:
        """As stored: [n_out, bytes of a row] for Q4_0, else [n_out, n_in]."""
        if self.kind == gguf.GGMLQuantizationType.F16:
            return (self.rng.standard_normal((n_out, n_in), dtype=np.float32) / np.sqrt(n_in)).astype(np.float16)
        block = gguf.GGML_QUANT_SIZES[self.kind]
        n_block = n_out * n_in // block[0]
        data = np.frombuffer(self.rng.bytes(n_block * block[1]), dtype=np.uint8).reshape(n_block, block[1]).copy()
        scale = np.float16(1.0 / np.sqrt(n_in) / np.std(np.arange(16)))  # the 4 bit numbers are even
        data[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        return data.reshape(n_out, -1)


def random_budgets(n_layer: int, n_head_kv: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Budgets [L, H] with the mean `ratio`, distributed as those of a real model."""
    u = np.random.default_rng(seed).permutation(n_layer * n_head_kv) + 0.5
    budget = np.interp(u / u.size, np.linspace(0, 1, len(QUANTILES)), QUANTILES)
    for _ in range(100):
        budget = np.minimum(budget * ratio / budget.mean(), 1.0)
    return budget.reshape(n_layer, n_head_kv)


def write(path: Path, shape: Shape, kind: gguf.GGMLQuantizationType, n_ctx: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.d_head)
    writer.add_vocab_size(shape.n_vocab)

    # every byte is a token, so that any text can be read
    kinds = gguf.TokenType
    words = [f"w{i}" for i in range(shape.n_vocab - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    writer.add_token_scores([0.0] * shape.n_vocab)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    weights = RandomWeights(kind)
    small = {"output.weight": (shape.n_vocab, shape.n_embd), "token_embd.weight": (shape.n_vocab, shape.n_embd)}
    layer = {
        "attn_q": (shape.n_head * shape.d_head, shape.n_embd),
        "attn_k": (shape.n_head_kv * shape.d_head, shape.n_embd),
        "attn_v": (shape.n_head_kv * shape.d_head, shape.n_embd),
        "attn_output": (shape.n_embd, shape.n_head * shape.d_head),
        "ffn_gate": (shape.n_ff, shape.n_embd),
        "ffn_up": (shape.n_ff, shape.n_embd),
        "ffn_down": (shape.n_embd, shape.n_ff),
    }
    raw = None if kind == gguf.GGMLQuantizationType.F16 else kind
    for name, size in small.items():
        writer.add_tensor(name, weights.matrix(*size), raw_dtype=raw)
    matrices = {name: weights.matrix(*size) for name, size in layer.items()}  # the same in all layers: saves minutes
    for i in range(shape.n_layer):
        for name, matrix in matrices.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix, raw_dtype=raw)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape.n_embd, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="8b", show_default=True)
@click.option("--type", "kind", type=click.Choice(sorted(TYPES)), default="q4_0", show_default=True)
@click.option("--n-ctx", default=131072 + 4096, show_default=True, help="Context that the model claims to be made for.")
@click.option("--ratio", type=float, help="Add a LU-KV table for this kept fraction.")
@click.option("--metric", help=f"The metric of that table.  [default: {defaults.METRIC}]")
def main(out: Path, shape: str, kind: str, n_ctx: int, ratio: float | None, metric: str | None) -> None:
    """Write a random model to OUT."""
    chosen = SHAPES[shape]
    if ratio is None:
        if metric is not None:
            raise SystemExit("make_random_gguf: error: --metric is for a table: give --ratio, too")
        write(out, chosen, TYPES[kind], n_ctx)
        return
    try:
        ranking = metrics.parse(metric or defaults.METRIC)
        metrics.require_native(ranking)
        _ = ranking.weights_digest  # raises where it needs weights
        if "capacity" not in ranking.policies:
            raise LukvError(f"the table has the policy capacity, metric {ranking.name} works with {', '.join(ranking.policies)}")
        budget = random_budgets(chosen.n_layer, chosen.n_head_kv, ratio)
        table = metadata.LukvMetadata(
            ratio=ratio, metric=ranking.name, metric_params=ranking.params, sink=defaults.SINK, recent=defaults.RECENT,
            policy="capacity", budget=budget,
            profile_ratios=np.array([ratio]), profile_budget=budget[None], provenance={"source": "random"},
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            plain = Path(folder) / "plain.gguf"
            write(plain, chosen, TYPES[kind], n_ctx)
            metadata.embed(plain, out, table)
    except LukvError as error:
        raise SystemExit(f"make_random_gguf: error: {error}") from None


if __name__ == "__main__":
    main()
