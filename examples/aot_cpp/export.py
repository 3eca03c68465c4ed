"""Compile a slimmed ViT ahead of time into a .pt2 package that C++ runs without Python.

python export.py [timm name] [checkpoint.safetensors]
"""

import sys
from pathlib import Path

import timm
import torch

import patchlife


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "vit_tiny_patch16_224"
    weights = sys.argv[2] if len(sys.argv) > 2 else ""  # random weights if not given
    model = patchlife.wrap(timm.create_model(name, checkpoint_path=weights).eval(), patchlife.LifeConfig(budget=0.6))
    images = torch.randn(2, 3, *model.backbone.image_size, generator=torch.Generator().manual_seed(0))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=(batch,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path("vit.pt2").absolute()))
        logits = model(images)
    images.numpy().tofile("images.bin")  # float32, batch x channels x height x width
    print(f"{path}: {model.schedule()} patches")
    for image, image_logits in enumerate(logits):
        print(f"image {image}: class {image_logits.argmax()}, logit {image_logits.max():.4f}")


if __name__ == "__main__":
    main()
