"""Adaptive mode: the mean cost meets the budget, and each photo keeps its own number of patches.

python examples/easy_and_crowded.py folder/ [model.safetensors]
"""

import sys

import timm
import torch
from safetensors.torch import load_file

import patchlife
from patchlife.data import Preprocess, list_photos, load_batches


def main(folder: str, checkpoint: str | None = None) -> None:
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    if checkpoint:
        vit.load_state_dict(load_file(checkpoint))
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    paths = list_photos(folder)
    batches = list(load_batches(paths, preprocess, batch_size=16))

    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.5))
    model.calibrate(batch.images for batch in batches).set_mode("adaptive")

    with torch.inference_mode():
        for batch in batches:
            lives = model.lives(batch.images)
            for index, flops in zip(batch.indices, model.flops_of(lives), strict=True):
                print(f"{flops / model.dense_flops:.3f} of the dense FLOPs  {paths[index].name}")
    print(f"mean over these photos: {patchlife.flops(model).budget:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
