#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then the speed of the teachers at published sizes.
# Results go to tests/bench/results/, or to $1. Run it from the root of the project, in its environment.
set -euo pipefail

results=${1:-tests/bench/results}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')
mkdir -p "$results"

python -m pytest -q -m gpu

# Pictures and grid are those of a labelling job: 640 pixels, 32 x 32 points.
python -m tests.bench.teachers --device cuda --images 16 --side 640 --points-per-side 32 --repetitions 3 \
    --points-per-batch 128 --threads 4 \
    --depth depth-anything/Depth-Anything-V2-Large-hf --sam facebook/sam-vit-huge --sam2 facebook/sam2.1-hiera-large \
    | tail -n 1 | tee "$results/teachers_large_${name}_$(date +%F).json"
