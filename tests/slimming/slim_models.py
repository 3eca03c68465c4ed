"""Small slimmed models, and checks that keep a test from passing trivially."""

from __future__ import annotations

from typing import Any

from families import START, built, photos
from torch import Tensor, nn

from patchlife import LifeConfig, Lives, SlimModel, wrap

VARIANTS = {
    f"{mode}{', merge' if merge else ''}": {"mode": mode, "merge": merge}
    for mode in ("fixed", "adaptive")
    for merge in (False, True)
}
"""Settings of each mode, with and without merging."""

BUDGET = 0.65  # every family can reach it with block `START` as start block


def slim(name: str, variant: str = "fixed", vit: nn.Module | None = None, **settings: Any) -> SlimModel:
    """A family's small model, slimmed from block `START`; adaptive mode is calibrated on eight images."""
    config = LifeConfig(**{"budget": BUDGET, "start": START, **VARIANTS[variant], **settings})
    model = wrap(built(name) if vit is None else vit, config)
    if config.mode == "adaptive":
        reference = next(model.backbone.parameters())
        model.calibrate([photos(name, 8, seed=1).to(reference)])
    return model


def assert_some_dropped(lives: Lives, variant: str) -> None:
    """Patches are dropped, at least one is kept, and in adaptive mode images keep different numbers of patches."""
    assert (lives.kept[:, -1] >= 1).all()
    assert (lives.kept[:, -1] < lives.kept[:, 0]).any()
    if VARIANTS[variant]["mode"] == "adaptive" and len(lives) > 1:
        assert (lives.kept != lives.kept[:1]).any(), "all images keep the same numbers of patches"


def far_apart(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by far more than rounding."""
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())
