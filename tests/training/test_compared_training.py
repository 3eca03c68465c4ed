"""Track 3 (recipes/fewer_epochs) trains PatchLife with the start block and the drop points of the compared budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import liven
from made_targets import PREPROCESS, some_photos
from timm.models import VisionTransformer

from patchlife.backbones import adapt
from patchlife.training.stage import StageConfig
from patchlife.training.target_cache import collect
from patchlife.training.targets import compute_targets

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/fewer_epochs"))
from trained_methods import OURS, ours, starts_of


@pytest.mark.parametrize(("method", "flops"), [("ours-one", 0.35), ("ours-delta", 0.35), ("ours", 0.5)])
def test_patchlife_is_trained_at_the_start_block_of_its_budget(tmp_path: Path, method: str, flops: float) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=48, patch_size=4, embed_dim=24, num_heads=2, depth=12, num_classes=3)
    dense = adapt(liven(vit).eval())
    starts = starts_of(method, dense)
    assert method in OURS
    assert starts == (2, 3)
    cache = collect(
        some_photos(tmp_path / "photos", 6),
        lambda images: compute_targets(dense, images, starts),
        PREPROCESS,
        tmp_path / "cache",
        depends_on={},
    )
    trainable = ours(dense, method, cache, flops, tmp_path, StageConfig("run", 1, 6, 1e-3, save_every=float("inf")))
    student, images = trainable.stage.model, torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        logits = trainable.logits_of(compute_targets(dense, images, starts).tokens)
        assert student.start == (2 if flops < 0.385 else 3)
        assert trainable.flops == pytest.approx(flops, abs=0.01)
        torch.testing.assert_close(logits, student(images), rtol=1e-4, atol=1e-4)
