"""Small slimmed models, pipeline to run, and the checks that keep a test from passing trivially."""

from __future__ import annotations

from typing import Any

from families import START, built, photos
from torch import Tensor, nn

from patchlife import LifeConfig, Lives, SlimModel, wrap

WAYS = {
    f"{mode}{', merge' if merge else ''}": {"mode": mode, "merge": merge}
    for mode in ("fixed", "adaptive")
    for merge in (False, True)
}
BUDGET = 0.65  # within reach of every family from START on


def slim(name: str, way: str = "fixed", vit: nn.Module | None = None, **settings: Any) -> SlimModel:
    """A family's small model, slimmed from block `START`; adaptive ones are calibrated on eight images."""
    config = LifeConfig(**{"budget": BUDGET, "start": START, **WAYS[way], **settings})
    model = wrap(built(name) if vit is None else vit, config)
    if config.mode == "adaptive":
        reference = next(model.backbone.parameters())
        model.calibrate([photos(name, 8, seed=1).to(reference)])
    return model


def assert_some_die(lives: Lives, way: str) -> None:
    """Patches die, one always lives, and in adaptive mode images differ in how many they keep."""
    assert (lives.kept[:, -1] >= 1).all()
    assert (lives.kept[:, -1] < lives.kept[:, 0]).any()
    if WAYS[way]["mode"] == "adaptive" and len(lives) > 1:
        assert (lives.kept != lives.kept[:1]).any(), "nothing ragged was tested"


def far_apart(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by far more than rounding."""
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())
