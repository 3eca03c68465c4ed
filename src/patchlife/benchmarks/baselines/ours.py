"""Ours: one decision at the start block, then slices (fixed mode) or packed tokens (adaptive mode)."""

from __future__ import annotations

from pathlib import Path

from ...backbones import Backbone
from ...config import LifeConfig, Mode
from ...slimming import SlimModel
from .base import Baseline, Images, Method
from .slim_model import Slimmed

__all__ = ["OURS_ADAPTIVE", "OURS_FIXED", "OURS_SLICES", "learned"]

_TRAINING = "nothing to train (attention scorer)"


def _fixed(backbone: Backbone, target: float, images: Images) -> Baseline:
    return Slimmed(SlimModel(backbone, LifeConfig(budget=target)).eval())


def _slices(backbone: Backbone, target: float, images: Images) -> Baseline:
    return Slimmed(SlimModel(backbone, LifeConfig(budget=target, merge=False)).eval())


def _adaptive(backbone: Backbone, target: float, images: Images) -> Baseline:
    model = SlimModel(backbone, LifeConfig(budget=target, mode="adaptive")).eval()
    return Slimmed(model.calibrate([images]))


OURS_FIXED = Method("ours-fixed", "ours, fixed", "this project", _TRAINING, _fixed, exports=True, ours=True)
OURS_SLICES = Method(
    "ours-slices", "ours, fixed, no merging", "this project", _TRAINING, _slices, exports=True, ours=True
)
OURS_ADAPTIVE = Method(
    "ours-adaptive", "ours, adaptive", "this project", _TRAINING, _adaptive, shapes="dynamic", ours=True
)


def learned(adapter: Path, mode: Mode) -> Method:
    """Ours with the learned scorer of a life adapter, and its weight delta if it has one."""

    def build(backbone: Backbone, target: float, images: Images) -> Baseline:
        from ...adapters import load

        model = load(adapter, backbone.model).eval().set_budget(target)
        if mode == "adaptive" and model.calibration is None:
            model.calibrate([images])
        return Slimmed(model.set_mode(mode))

    return Method(
        f"ours-learned-{mode}",
        f"ours, learned, {mode}",
        f"this project, adapter {adapter.name}",
        "its scorer, and its weight delta if it has one; see the adapter's recipe",
        build,
        shapes="static" if mode == "fixed" else "dynamic",
        exports=mode == "fixed",
        ours=True,
    )
