"""Slim a timm model: logits at several budgets, a picture of the lives, an adapter on disk.

python examples/slim_your_vit.py photo.jpg [model.safetensors]
"""

import sys

import timm
import torch
from safetensors.torch import load_file

import patchlife
from patchlife.data import Preprocess, read_photo


def main(photo_path: str, checkpoint: str | None = None) -> None:
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    if checkpoint:
        vit.load_state_dict(load_file(checkpoint))
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6))

    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    photo = read_photo(photo_path)
    images = preprocess(photo).unsqueeze(0)  # (1, 3, 224, 224)

    with torch.inference_mode():
        for budget in (1.0, 0.8, 0.6, 0.45):
            logits = model.set_budget(budget)(images)
            print(f"budget {budget:.2f}: class {logits.argmax().item()}, patches per block: {model.schedule()}")

    patchlife.draw(photo, model.lives(images), preprocess=preprocess).save("lives.png")
    patchlife.save(model, "my-adapter")
    loaded = patchlife.load("my-adapter", vit)
    assert torch.equal(loaded.lives(images).life, model.lives(images).life)
    print("wrote lives.png and my-adapter/")


if __name__ == "__main__":
    main(*sys.argv[1:])
