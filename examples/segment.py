"""Dense prediction with a slimmed ViT: features of the whole patch grid, a head on them, and training without labels.

python examples/segment.py [FOLDER]

FOLDER has photos; without it, the demo's photos are used. The backbone is the demo's small ViT. The head has random
weights and stands for yours: it shows how far the answers of the slimmed model are from those of the dense one, which
is what the training without labels brings down. recipes/camvid does the same on street scenes with a trained head.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import patchlife
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess, list_photos, load_batches
from patchlife.runtime.demo_model import demo_backbone, demo_folder
from patchlife.training.dense import DenseHead
from patchlife.training.fit import fit
from patchlife.training.target_cache import Photo

BLOCKS = (5, 11)  # the head reads the features behind these


class Head(nn.Module):
    """From feature maps, each (batch, width, rows, cols), to the logits of 5 classes on the patch grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.answer = nn.Sequential(nn.Conv2d(len(BLOCKS) * width, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 5, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.answer(torch.cat(maps, dim=1))


@torch.inference_mode()
def answers(model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    """The class of every patch, (batch, rows, cols); `model` is a timm model or a slimmed one: the call is the same."""
    maps = model.forward_intermediates(images, indices=list(BLOCKS), norm=True, intermediates_only=True)
    return head(maps).argmax(dim=1)


def main(folder: str | None = None) -> None:
    torch.manual_seed(0)
    vit = demo_backbone()
    head = Head(vit.embed_dim).eval()
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    paths = list_photos(folder or demo_folder() / "photos")[::4]
    images = next(load_batches(paths, preprocess, batch_size=16)).images  # (16, 3, 112, 112)
    dense = answers(vit, head, images)

    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.5, restore="residual"))
    with tempfile.TemporaryDirectory() as work:
        config = TrainingConfig(target="pixels", epochs=20, finetune="adapter", finetune_epochs=4, batch_size=8)
        photos = [Photo(path) for path in paths]
        fitted = fit(model, photos, preprocess, Path(work) / "adapter", config, head=DenseHead(head, BLOCKS))
    for name, slimmed in (("nothing trained", model), ("trained", fitted.model)):
        agreement = (answers(slimmed, head, images) == dense).float().mean()
        print(f"{name:16} {patchlife.flops(slimmed).budget:.2f} of the FLOPs, {agreement:.1%} of the answers equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
