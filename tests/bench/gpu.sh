#!/usr/bin/env bash
# Everything that needs a GPU, in chunks of less than ten minutes: tests/bench/gpu.sh FOLDER [CHUNK ...]
# Results and logs go to FOLDER. Without chunks it runs them all, one after the other; status.txt says how each ended.
# It needs torch (2.11 or newer), transformers (5.17 or newer) and pytest; `openuni` also diffusers, `teachers` all that
# `make env` installs, and the hub. From the project's root.
set -u
results=${1:?usage: tests/bench/gpu.sh FOLDER [CHUNK ...]}
shift
mkdir -p "$results"
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')
stamp="${gpu}_$(date +%F)"

tests() { "$python" -m pytest -q -p no:cacheprovider -m gpu "$@"; }
step() {  # family, preset, further words
    "$python" -m tests.bench.step --family "$1" --preset "$2" --recipe both --device cuda "${@:3}" \
        | tee "$results/step_recipes_$2_$stamp.json"
}

attention() { tests tests/test_attention_gpu.py; }
steps() { tests tests/test_sync.py tests/test_compiled.py; }
harmon() { step harmon harmon_1_5b; }
showo() { step showo showo_512; }
openuni() { step openuni openuni_b_512; }
middle() { for family in harmon showo openuni; do step "$family" 100m || return; done; }
teachers() {
    tests tests/test_teachers.py || return
    # Pictures and grid are those of a labelling job: 640 pixels, 32 x 32 points.
    "$python" -m tests.bench.teachers --device cuda --images 16 --side 640 --points-per-side 32 --repetitions 3 \
        --points-per-batch 128 --threads 4 --depth depth-anything/Depth-Anything-V2-Large-hf \
        --sam facebook/sam-vit-huge --sam2 facebook/sam2.1-hiera-large \
        | tail -n 1 | tee "$results/teachers_large_$stamp.json"
}

failed=0
for chunk in "${@:-attention steps harmon middle showo openuni teachers}"; do
    for name in $chunk; do
        began=$SECONDS
        ("$name") > "$results/$name.log" 2>&1
        status=$?
        echo "$name: status $status, $((SECONDS - began)) s" | tee -a "$results/status.txt"
        [ "$status" = 0 ] || { failed=1; tail -n 20 "$results/$name.log"; }
    done
done
exit $failed
