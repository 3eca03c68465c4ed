"""A scorer of your own, saved and loaded: here, patches near a point of the image have the longest lives.

python examples/your_own_scorer.py
"""

import tempfile
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize

import patchlife
from patchlife.backbones import Backbone
from patchlife.slimming.scorers import Scores


class NearPoint(patchlife.Scorer):
    """Scores patches of a square grid by their distance to a point; similarity embeddings are the normalised tokens."""

    kind = "near-point"  # the name in saved adapters; no other class may have the same

    def __init__(self, x: float = 0.0, y: float = 0.0) -> None:
        super().__init__()
        self.x, self.y = x, y

    def settings(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y}  # arguments of __init__, as JSON values

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        patches = tokens[:, backbone.prefix :]  # (batch, patches, dim)
        side = int(patches.shape[1] ** 0.5)
        axis = torch.linspace(-1, 1, side)
        distance = ((axis[:, None] - self.y) ** 2 + (axis[None] - self.x) ** 2).flatten()
        return Scores(-distance.expand(len(patches), -1), normalize(patches, dim=-1))


def main() -> None:
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.5), scorer=NearPoint(y=-0.5))
    with tempfile.TemporaryDirectory() as folder:
        patchlife.save(model, f"{folder}/adapter")
        # an adapter holds the kind and the settings of its scorer, not its code: pass the class when you load it
        loaded = patchlife.load(f"{folder}/adapter", vit, scorer=NearPoint)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
        print(loaded.lives(images).map().int())


if __name__ == "__main__":
    main()
