#!/usr/bin/env bash
# Track 1: lives of ViT-Tiny/16-224 on ImageNet-1k, fitted without labels on photos of 20 of its classes and of
# Caltech-101, reported on photos of those 20 classes and of all 1000. About an hour on two CPU cores; what is done
# already is not done again.
#
#   recipes/vit_tiny/run.sh SHARED OUT      SHARED holds weights/vit_tiny_patch16_224.safetensors and data/
set -euo pipefail
shared=$1 out=$2
weights=$shared/weights/vit_tiny_patch16_224.safetensors
photos=("$shared/data/in20/train" "$shared/data/caltech101/train")
learn=(--cache "$out/cache" --validation "$shared/data/in20/val,$shared/data/in1k-samples")
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# stage 1: the head alone
[ -d "$out/head" ] || patchlife fit vit_tiny_patch16_224 "${photos[@]}" --checkpoint "$weights" "${learn[@]}" \
  --out "$out/head"

# stage 2, from that head: low rank, merged when loaded; and all weights from the start block on
for how in adapter full; do
  [ -d "$out/$how" ] || patchlife fit "$out/head" "${photos[@]}" --checkpoint "$weights" "${learn[@]}" --epochs 0 \
    --finetune "$how" --finetune-epochs 3 --out "$out/$how"
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
