#!/usr/bin/env bash
# Train the four demo adapters, and compare their files with the shipped ones:
#
#     examples/customers/train.sh [OUT]          (default runs/adapters)
#
# Seeds, steps and everything else that decides the result stand here. JOBS (default 2) runs train at a time, with one
# thread each: how many threads share a sum decides how it is rounded. For the same reason another kind of processor
# gives other files; serving/demo/adapters/README.md has the measured spread.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${1:-runs/adapters} OMP_NUM_THREADS=1
mkdir -p "$OUT"

train() { # NAME SEED STEPS LOGITS_LR BANK_LR
  echo "training $1: seed $2, $3 steps (log: $OUT/$1.log)"
  .venv/bin/vblora train --model demo --dtype float32 \
    --data "examples/customers/$1.train.jsonl" --eval-data "examples/customers/$1.heldout.jsonl" \
    --out "$OUT/$1" --seed "$2" --max-steps "$3" --batch-size 8 --logits-lr "$4" --bank-lr "$5" \
    --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj \
    --r 4 --num-vectors 256 --vector-length 128 --topk 2 --save-only-topk-weights >"$OUT/$1.log" 2>&1 ||
    { tail -n 5 "$OUT/$1.log" >&2 && exit 1; }
}
export -f train

xargs --max-procs "${JOBS:-2}" --max-lines=1 bash -c 'train "$@"' train <<'RUNS'
lanternlane 0 300 2e-2 1e-2
quillstone 1 150 1e-2 5e-3
saltspoke 2 150 1e-2 5e-3
tallywire 3 150 1e-2 5e-3
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
