#!/usr/bin/env bash
# Track 1: train adapters of ViT-Tiny/16-224 (ImageNet-1k) without labels, on photos of 20 of its classes and of
# Caltech-101; evaluate them on photos of those 20 classes and of all 1000. EPOCHS is that of stage 2. Finished parts are
# not repeated, and an interrupted one is resumed.
#
#   recipes/vit_tiny/run.sh SHARED OUT      SHARED has weights/vit_tiny_patch16_224.safetensors and data/
set -euo pipefail
shared=$1 out=$2
weights=$shared/weights/vit_tiny_patch16_224.safetensors
photos=("$shared/data/in20/train" "$shared/data/caltech101/train")
learn=(--cache "$out/cache" --validation "$shared/data/in20/val,$shared/data/in1k-samples")
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# stage 1: scorers for two start blocks, on cached features
[ -d "$out/head" ] || patchlife fit vit_tiny_patch16_224 "${photos[@]}" --checkpoint "$weights" "${learn[@]}" \
  --out "$out/head"

# stage 2, from these scorers: a low-rank weight delta that follows the budget, on fresh views
[ -d "$out/adapter" ] || patchlife fit "$out/head" "${photos[@]}" --checkpoint "$weights" "${learn[@]}" --epochs 0 \
  --finetune adapter --finetune-epochs "${EPOCHS:-3}" --out "$out/adapter"

for model in head adapter; do
  for set in in1k-samples in20/val; do
    result=$out/$model-${set//\//-}.json
    [ -f "$result" ] || patchlife eval "$out/$model" "$shared/data/$set" --checkpoint "$weights" \
      --budgets 1.0,0.8,0.61,0.5,0.45,0.35 --modes fixed,adaptive --out "$result"
  done
done
python "$(dirname "$0")/summary.py" "$out"
