#!/usr/bin/env bash
# Training and ranking of the full-size network on one GPU, in under 8 minutes; the last part to be cut off is ranking.
#   bash benchmarks/gpu_training.sh > gpu.jsonl          # what is printed beside the JSON lines goes to stderr
# Options go to benchmarks/gpu_training.py: --tiny tries it on any machine, --only training runs a part.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec timeout 470 "${PYTHON:-python3}" benchmarks/gpu_training.py "$@"
