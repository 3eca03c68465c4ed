"""Embeddings and nearest neighbours with a slimmed DINOv2 of transformers.

python examples/dino_retrieval.py [PHOTOS [MODEL]]

PHOTOS is a folder; without it, the demo's photos are used. MODEL is a name on the hub or a local folder, such as
facebook/dinov2-small. Without it, a small model with random weights shows the steps; its neighbours mean nothing.
"""

import sys
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

import patchlife
from patchlife.data import Preprocess, list_photos, read_photo

DEMO = str(files("patchlife") / "assets" / "demo" / "photos")


def load(name: str | None, paths: list[Path]) -> tuple[torch.nn.Module, Tensor]:
    """(model, the photos as its input)."""
    photos = [read_photo(path) for path in paths]
    if name:
        processor = AutoImageProcessor.from_pretrained(name)
        return AutoModel.from_pretrained(name).eval(), processor(photos, return_tensors="pt")["pixel_values"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 12, "num_attention_heads": 3, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=112, patch_size=14, layerscale_value=0.5)).eval()
    return model, torch.stack([Preprocess(size=(112, 112))(photo) for photo in photos])


def main(folder: str = DEMO, name: str | None = None) -> None:
    found = list_photos(folder)
    paths = found[:: max(1, len(found) // 20)]  # at most 39, from the whole folder
    vit, images = load(name, paths)
    model = patchlife.wrap(vit)
    with torch.inference_mode():
        dense = normalize(vit(images).pooler_output, dim=1)  # (photos, width)
        for budget in (1.0, 0.6):
            embeddings = normalize(model.set_budget(budget)(images).pooler_output, dim=1)
            cosine = (embeddings * dense).sum(dim=1)
            print(f"budget {budget}: cosine to the dense embeddings {cosine.mean():.4f}, least {cosine.min():.4f}")
            similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)  # (photos, photos)
            for photo, nearest in list(enumerate(similarity.argmax(dim=1).tolist()))[:5]:
                close = similarity[photo, nearest]
                print(f"  {_name(paths[photo])} -> {_name(paths[nearest])} ({close:.4f})")


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


if __name__ == "__main__":
    main(*sys.argv[1:])
