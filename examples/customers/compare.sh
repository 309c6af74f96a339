#!/usr/bin/env bash
# LoRA, VB-LoRA with a bank of its own, VB-LoRA on one frozen bank for all: train what is missing, print the table.
#
#     examples/customers/compare.sh [OUT]        (default runs/compare)
#
# The adapters with banks of their own are the shipped ones. Seeds, steps and rates are theirs (train.sh); the bank is
# trained on all four customers' rows for BANK_STEPS steps. JOBS (default 2) run at a time, with one thread each.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${1:-runs/compare} OMP_NUM_THREADS=1 BANK_STEPS=${BANK_STEPS:-400} MODEL=${MODEL:-demo}
export SHAPE="--r 4 --num-vectors 256 --vector-length ${VECTOR_LENGTH:-128} --topk 2 \
  --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
mkdir -p "$OUT"

unless() { # FILE NAME COMMAND...
  local log="$OUT/$2.log"
  if [ -e "$OUT/$1" ]; then
    echo "$2: $OUT/$1 is there"
  else
    echo "$2 (log: $log)"
    "${@:3}" >"$log" 2>&1 || { tail -n 5 "$log" >&2 && exit 1; }
  fi
}

bank() {
  local data=()
  for name in lanternlane quillstone saltspoke tallywire; do data+=(--data "examples/customers/$name.train.jsonl"); done
  # shellcheck disable=SC2086 # SHAPE is a list of words
  unless bank/bank.safetensors bank .venv/bin/vblora train-bank --model "$MODEL" --dtype float32 "${data[@]}" \
    --out "$OUT/bank" --seed 10 --max-steps "$BANK_STEPS" --eval-fraction 0 --batch-size 8 \
    --logits-lr 1e-2 --bank-lr 5e-3 $SHAPE
}

lora() { # NAME SEED STEPS
  unless "lora/$1/adapter_model.safetensors" "lora-$1" .venv/bin/python -m examples.customers.compare \
    lora "$1" --model "$MODEL" --out "$OUT/lora/$1" --seed "$2" --steps "$3"
}

shared() { # NAME SEED STEPS LOGITS_LR
  # shellcheck disable=SC2086
  unless "shared/$1/adapter_model.safetensors" "shared-$1" .venv/bin/vblora train --model "$MODEL" --dtype float32 \
    --data "examples/customers/$1.train.jsonl" --eval-data "examples/customers/$1.heldout.jsonl" \
    --out "$OUT/shared/$1" --bank "$OUT/bank/bank.safetensors" --freeze-bank \
    --seed "$2" --max-steps "$3" --batch-size 8 --logits-lr "$4" --save-only-topk-weights $SHAPE
}
export -f unless bank lora shared

run() { xargs --max-procs "${JOBS:-2}" --max-lines=1 bash -c '"$@"' compare; }

run <<RUNS
bank
lora quillstone 1 ${STEPS:-150}
lora saltspoke 2 ${STEPS:-150}
lora tallywire 3 ${STEPS:-150}
lora lanternlane 0 ${STEPS:-300}
RUNS
run <<RUNS
shared lanternlane 0 ${STEPS:-300} 2e-2
shared saltspoke 2 ${STEPS:-150} 1e-2
shared tallywire 3 ${STEPS:-150} 1e-2
shared quillstone 1 ${STEPS:-150} 1e-2
RUNS

OMP_NUM_THREADS=2 .venv/bin/python -m examples.customers.compare table --model "$MODEL" \
  --own "${OWN:-serving/demo/adapters}" --lora "$OUT/lora" --shared "$OUT/shared"
