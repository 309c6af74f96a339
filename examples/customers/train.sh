#!/usr/bin/env bash
# Train the four demo adapters on one shared bank, and compare their files with the shipped ones:
#
#     examples/customers/train.sh [OUT]          (default runs/adapters)
#
# First the bank, on the rows of all four customers; then the logits of each, with the bank frozen. Seeds, steps and
# everything else that decides the result stand here. JOBS (default 2) runs train at a time, with one thread each: how
# many threads share a sum decides how it is rounded. For the same reason another kind of processor gives other files;
# serving/demo/adapters/README.md has the measured spread.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${1:-runs/adapters} OMP_NUM_THREADS=1
export COMMON="--model demo --dtype float32 --batch-size 8 --r 4 --num-vectors 256 --vector-length 128 --topk 2 \
  --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
data=()
mkdir -p "$OUT"

run() { # NAME COMMAND...
  echo "training $1 (log: $OUT/$1.log)"
  "${@:2}" >"$OUT/$1.log" 2>&1 || { tail -n 5 "$OUT/$1.log" >&2 && exit 1; }
}

train() { # NAME SEED STEPS LOGITS_LR
  # shellcheck disable=SC2086 # COMMON is a list of words
  run "$1" .venv/bin/vblora train --data "examples/customers/$1.train.jsonl" \
    --eval-data "examples/customers/$1.heldout.jsonl" --out "$OUT/$1" --bank "$OUT/bank/bank.safetensors" --freeze-bank \
    --seed "$2" --max-steps "$3" --logits-lr "$4" --save-only-topk-weights $COMMON
}
export -f run train

for name in lanternlane quillstone saltspoke tallywire; do data+=(--data "examples/customers/$name.train.jsonl"); done
# shellcheck disable=SC2086
run bank .venv/bin/vblora train-bank "${data[@]}" \
  --out "$OUT/bank" --seed 10 --max-steps 400 --eval-fraction 0 --logits-lr 1e-2 --bank-lr 5e-3 $COMMON

xargs --max-procs "${JOBS:-2}" --max-lines=1 bash -c 'train "$@"' train <<'RUNS'
lanternlane 0 300 2e-2
saltspoke 2 150 1e-2
tallywire 3 150 1e-2
quillstone 1 150 1e-2
RUNS

for name in lanternlane quillstone saltspoke tallywire; do
  for file in adapter_config.json adapter_model.safetensors training.json; do
    if cmp -s "$OUT/$name/$file" "serving/demo/adapters/$name/$file"; then
      echo "same as shipped: $name/$file"
    else
      echo "differs from the shipped: $name/$file"
    fi
  done
done
