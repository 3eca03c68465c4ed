"""Targets and losses of dense prediction against slow references: one patch, one pixel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from families import built, photos
from torch import Tensor, nn

from patchlife import LifeConfig, wrap
from patchlife.training.dense import DenseTarget
from patchlife.training.dense_targets import compute_dense_targets, importance_of
from patchlife.training.losses import pixel_distillation_loss
from patchlife.training.targets import Targets, compute_targets

START = 2
FAMILIES = ("vit", "not-square", "gap-registers", "dinov3", "siglip")


class LinearHead(nn.Module):
    """A linear classifier of each patch, with four pixels for each patch."""

    def __init__(self, dim: int, blocks: int, classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(blocks)
        self.weight = nn.Parameter(torch.randn(classes, dim * blocks, generator=generator) * (dim * blocks) ** -0.5)

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits = torch.einsum("kd,bdhw->bkhw", self.weight, torch.cat(maps, dim=1))
        return logits.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def dense_of(blocks: tuple[int, ...], head: bool, dim: int = 48) -> DenseTarget:
    return DenseTarget(blocks, START, LinearHead(dim, len(blocks)).eval() if head else None)


def computed(family: str, dense: DenseTarget) -> tuple[nn.Module, Tensor, Targets]:
    model, images = built(family), photos(family)
    return model, images, compute_dense_targets(wrap(model, LifeConfig(start=START)).backbone, images, dense)


def tokens_after(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """timm's own tokens after a block, before the last norm."""
    found = model.forward_intermediates(
        images, [block], norm=False, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    return torch.cat((found[1], found[0]), dim=1) if isinstance(found, tuple) else found


def skipping(model: nn.Module, images: Tensor, block: int, patch: int | None) -> Tensor:
    """The normalised tokens after ``block`` where one patch has its state at the start block."""
    x, before = tokens_after(model, images, block), tokens_after(model, images, START - 1)
    prefix = model.num_prefix_tokens
    if patch is not None and block >= START:
        x = x.clone()
        x[:, prefix + patch] = before[:, prefix + patch]
    return model.norm(x)[:, prefix:]


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(4,), (1, 4), (0, 2, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_error_of_the_answers_without_a_patch_times_what_is_read_from_it(
    family: str, blocks: tuple[int, ...]
) -> None:
    dense = dense_of(blocks, head=True)
    model, images, targets = computed(family, dense)
    grid = wrap(model, LifeConfig(start=START)).backbone.grid_of(images)

    def answers(patch: int | None) -> Tensor:
        maps = [skipping(model, images, block, patch).transpose(1, 2).unflatten(2, grid) for block in blocks]
        return dense.head(maps).log_softmax(dim=1)

    read = compute_targets(wrap(model, LifeConfig(start=START)).backbone, images, START).importance
    expected, full = torch.zeros_like(targets.importance), answers(None)
    for patch in range(grid[0] * grid[1]):
        per_pixel = (full.exp() * (full - answers(patch))).sum(dim=1)
        expected[:, patch] = per_pixel.sum(dim=(1, 2)) / 4  # the pixels of other patches do not change
    torch.testing.assert_close(targets.importance, importance_of(expected, 0.25, read**0.5), rtol=2e-3, atol=1e-6)
    assert targets.importance.max() > 1.2 * targets.importance.min()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_importance_is_the_error_of_the_features(family: str) -> None:
    blocks = (1, 3, 4)
    model, images, targets = computed(family, dense_of(blocks, head=False))
    expected = torch.zeros_like(targets.importance)
    for block in (3, 4):
        full = skipping(model, images, block, None)
        scale = full.std(dim=1, correction=0)
        for patch in range(expected.shape[1]):
            error = (full - skipping(model, images, block, patch))[:, patch]
            expected[:, patch] += (error / scale).square().sum(dim=1)
    torch.testing.assert_close(targets.importance, importance_of(expected / 2 / 48, 0.5), rtol=2e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_targets_are_the_librarys_own_features_and_their_change(family: str) -> None:
    blocks = (1, 3)
    model, images, targets = computed(family, dense_of(blocks, head=False))
    own = model.forward_intermediates(images, list(blocks), norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(targets.patches, torch.cat(own, dim=-1), rtol=1e-4, atol=1e-4)
    before = tokens_after(model, images, START - 1)
    torch.testing.assert_close(targets.tokens, before, rtol=1e-4, atol=1e-4)
    change = (tokens_after(model, images, 3) - before)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(targets.embedding, change, rtol=1e-3, atol=1e-3)
    assert targets.output.shape == (3, 0)


@torch.no_grad()
def test_with_a_head_patches_are_similar_if_changes_and_answers_are() -> None:
    dense = dense_of((4,), head=True)
    model, images, targets = computed("not-square", dense)
    change = (tokens_after(model, images, 4) - tokens_after(model, images, START - 1))[0, model.num_prefix_tokens :]
    probability = dense.answers(targets.patches, (4, 7))[0, :, ::2, ::2].softmax(dim=0).flatten(1).T
    for i, j in ((0, 1), (3, 20), (5, 5)):
        of_changes = torch.cosine_similarity(change[i], change[j], dim=0)
        of_answers = (probability[i] * probability[j]).sqrt().sum()
        found = torch.cosine_similarity(targets.embedding[0, i], targets.embedding[0, j], dim=0)
        assert found.item() == pytest.approx((of_changes + of_answers).item() / 2, abs=1e-4)


def test_importance_sums_to_one_and_is_never_zero() -> None:
    errors = torch.tensor([[0.0, 9.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    importance = importance_of(errors, 0.5)
    torch.testing.assert_close(importance.sum(dim=1), torch.ones(2))
    assert importance.min() > 0
    torch.testing.assert_close(importance[0, 1] / importance[0, 2], torch.tensor(3.0), rtol=0.05, atol=0)
    torch.testing.assert_close(importance[1], torch.full((4,), 0.25))


def test_the_loss_of_pixels_is_a_power_of_the_mean_divergence_of_each_image() -> None:
    student, teacher = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    losses, divergences = [], []
    for image in range(3):
        total = 0.0
        for row in range(2):
            for col in range(5):
                p, q = teacher[image, :, row, col].softmax(0), student[image, :, row, col].softmax(0)
                total += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        divergences.append(total / 10)
        losses.append((total / 10 + 1e-3) ** 0.75)
    loss, divergence = pixel_distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert divergence.item() == pytest.approx(sum(divergences) / 3, rel=1e-4)


def test_the_loss_of_equal_pixels_is_small_and_its_gradient_finite() -> None:
    teacher = torch.randn(2, 4, 3, 3)
    student = teacher.clone().requires_grad_()
    loss, divergence = pixel_distillation_loss(student, teacher)
    loss.backward()
    assert divergence.item() < 1e-6
    assert loss.item() == pytest.approx(1e-3**0.75, rel=1e-2)
    assert student.grad is not None
    assert student.grad.isfinite().all()
