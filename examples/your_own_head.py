"""Who decides is a module like any other: here, patches near the middle of the image live longest. Saved and loaded.

python examples/your_own_head.py
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


class CentreFirst(patchlife.Scorer):
    """Scores patches by their distance to a point of a square grid; embedding are the tokens themselves."""

    kind = "centre-first"  # what adapters call it: no other class may have the same

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
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.5), scorer=CentreFirst(y=-0.5))
    with tempfile.TemporaryDirectory() as folder:
        patchlife.save(model, f"{folder}/adapter")
        # an adapter names the kind of its scorer; the class comes from you, no file brings code
        again = patchlife.load(f"{folder}/adapter", vit, scorer=CentreFirst)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
        print(again.lives(images).map().int())


if __name__ == "__main__":
    main()
