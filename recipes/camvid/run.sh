#!/usr/bin/env bash
# CamVid from pretrained ViT-Tiny to the tables of README.md: train the dense model, evaluate every method with nothing
# trained, train adapters, evaluate them. Finished parts are not repeated. About three hours on two cores.
#
#   recipes/camvid/run.sh SHARED OUT
#
# SHARED has weights/vit_tiny_patch16_224.safetensors and data/camvid. Time and memory: time_memory.py, on an idle machine.
set -euo pipefail
shared=$1 out=$2
here=$(dirname "$0") data=$shared/data/camvid
export OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
mkdir -p "$out"
of=(--data "$data" --dense "$out/dense.safetensors")

python "$here/train_dense.py" --data "$data" --weights "$shared/weights/vit_tiny_patch16_224.safetensors" --out "$out"

# every method, nothing trained
evaluate=(python "$here/evaluate.py" "${of[@]}" --out "$out/scores.json")
"${evaluate[@]}"

# what the place of a dropped patch holds; merging off; the baselines' own choices
for restore in target last; do
  "${evaluate[@]}" --methods untrained,equal-importance,tome,random --settings "{\"restore\": \"$restore\"}"
done
"${evaluate[@]}" --methods untrained,random --settings '{"restore": "last", "merge": false}'
"${evaluate[@]}" --methods uniform-grid --settings '{"start": 3}'
"${evaluate[@]}" --methods uniform-grid --settings '{"residual": false}'

# other drop points
for points in '{"start": 3, "drops": [3, 6]}' '{"drops": [2, 4, 6, 8]}'; do
  "${evaluate[@]}" --methods untrained,equal-importance --settings "$points"
done

# adapters, trained without labels
python "$here/fit.py" "${of[@]}" --out "$out"
python "$here/fit.py" "${of[@]}" --out "$out" --long
"${evaluate[@]}" --methods '' --adapters "$out/scorer" "$out/adapter" "$out/long-scorer" "$out/long-adapter"
for points in '{"drops": [2, 6]}' '{"drops": [2, 4, 6, 8]}'; do
  "${evaluate[@]}" --methods '' --adapters "$out/scorer" "$out/adapter" --budgets 0.6,0.5,0.4 --settings "$points"
done
"${evaluate[@]}" --methods '' --adapters "$out/long-scorer" "$out/long-adapter" --settings '{"drops": [2, 6]}'
python "$here/summary.py" "$out"
