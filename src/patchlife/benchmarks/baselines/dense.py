"""The dense model, run by timm's own code with fused attention."""

from __future__ import annotations

from torch import Tensor

from ...backbones import Backbone
from ...config import LifeConfig
from ...slimming import SlimModel
from .base import Baseline, Images, Method, dense_flops

__all__ = ["DENSE", "Dense"]


class Dense(Baseline):
    """The unmodified backbone."""

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.backbone.output(images)

    def tensor_module(self) -> SlimModel:
        """A `SlimModel` at budget 1: the same graph, in the form that the export takes."""
        return SlimModel(self.backbone, LifeConfig(budget=1.0)).eval()

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        return dense_flops(self.backbone, images)


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    return Dense(backbone)


DENSE = Method("dense", "dense", "timm", "unmodified", _build, exports=True)
