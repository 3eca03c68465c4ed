"""The two training stages: regression trains the scorer, slimming trains the blocks that run on fewer patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..slimming import SlimModel
from ..slimming.plan import Plan
from ..slimming.regressor import LifeRegressor, LifeRegressors
from ..slimming.run.fixed import Taps
from ..slimming.run.gated import run_gated
from .dense import DenseTarget, patch_features
from .losses import (
    distillation_loss,
    feature_loss,
    importance_loss,
    pixel_distillation_loss,
    similarity_loss,
    token_loss,
)
from .stage import Stage, Step, TargetSource
from .targets import Targets, image_token, target_starts

_REGRESSION_WEIGHT = 1.0  # of stage 1's loss in stage 2
_SCORER_LR_MULTIPLIER = 0.1  # in stage 2; at the full learning rate the scorer loses what it learned in stage 1
_SCALE_PHOTOS = 256  # whose features give their scales
_AT_ONCE = 8  # of these photos, in memory

__all__ = ["DenseDistillation", "FeatureDistillation", "Regression", "Slimming"]


class Regression(Stage):
    """Stage 1: the scorer regresses importance and similarities of the patches in the dense model; none is dropped."""

    def __init__(self, scorer: LifeRegressor | LifeRegressors) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses of importance and similarity, over all start blocks of the scorer."""
        if isinstance(self.scorer, LifeRegressor):
            losses = [_regression_losses(self.scorer, step.targets)]
        else:
            starts = self.scorer.starts
            losses = [_regression_losses(self.scorer.at(s), step.targets.at_start(s, starts)) for s in starts]
        importance, similarity = (torch.stack(each).sum() for each in zip(*losses, strict=True))
        return importance + similarity, {"importance": importance.item(), "similarity": similarity.item()}


def _regression_losses(scorer: LifeRegressor, targets: Targets) -> tuple[Tensor, Tensor]:
    """(loss of importance, loss of similarity) of one start block."""
    logits, embedding = scorer.regress(targets.tokens)
    return importance_loss(logits, targets.importance), similarity_loss(embedding, targets.embedding)


class Slimming(Stage):
    """Stage 2: a student that drops patches is distilled from the dense model; its scorer is trained too.

    The student shares the blocks before the last start block with the dense model, so a step begins at the tokens among
    the targets and costs the slimmed blocks only, forward and backward. Each step has a random budget, with the
    schedule and the start block of that budget, so that one set of weights serves all budgets. The scorer gets
    gradients through `run_gated`. The loss of stage 1 is added, so that the scorer stays good for classes that are not
    among the photos.

    Attributes:
        model: the student, in fixed mode; its backbone is a copy of the dense model's.

    Args:
        model: see above.
        lowest_budget: the budget of a step is between this value and 1.
        label_weight: of the cross-entropy with labels, see `distillation_loss`.
        features: what is distilled. Of a model without a classifier its features, of one that is used for dense
            prediction those that its head reads; None for a classifier, of which it is the logits.
        image_size: size (height, width) of the images that the targets are of; the model's own if not given.
        token_weight: of the `token_loss`, which is added; not for dense prediction.
    """

    def __init__(
        self,
        model: SlimModel,
        lowest_budget: float,
        label_weight: float,
        features: FeatureDistillation | DenseDistillation | None = None,
        image_size: tuple[int, int] | None = None,
        token_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.features = model, features
        self.lowest_budget, self.label_weight, self.token_weight = lowest_budget, label_weight, token_weight
        assert isinstance(model.scorer, LifeRegressor | LifeRegressors)
        self._regression = Regression(model.scorer)
        with torch.no_grad():
            self._embedded = model.backbone.embed(model.backbone.blank(image_size))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation loss at the step's random budget, plus the loss of stage 1."""
        budget = self.lowest_budget + (1 - self.lowest_budget) * step.random_draw
        self.model.set_budget(round(budget, 3))  # it stays: with gradient checkpointing, backward runs blocks again
        own = step.targets.at_start(self.model.start, target_starts(self.model))
        loss, numbers = self._distillation(step._replace(targets=own))
        regression, _ = self._regression(step)
        return loss + _REGRESSION_WEIGHT * regression, {"budget": budget, **numbers}

    def _distillation(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """(loss, numbers to log) at the budget of the model."""
        if isinstance(self.features, DenseDistillation):
            late = self._late_features(step.targets.tokens, self.features.dense)
            return self.features(late, step.targets, self._embedded.grid)
        blocks = range(self.model.start, self.model.backbone.depth) if self.token_weight else ()
        taps = dict.fromkeys(blocks, step.targets.tokens)
        tokens, plan = self._last_tokens(step.targets.tokens, taps)
        loss, numbers = self._output_loss(tokens, plan, step)
        if not taps:
            return loss, numbers
        each = torch.stack([image_token(self.model.backbone, tapped) for tapped in taps.values()], dim=1)
        distance = token_loss(each, step.targets.image_tokens)
        return loss + self.token_weight * distance, numbers | {"token_cosine": 1 - distance.item()}

    def _output_loss(self, tokens: Tensor, plan: Plan | None, step: Step) -> tuple[Tensor, dict[str, float]]:
        """(loss of logits or features, numbers to log)."""
        output = self.model.classify(tokens, plan)
        if self.features is not None:
            return self.features(output, self._patches(tokens, plan), step.targets)
        loss, divergence = distillation_loss(output, step.targets.output, step.labels, self.label_weight)
        return loss, {"divergence": divergence.item()}

    def lr_multiplier(self, name: str) -> float:
        """Smaller for the scorer, which stage 1 has trained already."""
        return _SCORER_LR_MULTIPLIER if ".scorer." in f".{name}" else 1.0

    def _last_tokens(
        self, x: Float[Tensor, "batch tokens dim"], taps: Taps | None = None
    ) -> tuple[Tensor, Plan | None]:
        """(tokens after the last block, in the plan's order; the plan, or None if no patch is dropped).

        ``x`` is the input of the start block. ``taps`` gets the tokens after each block that it names, in the same
        order. Gates are used although the student is in eval mode. `SlimModel.resume` uses them in training mode only,
        which would also turn dropout and drop path on.
        """
        model, backbone, embedded = self.model, self.model.backbone, self._embedded
        if not model.schedule(embedded.image_size).drops:
            for index in range(model.start, backbone.depth):
                x = backbone.block(index, x, backbone.rope_of(embedded.rope, index))
                if taps and index in taps:
                    taps[index] = x
            return x, None
        scores = model.score(x, embedded)
        plan = model.make_plan(scores, embedded)
        keep_dropped = bool(taps) or not backbone.reads_class or self._distils_patches
        run = backbone, x, embedded.rope, plan, scores.embedding, keep_dropped
        return run_gated(*run, taps, model.settings.restore_by), plan

    def _late_features(
        self, x: Float[Tensor, "batch tokens dim"], dense: DenseTarget
    ) -> Float[Tensor, "batch patches late_dim"]:
        """The features of the blocks that slimming changes; ``x`` is the input of the start block."""
        backbone, taps = self.model.backbone, dict.fromkeys(dense.late, x)
        _, plan = self._last_tokens(x, taps)
        each = [tapped if plan is None else plan.in_grid_order(tapped, backbone.prefix) for tapped in taps.values()]
        return patch_features(backbone, each)

    @property
    def _distils_patches(self) -> bool:
        return isinstance(self.features, FeatureDistillation) and self.features.patch_weight > 0

    def _patches(self, tokens: Tensor, plan: Plan | None) -> Float[Tensor, "batch patches dim"] | None:
        """The patches after the last norm, in grid order; None if they are not distilled."""
        if not self._distils_patches:
            return None
        prefix = self.model.backbone.prefix
        tokens = tokens if plan is None else plan.in_grid_order(tokens, prefix)
        return self.model.backbone.norm(tokens)[:, prefix:]


class FeatureDistillation(nn.Module):
    """What is distilled of a model without a classifier: its output, and the patches after the last norm.

    Dropped patches count too, as `LifeConfig.restore` fills their places, so that dense features stay useful.

    Args:
        cache: the photos; the scales of the features come from the first ones.
        patch_weight: weight of the loss of the patches, in [0, 1]; the loss of the output has the rest.
    """

    output_scale: Tensor
    patch_scale: Tensor

    def __init__(self, cache: TargetSource, patch_weight: float) -> None:
        super().__init__()
        has_patches = cache.targets([0]).patches.shape[1] > 0
        self.patch_weight = patch_weight if has_patches else 0.0
        self.register_buffer("output_scale", _scale(targets.output for targets in _first(cache)))
        if has_patches:
            self.register_buffer("patch_scale", _scale(targets.patches for targets in _first(cache)))

    def forward(self, output: Tensor, patches: Tensor | None, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """(loss, cosine similarities for the log)."""
        loss, cosine = feature_loss(output, targets.output, self.output_scale)
        if patches is None:
            return loss, {"cosine": cosine.item()}
        of_patches, patch_cosine = feature_loss(patches, targets.patches, self.patch_scale)
        loss = (1 - self.patch_weight) * loss + self.patch_weight * of_patches
        return loss, {"cosine": cosine.item(), "patch_cosine": patch_cosine.item()}


class DenseDistillation(nn.Module):
    """What is distilled for dense prediction: patch features and, with a head, its answers for every pixel.

    Dropped patches count as all others.

    Attributes:
        dense: the blocks and the head.
        patch_weight: weight of the loss of the features, in [0, 1]; that of the answers has the rest. 1 without a head.

    Args:
        cache: the photos; the scales of the features come from the first ones.
        dense: see above.
        patch_weight: see above.
    """

    scale: Tensor

    def __init__(self, cache: TargetSource, dense: DenseTarget, patch_weight: float) -> None:
        super().__init__()
        self.dense, self.patch_weight = dense, 1.0 if dense.head is None else patch_weight
        scale = _scale(targets.patches for targets in _first(cache))
        self.register_buffer("scale", dense.late_part(scale[None, None])[0, 0])

    def forward(
        self, late: Float[Tensor, "batch patches late_dim"], targets: Targets, grid: tuple[int, int]
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, numbers for the log); ``late`` are the student's features of the late blocks."""
        features = self.dense.with_late(targets.patches, late)
        loss, cosine = feature_loss(self.dense.late_part(features), self.dense.late_part(targets.patches), self.scale)
        numbers = {"patch_cosine": cosine.item()}
        if self.dense.head is not None:
            with torch.no_grad():
                expected = self.dense.answers(targets.patches, grid)
            of_pixels, divergence = pixel_distillation_loss(self.dense.answers(features, grid), expected)
            loss = (1 - self.patch_weight) * of_pixels + self.patch_weight * loss
            numbers["pixel_divergence"] = divergence.item()
        return loss, numbers


def _first(cache: TargetSource) -> Iterator[Targets]:
    """The targets of the first photos, a few photos at a time."""
    count = min(_SCALE_PHOTOS, len(cache))
    for begin in range(0, count, _AT_ONCE):
        yield cache.targets(range(begin, min(begin + _AT_ONCE, count)))


def _scale(features: Iterable[Float[Tensor, "some *tokens dim"]]) -> Float[Tensor, "dim"]:
    """Standard deviation of each channel; at least a hundredth of the root mean square of all channels."""
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for values in features:
        values = values.double().flatten(0, -2)
        count, total, squares = count + len(values), total + values.sum(dim=0), squares + values.square().sum(dim=0)
    mean_square = squares / count
    deviation = (mean_square - (total / count).square()).clamp(min=0).sqrt()
    return deviation.clamp(min=max(1e-6, 0.01 * mean_square.mean().sqrt().item())).float()
