"""A life regressor without training: its hidden units are sampled from pairs of patches, its outputs are solved.

Hidden units are placed where the target changes fastest: each is the difference of two patches, drawn with a
probability that grows with the difference of their importance and falls with their distance ("Sampling weights of deep
neural networks", Bolager et al., NeurIPS 2023, arXiv 2306.16830). Given the hidden units, importance is a convex
problem and similarity a linear one, which are solved. A few hundred images and seconds are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..errors import ConfigError
from ..slimming.calibration import images_in
from ..slimming.regressor import LifeRegressor, LifeRegressors
from .losses import importance_loss
from .targets import Targets, compute_targets

__all__ = ["WIDTH", "solved_regressor", "solved_scorer"]

WIDTH = 192
"""Hidden units; more of them are needed than of trained ones, of which `LifeRegressor` has 96."""

_EMBEDDING = 48  # width of the similarity embeddings
_PATCHES = 2**16  # of all images together: more do not change the solution, and cost memory
_PAIRS = 60_000  # candidates from which the units are drawn
_GAIN = 3.0  # a unit changes by this much from one patch of its pair to the other
_RIDGE = 1e-2  # of the similarity, in mean squares of the features
_DECAY = 1e-5  # of the importance
_STEPS = 80  # of L-BFGS, which has converged by then
_FLOOR = 1e-4  # added to an importance before its logarithm


@torch.no_grad()
def solved_scorer(backbone: Backbone, batches: Iterable[Any], starts: Sequence[int], seed: int = 0) -> LifeRegressors:
    """A scorer for each of these start blocks, from unlabelled images; frozen, in eval mode.

    Args:
        backbone: the dense model.
        batches: as for `SlimModel.calibrate`, images of one size. A few hundred images are enough; of large images the
            first ones are used.
        starts: the start blocks.
        seed: of the hidden units.

    Raises ConfigError for images of several sizes, for none, and for images that are all alike.
    """
    starts, each = sorted(set(starts)), []
    for batch in batches:
        images = images_in(batch)
        if not isinstance(images, Tensor):
            raise ConfigError("a scorer is solved on images of one size, got a list; give batches of one size")
        targets = compute_targets(backbone, images.to(device=backbone.device, dtype=backbone.dtype), starts)
        each.append(targets)
        if sum(part.importance.numel() for part in each) >= _PATCHES * len(starts):
            break
    if not each:
        raise ConfigError("a scorer is solved on images, got none")
    targets = Targets(*(torch.cat(parts) for parts in zip(*each, strict=True)))
    found = {start: solved_regressor(targets.at_start(start, starts), backbone.prefix, seed=seed) for start in starts}
    scorer = LifeRegressors(backbone.dim, backbone.prefix, starts, WIDTH, found[starts[0]].embedding_dim)
    for start, regressor in found.items():
        scorer.at(start).load_state_dict(regressor.state_dict())
    return scorer.to(backbone.device).eval().requires_grad_(False)


@torch.no_grad()
def solved_regressor(targets: Targets, prefix: int, width: int = WIDTH, seed: int = 0) -> LifeRegressor:
    """The scorer of one start block, from the targets of some hundred images.

    Args:
        targets: tokens (images, tokens, dim), importance and embedding; float32.
        prefix: number of prefix tokens.
        width: hidden units.
        seed: of the pairs.

    Raises ConfigError if the images are all alike, so that no patch differs from another.
    """
    tokens, importance = targets.tokens.float(), targets.importance.float()
    dim = tokens.shape[2]
    scorer = LifeRegressor(dim, prefix, width, min(_EMBEDDING, dim)).to(tokens.device)
    patches = F.layer_norm(tokens, tokens.shape[2:])[:, prefix:]
    scorer.context.weight.zero_()  # pairs are within an image, which has one context: it shifts no unit
    scorer.context.bias.zero_()
    _sample_units(scorer, patches, importance, torch.Generator().manual_seed(seed))
    hidden = F.gelu(scorer.patch(patches))
    _solve_importance(scorer, hidden, importance)
    _solve_similarity(scorer, hidden, patches, targets.embedding.float())
    return scorer


def _sample_units(
    scorer: LifeRegressor,
    patches: Float[Tensor, "images patches dim"],
    importance: Float[Tensor, "images patches"],
    generator: torch.Generator,
) -> None:
    """Set the hidden units from pairs of patches of the same image."""
    images, count, _ = patches.shape

    def drawn(bound: int) -> Tensor:
        return torch.randint(bound, (_PAIRS,), generator=generator).to(patches.device)

    image, first, second = drawn(images), drawn(count), drawn(count)
    step = patches[image, second] - patches[image, first]
    squared = step.square().sum(dim=1)
    target = (importance + _FLOOR).log()
    steepness = (target[image, second] - target[image, first]).abs() / squared.clamp(min=1).sqrt()
    steepness = torch.where(squared > 1, steepness, 0)
    if int((steepness > 0).sum()) < scorer.width:
        raise ConfigError(
            f"expected images whose patches differ, got {images} images in which almost all patches are alike; give "
            "a few hundred photos of what the model is used for"
        )
    chosen = torch.multinomial(steepness.cpu(), scorer.width, generator=generator).to(patches.device)
    weight = _GAIN * step[chosen] / squared[chosen, None]
    scorer.patch.weight.copy_(weight)
    scorer.patch.bias.copy_(-(weight * patches[image, first][chosen]).sum(dim=1))


def _solve_importance(
    scorer: LifeRegressor, hidden: Float[Tensor, "images patches width"], importance: Float[Tensor, "images patches"]
) -> None:
    """Minimise `importance_loss`, which is convex in the weights of the output, by L-BFGS."""
    scale = hidden.std(dim=(0, 1)) + 1e-6
    features = (hidden - hidden.mean(dim=(0, 1))) / scale
    weight = torch.zeros(hidden.shape[2], device=hidden.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = importance_loss(features @ weight, importance) + _DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scorer.importance.weight.copy_(weight[None] / scale)
    scorer.importance.bias.zero_()  # the same for all patches of an image, so that it changes nothing


def _solve_similarity(
    scorer: LifeRegressor,
    hidden: Float[Tensor, "images patches width"],
    patches: Float[Tensor, "images patches dim"],
    embedding: Float[Tensor, "images patches dim"],
) -> None:
    """Ridge regression on the main directions of the target vectors of unit length, whose cosines are the target."""
    width = scorer.embedding_dim
    target = F.normalize(embedding, dim=2).flatten(0, 1).double()
    directions = torch.linalg.eigh(target.T @ target).eigenvectors[:, -width:]
    one = hidden.new_ones(*hidden.shape[:2], 1)
    features = torch.cat((hidden, patches, one), dim=2).flatten(0, 1).double()
    products = features.T @ features
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    solution = torch.linalg.solve(products, features.T @ (target @ directions)).float()
    scorer.similarity.weight.copy_(solution[: scorer.width].T)
    scorer.similarity_skip.weight.copy_(solution[scorer.width : -1].T)
    scorer.similarity.bias.copy_(solution[-1])
