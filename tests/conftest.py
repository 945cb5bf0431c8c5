"""Fixtures: the real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    if "LUKV_TEST_MODEL" in os.environ:
        return Path(os.environ["LUKV_TEST_MODEL"])
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_model.py"), "smollm2"]
    return Path(subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip())
