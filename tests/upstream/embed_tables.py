"""Embed uneven budgets into the models that llama.cpp's tests generate, and into a random one with words.

    python embed_tables.py FOLDER OUTPUT

OUTPUT gets all/*.gguf, those of the architectures that run with budgets, few/*.gguf, some of them, and plain.gguf and
lukv.gguf.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_native import metadata, uneven_budget  # noqa: E402
from tiny_gguf import ARCHITECTURES, write_tiny  # noqa: E402

from lukv_gguf.gguf_header import read_header  # noqa: E402
from lukv_gguf.metadata import embed, model_shape  # noqa: E402

RATIO = 0.5
FEW = ("llama-dense", "gemma3-dense", "qwen3moe-moe")  # plain, with sliding windows, with experts


def embed_budgets(source: Path, target: Path) -> None:
    n_layer, n_head_kv = model_shape(read_header(source))
    embed(source, target, metadata(uneven_budget(n_layer, n_head_kv, RATIO), RATIO))


def main() -> None:
    folder, output = map(Path, sys.argv[1:])
    for name in ("all", "few"):
        shutil.rmtree(output / name, ignore_errors=True)
        (output / name).mkdir(parents=True)
    generated = sorted(folder.glob("*.gguf"))
    chosen = [path for path in generated if read_header(path).value("general.architecture") in ARCHITECTURES]
    for source in chosen:
        embed_budgets(source, output / "all" / source.name)
        if source.stem in FEW:
            (output / "few" / source.name).symlink_to(output / "all" / source.name)
    print(f"{len(chosen)} models have a table: {', '.join(path.stem for path in chosen)}")
    write_tiny(output / "plain.gguf", n_layer=3, d_head=64, n_ctx=2048)
    embed_budgets(output / "plain.gguf", output / "lukv.gguf")
    sys.exit(len(list((output / "few").iterdir())) != len(FEW))


if __name__ == "__main__":
    main()
