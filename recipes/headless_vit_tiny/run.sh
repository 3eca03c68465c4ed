#!/usr/bin/env bash
# ViT-Tiny/16-224 without its classifier, an embedding of 192 numbers: train adapters without labels, and measure the
# embeddings by their cosine to the dense ones and by nearest neighbours. Finished parts are not repeated.
#
#   recipes/headless_vit_tiny/run.sh SHARED OUT [PHOTOS [EVERY [EPOCHS]]]
#
# SHARED has weights/vit_tiny_patch16_224.safetensors and data/in20; PHOTOS: to train on, drawn at random (default 4000);
# every EVERY-th photo of in20/val is measured (default 1); EPOCHS: of stage 2 (default 3).
set -euo pipefail
shared=$1 out=$2 photos=${3:-4000} every=${4:-1} epochs=${5:-3}
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"
weights=$out/headless.safetensors
[ -f "$weights" ] || python "$(dirname "$0")/headless.py" "$shared/weights/vit_tiny_patch16_224.safetensors" "$weights"
of_model=(--checkpoint "$weights")
learn=("$shared/data/in20/train" "${of_model[@]}" --photos "$photos")

# stage 1: the scorer only
[ -d "$out/head" ] || patchlife fit vit_tiny_patch16_224 "${learn[@]}" --cache "$out/cache" --out "$out/head" \
  --model-args num_classes=0

# stage 2, from that scorer: a low-rank weight delta, which distils the output alone, or the patches too
# (cached views, of which the committed results are)
[ -d "$out/adapter-0" ] || patchlife fit "$out/head" "${learn[@]}" --cache "$out/cache" --epochs 0 \
  --finetune adapter --finetune-epochs "$epochs" --views cached --patch-weight 0 --out "$out/adapter-0"
[ -d "$out/adapter-0.5" ] || patchlife fit "$out/head" "${learn[@]}" --cache "$out/cache-patches" --epochs 0 \
  --finetune adapter --finetune-epochs "$epochs" --views cached --patch-weight 0.5 --out "$out/adapter-0.5"

settings=("${of_model[@]}" --budgets 0.8,0.61,0.45,0.35 --every "$every")
for model in untrained head adapter-0 adapter-0.5; do
  result=$out/$model.json of=("$out/$model") arguments=() modes=fixed
  [ "$model" = untrained ] && of=(vit_tiny_patch16_224) arguments=(--model-args num_classes=0)
  [ "$model" = adapter-0.5 ] && modes=fixed,adaptive
  [ -f "$result" ] || patchlife eval "${of[@]}" "$shared/data/in20/val" "${settings[@]}" --modes $modes \
    --out "$result" "${arguments[@]}"
done
python "$(dirname "$0")/summary.py" "$out" "$photos" "$every" "$epochs"
