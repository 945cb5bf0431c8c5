#!/usr/bin/env bash
# The full evaluation of a model: RULER's families and language modelling at several ratios, all allocations, both
# policies. It can be interrupted; the same command goes on. Further options go to `lukv-gguf eval`.
#
#     scripts/eval_all.sh MODEL.gguf FOLDER [--lengths 4096] [-n 8] [--n-gpu-layers 99] …
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: scripts/eval_all.sh MODEL.gguf FOLDER [options of lukv-gguf eval]" >&2
    exit 2
fi
model=$1 folder=$2
shift 2
export PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
exec lukv-gguf eval "$model" --suite ruler,lm --ratios 0.1,0.2,0.3,0.5 -o "$folder" "$@"
