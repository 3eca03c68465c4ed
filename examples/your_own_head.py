"""Who decides is a module like any other: here, patches near the middle of the image live longest.

python examples/your_own_head.py
"""

import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize

import patchlife
from patchlife.backbones import Backbone
from patchlife.life.heads import Opinion


class CentreFirst(patchlife.LifeHead):
    """Scores patches by their distance to the middle of a square grid; kin are the tokens themselves."""

    kind = "centre-first"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Opinion:
        patches = tokens[:, backbone.prefix :]  # (batch, patches, dim)
        side = int(patches.shape[1] ** 0.5)
        axis = torch.linspace(-1, 1, side)
        distance = (axis[:, None] ** 2 + axis[None] ** 2).flatten()
        return Opinion(-distance.expand(len(patches), -1), normalize(patches, dim=-1))


def main() -> None:
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.5), scorer=CentreFirst())
    with torch.inference_mode():
        print(model.lives(torch.randn(1, 3, 224, 224)).map().int())


if __name__ == "__main__":
    main()
