"""llama.cpp's own tests that exercise memory pass with budgets per head; those that take seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "test_upstream.py"
MODELS = {"llama-dense.gguf", "gemma3-dense.gguf", "qwen3moe-moe.gguf"}
TESTS = (
    "test-batch-alloc",
    "plain-state-restore-fragmented", "lukv-state-restore-fragmented",
    "lukv-thread-safety", "lukv-autorelease", "lukv-model-load-cancel",
)  # fmt: skip


@pytest.fixture(scope="module")
def output() -> str:
    """What the tests print, without colours."""
    command = [sys.executable, SCRIPT, "--verbose", *TESTS, "lukv-save-load-state-few"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)


@pytest.mark.upstream
def test_memory_tests_of_llama_cpp(output: str) -> None:
    assert set(TESTS) <= set(re.findall(r" (\S+) \.+ +Passed", output)), output


@pytest.mark.upstream
def test_states_are_saved_and_restored(output: str) -> None:
    """By the table that test-save-load-state prints: a line for each model, a column for each way."""
    header = re.search(r"^\d+: Model +(baseline .*)$", output, re.M)
    assert header, output
    rows = {model: results.split() for model, results in re.findall(r"^\d+: (\S+\.gguf) +(.*)$", output, re.M)}
    assert rows.keys() == MODELS
    for model, results in rows.items():
        failed = {column for column, result in zip(header[1].split(), results, strict=True) if result != "PASS"}
        assert not failed, f"{model}: {failed}"


def test_an_unknown_test_is_told() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "test-nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and "no test is called test-nonsense; there are:" in done.stderr
    assert "Traceback" not in done.stderr
