"""Fixed mode trains: gradients are those of the masked reference, and really dropped patches cost nothing."""

from __future__ import annotations

import pytest
import timm
import torch
from families import FEW, SMALL, fresh, photos
from reference import dropping
from slimmed import far_apart, slim
from torch import Tensor, nn

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.flop_counter import counted


def gradients(vit: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """Gradients of every weight for a loss of these logits."""
    vit.zero_grad(set_to_none=True)
    (logits * torch.linspace(-1, 1, logits.shape[-1])).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in vit.named_parameters()}


@pytest.mark.parametrize("way", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", FEW)
def test_gradients_are_the_references(name: str, way: str) -> None:
    vit, images = fresh(name).train(), photos(name)
    model = slim(name, way, vit)
    assert model.training
    lives = model.lives(images)
    assert (lives.kept[:, -1] < lives.kept[:, 0]).all()
    with torch.enable_grad():
        ours = gradients(vit, model(images))
        with dropping(vit, lives.life, model.start, model.config.merge):
            theirs = gradients(vit, vit(images))
        dense = gradients(vit, vit(images))
    assert theirs.keys() == ours.keys()
    scale = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    for weight, gradient in theirs.items():
        if gradient is None:
            assert ours[weight] is None
        else:
            assert torch.allclose(ours[weight], gradient, atol=1e-5 * scale, rtol=1e-4), weight
    assert far_apart(ours["head.weight"], dense["head.weight"])


def test_gradients_reach_the_pixels_of_the_dead_through_the_early_blocks() -> None:
    """A patch that dies at block 2 was seen by the others in blocks 0 and 1, so it still gets some."""
    vit, images = fresh("vit").train(), photos("vit").requires_grad_()
    with torch.enable_grad():
        slim("vit", vit=vit)(images).sum().backward()
    per_patch = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)).flatten(1)
    assert (per_patch > 0).all()


def test_a_training_step_lowers_the_loss_and_leaves_the_schedule() -> None:
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


def test_a_slimmed_step_costs_less_than_a_dense_one() -> None:
    model, images = slim("vit", vit=fresh("vit").train()), photos("vit")
    assert counted(model, images)[0] < 0.7 * counted(model.backbone.vit, images)[0]


def test_stochastic_depth_stays_the_backbones() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.5, drop_rate=0.2).train()
    model, images = slim("vit", vit=vit), photos("vit")
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_adaptive_mode_refuses_to_train() -> None:
    model = wrap(fresh("vit").train(), LifeConfig(budget=0.7))
    model.calibrate([photos("vit")]).set_mode("adaptive")
    with pytest.raises(ConfigError, match=r"adaptive mode is for inference: call \.eval\(\) first"):
        model(photos("vit"))
    assert model.eval()(photos("vit")).shape == (3, 10)
