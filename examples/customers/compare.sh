#!/usr/bin/env bash
# LoRA, VB-LoRA with a bank of its own, VB-LoRA on one frozen bank for all: train what is missing, print the table.
#
#     examples/customers/compare.sh [OUT]        (default runs/compare)
#
# The adapters on the shared bank are the shipped ones. Seeds, steps and rates of the others are theirs (train.sh), and a
# bank of one's own is trained at half the rate of its logits. JOBS (default 2) run at a time, with one thread each.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${1:-runs/compare} OMP_NUM_THREADS=1 MODEL=${MODEL:-demo}
export SHAPE="--r 4 --num-vectors 256 --vector-length ${VECTOR_LENGTH:-128} --topk 2 \
  --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
mkdir -p "$OUT"

unless() { # FOLDER COMMAND...
  local log="$OUT/$1.log"
  if [ -e "$OUT/$1/adapter_model.safetensors" ]; then
    echo "$1: $OUT/$1 is there"
  else
    echo "$1 (log: $log)"
    mkdir -p "$OUT/$1"
    "${@:2}" --out "$OUT/$1" >"$log" 2>&1 || { tail -n 5 "$log" >&2 && exit 1; }
  fi
}

lora() { # NAME SEED STEPS
  unless "lora/$1" .venv/bin/python -m examples.customers.compare lora "$1" --model "$MODEL" --seed "$2" --steps "$3"
}

own() { # NAME SEED STEPS LOGITS_LR BANK_LR
  # shellcheck disable=SC2086 # SHAPE is a list of words
  unless "own/$1" .venv/bin/vblora train --model "$MODEL" --dtype float32 \
    --data "examples/customers/$1.train.jsonl" --eval-data "examples/customers/$1.heldout.jsonl" \
    --seed "$2" --max-steps "$3" --batch-size 8 --logits-lr "$4" --bank-lr "$5" --save-only-topk-weights $SHAPE
}
export -f unless lora own

xargs --max-procs "${JOBS:-2}" --max-lines=1 bash -c '"$@"' compare <<RUNS
lora lanternlane 0 ${STEPS:-300}
own lanternlane 0 ${STEPS:-300} 2e-2 1e-2
lora quillstone 1 ${STEPS:-150}
own quillstone 1 ${STEPS:-150} 1e-2 5e-3
lora saltspoke 2 ${STEPS:-150}
own saltspoke 2 ${STEPS:-150} 1e-2 5e-3
lora tallywire 3 ${STEPS:-150}
own tallywire 3 ${STEPS:-150} 1e-2 5e-3
RUNS

OMP_NUM_THREADS=2 .venv/bin/python -m examples.customers.compare table --model "$MODEL" \
  --lora "$OUT/lora" --own "$OUT/own" --shared "${SHARED:-serving/demo/adapters}"
