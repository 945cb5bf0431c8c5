"""llama.cpp's own tests that exercise memory pass with budgets per head; those that take seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "test_upstream.py"
TESTS = (
    "test-batch-alloc",
    "plain-state-restore-fragmented", "lukv-state-restore-fragmented",
    "lukv-thread-safety", "lukv-autorelease", "lukv-model-load-cancel",
    "lukv-save-load-state-few",
)  # fmt: skip


@pytest.mark.upstream
def test_memory_tests_of_llama_cpp() -> None:
    done = subprocess.run([sys.executable, SCRIPT, *TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r" (\S+) \.+ +Passed", done.stdout)
    assert passed and set(TESTS) <= set(passed)


def test_an_unknown_test_is_told() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "test-nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and "no test is called test-nonsense; there are:" in done.stderr
    assert "Traceback" not in done.stderr
