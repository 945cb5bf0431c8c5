"""The ggml ops on heads with cells of their own, on every backend of the build, against double precision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest

SOURCE = Path(__file__).parent / "native" / "test-ragged-ops.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = Path(llama_cpp.__file__).parent
    path = tmp_path_factory.mktemp("ops") / "test-ragged-ops"
    compiler = shutil.which("c++")
    assert compiler is not None
    libraries = ["-lggml", "-lggml-base", f"-Wl,-rpath,{package / 'lib'}"]
    command = [compiler, "-std=c++17", "-O1", f"-I{package / 'include'}", str(SOURCE), f"-L{package / 'lib'}", *libraries]
    subprocess.run([*command, "-o", str(path)], check=True)
    return path


def test_ops_agree_with_double_precision(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU: " in done.stdout and " 0 failed" in done.stdout
