"""Fixed mode trains: gradients equal those of the masked reference, and dropped patches cost nothing."""

from __future__ import annotations

import pytest
import timm
import torch
from families import FEW, SMALL, fresh, liven, photos
from reference import assert_close, dropping
from slim_models import far_apart, slim
from torch import Tensor, nn

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.flop_counter import counted


def gradients(vit: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """Gradients of every weight, for a loss on ``logits``."""
    vit.zero_grad(set_to_none=True)
    (logits * torch.linspace(-1, 1, logits.shape[-1])).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in vit.named_parameters()}


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", FEW)
def test_gradients_equal_those_of_the_reference(name: str, variant: str) -> None:
    vit, images = fresh(name).train(), photos(name)
    model = slim(name, variant, vit, restore="last")  # as the hooks of the reference
    assert model.training
    lives = model.lives(images)
    assert (lives.kept[:, -1] < lives.kept[:, 0]).all()
    with torch.enable_grad():
        slimmed = gradients(vit, model(images))
        with dropping(vit, lives.life, model.start, model.settings.merge):
            expected = gradients(vit, vit(images))
        dense = gradients(vit, vit(images))
    assert expected.keys() == slimmed.keys()
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for weight, gradient in expected.items():
        if gradient is None:
            assert slimmed[weight] is None
        else:
            assert torch.allclose(slimmed[weight], gradient, atol=1e-5 * scale, rtol=1e-4), weight
    assert far_apart(slimmed["head.weight"], dense["head.weight"])


def test_gradients_reach_the_pixels_of_dropped_patches_through_the_early_blocks() -> None:
    """The other patches attend in blocks 0 and 1 to a patch that is dropped at block 2, so its gradient is not 0."""
    vit, images = fresh("vit").train(), photos("vit").requires_grad_()
    with torch.enable_grad():
        slim("vit", vit=vit)(images).sum().backward()
    per_patch = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)).flatten(1)
    assert (per_patch > 0).all()


def test_training_steps_lower_the_loss_and_keep_the_schedule() -> None:
    vit, images = fresh("deit3").train(), photos("deit3", 6)
    model, labels = slim("deit3", vit=vit), torch.tensor([0, 1, 2, 3, 4, 5])
    optimizer, losses, before = torch.optim.Adam(model.parameters(), 3e-3), [], model.schedule()
    with torch.enable_grad():
        for _ in range(6):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.schedule() == before


def test_a_slimmed_forward_pass_in_training_costs_less_than_a_dense_one() -> None:
    model, images = slim("vit", vit=fresh("vit").train()), photos("vit")
    assert counted(model, images)[0] < 0.7 * counted(model.backbone.model, images)[0]


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
def test_stochastic_depth_takes_effect_in_training_only(variant: str) -> None:
    """When every residual branch from the start block on is dropped, only the blocks before it change the tokens."""
    vit, images = liven(timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.5)), photos("vit")
    model = slim("vit", variant, vit.train())
    for block in vit.blocks[model.start :]:
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    for block in vit.blocks[: model.start]:
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
    before_start = model.before_start(model.backbone.embed(images))
    assert_close(model(images), vit.forward_head(vit.norm(before_start)))
    assert_close(model.eval()(images), slim("vit", variant)(images))


def test_adaptive_mode_refuses_to_train() -> None:
    model = wrap(fresh("vit").train(), LifeConfig(budget=0.7))
    model.calibrate([photos("vit")]).set_mode("adaptive")
    with pytest.raises(ConfigError, match=r"adaptive mode is for inference: call \.eval\(\) first"):
        model(photos("vit"))
    assert model.eval()(photos("vit")).shape == (3, 10)
