#!/usr/bin/env bash
# ViT-Tiny/16-224 without its classifier, an embedding of 192 numbers: train adapters without labels, and measure the
# embeddings by their cosine to the dense ones and by nearest neighbours. Finished parts are not repeated.
#
#   recipes/headless_vit_tiny/run.sh SHARED OUT [PHOTOS]
#
# SHARED has weights/vit_tiny_patch16_224.safetensors and data/in20; PHOTOS: to train on, drawn at random (default 4000).
set -euo pipefail
shared=$1 out=$2 photos=${3:-4000}
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"
weights=$out/headless.safetensors
[ -f "$weights" ] || python "$(dirname "$0")/headless.py" "$shared/weights/vit_tiny_patch16_224.safetensors" "$weights"
of_model=(--checkpoint "$weights")
learn=("$shared/data/in20/train" "${of_model[@]}" --photos "$photos")

# stage 1: the scorer only
[ -d "$out/head" ] || patchlife fit vit_tiny_patch16_224 "${learn[@]}" \
  --model-args num_classes=0 --out "$out/head"

# stage 2, from that scorer: a low-rank weight delta, from the output alone and from output and patches
for weight in 0 0.5; do
  [ -d "$out/adapter-$weight" ] || patchlife fit "$out/head" "${learn[@]}" --epochs 0 --finetune adapter \
    --patch-weight "$weight" --out "$out/adapter-$weight"
done

settings=(--budgets 0.8,0.61,0.45,0.35)
result=$out/untrained.json
[ -f "$result" ] || patchlife eval vit_tiny_patch16_224 "$shared/data/in20/val" "${of_model[@]}" \
  --model-args num_classes=0 "${settings[@]}" --out "$result"
for model in head adapter-0 adapter-0.5; do
  result=$out/$model.json
  [ -f "$result" ] || patchlife eval "$out/$model" "$shared/data/in20/val" "${of_model[@]}" "${settings[@]}" \
    --modes fixed,adaptive --out "$result"
done
python "$(dirname "$0")/summary.py" "$out"
