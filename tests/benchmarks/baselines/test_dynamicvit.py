"""DynamicViT against its paper (arXiv 2106.02034)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_blocks import backbone, images
from safetensors.torch import save_file

from patchlife.benchmarks.baselines.dynamicvit import DynamicViT, Predictor, trained_dynamicvit, untrained
from patchlife.errors import CheckpointError


def test_ratios_are_powers_of_rho() -> None:
    assert DynamicViT(backbone(), 0.7).kept(196) == (137, 96, 67)


def test_scores_are_log_probabilities_of_keeping() -> None:
    predictor = Predictor(8)
    score = predictor(torch.randn(2, 5, 8))
    assert score.shape == (2, 5)
    assert (score < 0).all()


def test_scores_depend_on_the_mean_over_all_patches() -> None:
    """Half of the features are a mean over the patches: changing one patch changes the scores of the others."""
    torch.manual_seed(0)  # in a few small random networks the mean has almost no influence
    predictor, patches = Predictor(8), torch.randn(1, 5, 8)
    other = patches.clone()
    other[0, 4] += torch.randn(8)
    assert not torch.allclose(predictor(patches)[0, :4], predictor(other)[0, :4])


def test_the_patches_with_the_highest_scores_are_kept() -> None:
    """A predictor that returns one channel keeps the patches in which this channel is largest."""
    bb = backbone()
    predictors = untrained(bb)
    inputs = []
    for predictor in predictors:
        predictor.forward = lambda patches: inputs.append(patches) or patches[..., 0]  # type: ignore[method-assign]
    model = DynamicViT(bb, 0.7, predictors)
    model(images())
    first, second = inputs[0], inputs[1]
    assert [x.shape[1] for x in inputs] == [36, *model.kept(36)[:2]]
    kept = first[..., 0].topk(model.kept(36)[0], dim=1).indices
    x = torch.cat(
        (bb.model.blocks[0](bb.embed(images()).tokens)[:, :1], first.gather(1, kept[..., None].expand(-1, -1, 48))), 1
    )
    torch.testing.assert_close(bb.model.blocks[1](x)[:, 1:], second, rtol=1e-4, atol=1e-5)


def test_trained_predictors_load(tmp_path: Path) -> None:
    bb, path = backbone(), tmp_path / "predictors.safetensors"
    weights = {name: value + 0.5 for name, value in untrained(bb).state_dict().items()}
    save_file(weights, path)
    method = trained_dynamicvit(path)
    model = method.build(bb, 0.65, images())
    assert method.trained
    assert all(torch.equal(value, weights[name]) for name, value in model.predictors.state_dict().items())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="three predictors"):
        trained_dynamicvit(path).build(backbone(), 0.65, images())
