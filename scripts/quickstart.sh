#!/usr/bin/env bash
# From a fresh machine to a model that answers from 20 % of its KV cache: environment, patched llama.cpp, SmolLM2-135M,
# embedding, and the same questions with LU-KV off and on. A second run reuses what is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

model=$(python scripts/fetch_model.py smollm2)
embedded=models/$(basename "${model%.gguf}")-lukv.gguf
mkdir -p models

lukv-gguf embed "$model" --ratio 0.2 -o "$embedded"
echo
lukv-gguf inspect "$embedded"
echo
python scripts/demo.py "$embedded"
cat <<EOT

The model is $PWD/$embedded, the programs are in $PWD/.venv/bin.
Next:  source .venv/bin/activate
       llama-cli -m $embedded -c 8192
       lukv-gguf bench $embedded --n-ctx 8192 --depth 7000
EOT
