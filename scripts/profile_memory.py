"""Write a random 8B-shaped Q4_0 model, profile it, and say how much memory each stage took (Linux).

    python scripts/profile_memory.py --folder FOLDER [--limit GIB] [options of lukv-gguf profile]

Two figures a stage: memory of the process's own, and all that is resident, mapped pages of the model file included. With
--limit the kernel enforces one (a memory cgroup, so it needs root): file pages in the system's cache count there, too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

N_LAYER, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, D_HEAD, N_VOCAB = 32, 4096, 14336, 32, 8, 128, 128256
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def random_q4_0(rng: np.random.Generator, n_out: int, n_in: int, spread: float) -> np.ndarray:
    """Bytes of a random matrix whose entries have the standard deviation `spread`."""
    blocks = rng.integers(0, 256, (n_out, n_in // 32, 18), dtype=np.uint8)
    scale = np.array(spread / 4.61, np.float16)  # of the 16 levels -8 … 7
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(n_out, -1)


def write_model(path: Path) -> None:
    """A llama of 8.0 · 10⁹ weights. All layers have the same ones: memory and time do not depend on that."""
    rng = np.random.default_rng(0)
    kv_width = N_HEAD_KV * D_HEAD
    shapes = {
        "attn_q": (N_EMBD, N_EMBD),
        "attn_k": (kv_width, N_EMBD),
        "attn_v": (kv_width, N_EMBD),
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_gate": (N_FF, N_EMBD),
        "ffn_up": (N_FF, N_EMBD),
        "ffn_down": (N_EMBD, N_FF),
    }
    layer = {name: random_q4_0(rng, n_out, n_in, n_in**-0.5) for name, (n_out, n_in) in shapes.items()}
    embedding = random_q4_0(rng, N_VOCAB, N_EMBD, 1.0)
    ones = np.ones(N_EMBD, np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 8B")
    writer.add_context_length(8192)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_vocab_size(N_VOCAB)
    kinds = gguf.TokenType
    n_word = N_VOCAB - 259
    writer.add_tokenizer_model("llama")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, "\u2581", *(f"w{i}" for i in range(1, n_word))])
    writer.add_token_scores([0.0] * N_VOCAB)
    special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_token_types([*special, *[kinds.BYTE] * 256, *[kinds.NORMAL] * n_word])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", embedding, raw_dtype=Q4_0)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, matrix in layer.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix, raw_dtype=Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def status(pid: int) -> dict[str, int]:
    """Bytes of memory of a process, by the names of /proc."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}


class Limit:
    """A memory cgroup, version 1 or 2. Processes that join it get no more than `n_byte` together, or are killed."""

    def __init__(self, n_byte: int) -> None:
        root = Path("/sys/fs/cgroup")
        version_1 = (root / "memory").is_dir()
        self._folder = (root / "memory" if version_1 else root) / "lukv-profile-memory"
        self._folder.mkdir(exist_ok=True)
        (self._folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(n_byte))
        self._peak = self._folder / ("memory.max_usage_in_bytes" if version_1 else "memory.peak")

    def join(self) -> None:
        """Put this process into it."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> int:
        """Remove it, and return the most bytes that were in use."""
        peak = int(self._peak.read_text())
        self._folder.rmdir()
        return peak


def drop_cached_pages(path: Path) -> None:
    """Pages that are in the system's cache already would not count for a new process."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lukv-8b", help="5 GB of room")
    parser.add_argument("--limit", type=float, metavar="GIB", help="memory that the kernel grants")
    arguments, options = parser.parse_known_args()
    limit = Limit(int(arguments.limit * 2**30)) if arguments.limit else None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = arguments.folder / "random-8b-q4_0.gguf"
    if not model.exists():
        write_model(model.with_suffix(".tmp"))
        model.with_suffix(".tmp").rename(model)

    drop_cached_pages(model)
    output = arguments.folder / "profile.npz"
    partial = output.with_name(output.name + ".partial")
    started = time.monotonic()
    command = [sys.executable, "-m", "lukv_gguf.cli", "profile", str(model), "-o", str(output), "-f", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=limit and limit.join)
    peaks: dict[str, list[float]] = {}
    stage = "answers"
    while process.poll() is None:
        now = status(process.pid)
        if (partial / "answers.json").exists():
            stage = "layers"
        own, resident, last = peaks.setdefault(stage, [0, 0, 0])
        peaks[stage] = [max(own, now.get("RssAnon", 0)), max(resident, now.get("VmRSS", 0)), time.monotonic() - started]
        time.sleep(0.1)
    print(f"{model.stat().st_size / 2**30:.2f} GiB on the disk, {time.monotonic() - started:.0f} s")
    for stage, (own, resident, until) in peaks.items():
        print(f"{stage} until {until:.0f} s: {own / 2**30:.2f} GiB of its own, {resident / 2**30:.2f} GiB resident")
    if limit is not None:
        print(f"{limit.close() / 2**30:.2f} GiB at most in the cgroup, cached pages of files included")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
