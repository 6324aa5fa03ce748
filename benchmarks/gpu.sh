#!/usr/bin/env bash
# Ranking and training of the full-size network on one GPU, in under 8 minutes; the last part to be cut off is training.
#   bash benchmarks/gpu.sh > gpu.jsonl          # what is printed beside the JSON lines goes to stderr
# --tiny tries it on any machine. Each part, benchmarks/gpu_ranking.py and gpu_training.py, has options of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/tests" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS
timeout 300 "${PYTHON:-python3}" benchmarks/gpu_ranking.py "$@" || echo "ranking ended with $?" >&2
exec timeout $((470 - SECONDS + started)) "${PYTHON:-python3}" benchmarks/gpu_training.py "$@"
