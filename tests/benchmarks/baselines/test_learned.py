"""A life adapter in the comparison: its own scorer, on the backbone of the other methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import built
from plain_blocks import backbone, images

import patchlife
from patchlife import LifeConfig, wrap
from patchlife.benchmarks.baselines import learned
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.slimming.regressor import LifeRegressor


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    bb = backbone()
    torch.manual_seed(0)
    model = wrap(built("vit"), LifeConfig(budget=0.9), LifeRegressor(bb.dim, bb.prefix).eval())
    return patchlife.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_an_adapter_meets_the_target_with_its_own_scorer(adapter: Path, mode: str) -> None:
    bb = backbone()
    method = learned(adapter, mode)
    baseline = method.build(bb, 0.65, images())
    assert isinstance(baseline.model.scorer, LifeRegressor)
    assert baseline.model.settings.mode == mode
    assert baseline.backbone.model is bb.model
    assert baseline.flops(images()) / dense_flops(bb, images()) == pytest.approx(0.65, abs=0.05)
    assert method.name == f"ours-learned-{mode}"
    assert method.ours
