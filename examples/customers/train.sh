#!/usr/bin/env bash
# Train the four demo adapters, and compare their files with the shipped ones:
#
#     examples/customers/train.sh [OUT]          (default runs/adapters)
#
# Seeds, steps and everything else that decides the result stand here. On one kind of machine the same files come out;
# on another, floating-point sums are rounded in another order (serving/demo/adapters/README.md has the measured spread).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/adapters}
export OMP_NUM_THREADS=2 # the number of threads decides the order of sums

train() {
  .venv/bin/vblora train --model demo --dtype float32 \
    --data "examples/customers/$1.train.jsonl" --eval-data "examples/customers/$1.heldout.jsonl" \
    --out "$out/$1" --seed "$2" --max-steps "$3" --batch-size 8 --logits-lr 1e-2 --bank-lr 5e-3 \
    --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj \
    --r 4 --num-vectors 256 --vector-length 128 --topk 2 --save-only-topk-weights
}
train lanternlane 0 200
train quillstone 1 150
train saltspoke 2 150
train tallywire 3 150

different=0
for name in lanternlane quillstone saltspoke tallywire; do
  for file in adapter_config.json adapter_model.safetensors training.json; do
    if cmp -s "$out/$name/$file" "serving/demo/adapters/$name/$file"; then
      echo "same as shipped: $name/$file"
    else
      echo "differs from the shipped: $name/$file"
      different=1
    fi
  done
done
exit "$different"
