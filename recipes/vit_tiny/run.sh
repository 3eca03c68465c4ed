#!/usr/bin/env bash
# Track 1: train adapters of ViT-Tiny/16-224 (ImageNet-1k) without labels, on photos of 20 of its classes and of
# Caltech-101; evaluate them on photos of those 20 classes and of all 1000. It takes about an hour on two CPU cores.
# Finished parts are not repeated.
#
#   recipes/vit_tiny/run.sh SHARED OUT      SHARED has weights/vit_tiny_patch16_224.safetensors and data/
set -euo pipefail
shared=$1 out=$2
weights=$shared/weights/vit_tiny_patch16_224.safetensors
photos=("$shared/data/in20/train" "$shared/data/caltech101/train")
learn=(--cache "$out/cache" --validation "$shared/data/in20/val,$shared/data/in1k-samples")
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# stage 1: the scorer only
[ -d "$out/head" ] || patchlife fit vit_tiny_patch16_224 "${photos[@]}" --checkpoint "$weights" "${learn[@]}" \
  --out "$out/head"

# stage 2, from that scorer: a low-rank weight delta; and all weights from the start block on (cached views, of which
# the committed results are)
for how in adapter full; do
  [ -d "$out/$how" ] || patchlife fit "$out/head" "${photos[@]}" --checkpoint "$weights" "${learn[@]}" --epochs 0 \
    --finetune "$how" --finetune-epochs 3 --views cached --out "$out/$how"
done

for model in head adapter full; do
  modes=fixed
  [ "$model" = adapter ] && modes=fixed,adaptive
  for set in in1k-samples in20/val; do
    result=$out/$model-${set//\//-}.json
    [ -f "$result" ] || patchlife eval "$out/$model" "$shared/data/$set" --checkpoint "$weights" \
      --budgets 0.61,0.5,0.45 --modes $modes --out "$result"
  done
done
python "$(dirname "$0")/summary.py" "$out"
