#!/usr/bin/env bash
# Set up what is missing, then run the whole test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
.venv/bin/python scripts/fetch_model.py smollm2 >/dev/null
exec .venv/bin/python -m pytest "$@"
