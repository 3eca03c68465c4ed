"""The slimmed model: a backbone, a head that decides once, and a schedule or thresholds that follow a budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone, Embedded, Origin, adapt, signature
from ..config import LifeConfig, Mode
from ..errors import ConfigError
from ..measure.flops import counted
from .calibration import Calibration
from .change import Change
from .fixed import run_fixed
from .heads import AttentionRule, LifeHead, Opinion
from .heirs import without_autocast
from .lives import Lives
from .plan import Plan, adaptive_plan, fixed_plan
from .ragged import run_ragged
from .schedule import Cost, Schedule, resolve_drops, solve

__all__ = ["SlimModel", "wrap"]


class SlimModel(nn.Module):
    """A Vision Transformer whose patches live only as long as they are needed.

    Call it as the backbone it wraps. The backbone's modules are shared, not copied, and not changed.

    Attributes:
        backbone: the wrapped model's parts; ``backbone.vit`` is the model itself.
        scorer: what decides; see `heads.py`.
        config: budget, mode, drop points. Change it with `set_budget` and `set_mode`.
        calibration: adaptive mode's thresholds, None before `calibrate`.
        origin: where the backbone came from, if known.
        base: the backbone's signature when it was wrapped: by it `save` knows what has been trained since.
        change: what was learned about the backbone's own weights, already merged; None for an untouched backbone.
    """

    def __init__(self, backbone: Backbone, config: LifeConfig, scorer: LifeHead | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.scorer = scorer or AttentionRule()
        self.training = backbone.training
        self.scorer.train(backbone.training)
        self.calibration: Calibration | None = None
        self.origin: Origin | None = None
        self.base = signature(backbone)
        self.change: Change | None = None
        self.start, self.drops = resolve_drops(backbone.depth, config.start, config.drops)
        self._costs: dict[tuple, Cost] = {}
        self._schedules: dict[tuple[int, int], Schedule] = {}
        self.config = config
        self._settle(config)

    # ---- what a user calls

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Logits, as the backbone gives them."""
        return self.classify(*self._run(images, keep_dead=not self.backbone.reads_class))

    def forward_features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised tokens as timm's ``forward_features``: grid order, dead patches at their last state."""
        tokens, plan = self._run(images, keep_dead=True)
        if plan is not None:
            tokens = _restore(tokens, plan, self.backbone.prefix)
        return self.backbone.norm(tokens)

    def predict(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Lives]:
        """(logits, lives) from one run."""
        tokens, plan = self._run(images, keep_dead=not self.backbone.reads_class)
        logits = self.classify(tokens, plan)
        if plan is None:  # nothing had to be decided
            return logits, Lives.endless(logits.shape[0], self.backbone.grid_of(images), self.backbone.depth)
        return logits, plan.lives()

    def resume(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Tensor:
        """Logits from tokens that are about to enter block ``start``; ``embedded`` says of which images.

        Its own tokens are not read, so one embedding serves all images of a size.
        """
        return self.classify(*self._from_start(tokens, embedded, keep_dead=not self.backbone.reads_class))

    @torch.no_grad()
    def lives(self, images: Float[Tensor, "batch channels height width"]) -> Lives:
        """How long every patch lives; runs the blocks before ``start`` and the head, nothing more."""
        return self.plan(images).lives()

    def plan(self, images: Float[Tensor, "batch channels height width"]) -> Plan:
        """The decision on ``images``, also at budget 1.0 (where a run would not take it)."""
        embedded = self.backbone.embed(images)
        return self.decide(self.before_start(embedded), embedded)

    def set_budget(self, budget: float) -> SlimModel:
        """Spend this fraction of the dense FLOPs from now on. No retraining; returns the model itself."""
        self._settle(self.config.replace(budget=budget))
        return self

    def set_mode(self, mode: Mode) -> SlimModel:
        """``fixed``: every image keeps as many patches; ``adaptive``: its own lives decide. Returns the model."""
        self._settle(self.config.replace(mode=mode))
        return self

    @contextmanager
    def temporarily(self, **changes: Any) -> Iterator[SlimModel]:
        """Other settings for a while; afterwards the exact earlier ones."""
        before = self.config
        try:
            self._settle(before.replace(**changes))
            yield self
        finally:
            self._settle(before)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> SlimModel:
        """Look at unlabelled images, so that adaptive mode meets its budget on average over images like them.

        ``batches`` yields (batch, channels, height, width) tensors; a few hundred images are enough.
        """
        scores = [self._score(images) for images in batches]
        return self.use_calibration(Calibration.of(torch.cat(scores) if scores else torch.empty(0, 1)))

    def use_calibration(self, calibration: Calibration) -> SlimModel:
        """Take adaptive mode's thresholds from ``calibration`` (of this head on this backbone)."""
        previous, self.calibration = self.calibration, calibration
        try:
            self._settle(self.config)
        except Exception:
            self.calibration = previous
            raise
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the life adapter: scorer, settings, calibration, and what was trained of the backbone since it was
        wrapped. See `adapter.py`.
        """
        from .adapter import save

        return save(self, folder)

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs that each image of ``lives`` costs."""
        cost, decided = self.cost(image_size), bool(self.schedule(image_size).drops)
        return [round(cost.total(counts, decided=decided)) for counts in lives.survivors.tolist()]

    # ---- settings to integers

    def cost(self, image_size: tuple[int, int] | None = None) -> Cost:
        """What the parts cost for images of this size (height, width); the decision is counted by running it once."""
        bb, config = self.backbone, self.config
        size = image_size or bb.image_size
        key = (size, config.mode, config.heirs)
        if key not in self._costs:
            embedded = bb.embed(bb.blank(size))
            head, opinion = counted(self.scorer, embedded.tokens, embedded.rope, bb, self.start)
            patches, kin_dim = opinion.kin.shape[1:]
            if config.heirs and opinion.likeness is None:
                head += 2 * kin_dim * patches**2
            heir = 2 * bb.dim if config.heirs and config.mode == "fixed" else 0  # adaptive mode adds, without products
            blocks = tuple(bb.block_flops(i) for i in range(bb.depth))
            self._costs[key] = Cost(patches, bb.prefix, sum(bb.outer_flops(size)), head, blocks, heir)
        return self._costs[key]

    def schedule(self, image_size: tuple[int, int] | None = None) -> Schedule:
        """Patches that enter each block, for images of this size (height, width); adaptive mode: on average."""
        size = image_size or self.backbone.image_size
        if size not in self._schedules:
            self._schedules[size] = self._solve(self.cost(size))
        return self._schedules[size]

    def _settle(self, config: LifeConfig) -> None:
        """Settle the schedule now, so that a bad setting fails here and changes nothing."""
        previous = self.config, self._schedules
        self.config, self._schedules = config, {}
        try:
            self.schedule()
        except Exception:
            self.config, self._schedules = previous
            raise

    def _solve(self, cost: Cost) -> Schedule:
        asked = self.config.survivors
        if asked is not None:
            if len(asked) != cost.depth or asked[0] != cost.patches:
                raise ConfigError(
                    f"survivors must be {cost.depth} numbers that begin with {cost.patches}, got {len(asked)}: {asked}"
                )
            return Schedule(asked, self.start)
        if self.config.mode == "adaptive" and self.calibration is not None:
            return self.calibration.solve(cost, self.config.budget, self.start, self.drops)
        return solve(cost, self.config.budget, self.start, self.drops)

    # ---- one forward pass

    def decide(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Plan:
        """The only decision ever taken, on the tokens that enter block ``start``."""
        with without_autocast(tokens):
            opinion = self._opinion(tokens, embedded)
            score, likeness = opinion.score, opinion.alike() if self.config.heirs else None
        schedule = self.schedule(embedded.image_size)
        if self.config.mode == "fixed":
            return fixed_plan(score, likeness, schedule, embedded.grid)
        if self.training:
            raise ConfigError("adaptive mode is for inference: call .eval() first, or train in fixed mode")
        if self.calibration is None:
            warnings.warn(
                f"adaptive mode was not calibrated; using the first batch ({len(score)} images) for it. "
                "Call model.calibrate(batches) with a few hundred images for a budget that holds",
                stacklevel=4,
            )
            self.use_calibration(Calibration.of(score))
            assert self.calibration is not None
            schedule = self.schedule(embedded.image_size)
        thresholds = self.calibration.thresholds(schedule.survivors, score.shape[1])
        return adaptive_plan(score, likeness, schedule, embedded.grid, thresholds)

    def _score(self, images: Tensor) -> Tensor:
        """What the head says about every patch, before anything is decided or cleaned."""
        embedded = self.backbone.embed(images)
        tokens = self.before_start(embedded)
        with without_autocast(tokens):
            return self._opinion(tokens, embedded).score

    def _opinion(self, tokens: Tensor, embedded: Embedded) -> Opinion:
        """What the head says, in the weights' own precision."""
        tokens = tokens.to(next(self.backbone.parameters()).dtype)
        return self.scorer(tokens, embedded.rope, self.backbone, self.start)

    def classify(self, tokens: Tensor, plan: Plan | None) -> Tensor:
        """Logits from tokens after the last block, in the order of the plan that they ran by."""
        if plan is not None and not self.backbone.pools:  # an answer for each token: the grid's order counts
            tokens = _restore(tokens, plan, self.backbone.prefix)
        return self.backbone.classify(self.backbone.norm(tokens))

    def before_start(self, embedded: Embedded) -> Float[Tensor, "batch tokens dim"]:
        """The tokens that are about to enter block ``start``: all of them."""
        x, bb = embedded.tokens, self.backbone
        for index in range(self.start):
            x = bb.block(index, x, bb.rope_of(embedded.rope, index))
        return x

    def _run(self, images: Tensor, keep_dead: bool) -> tuple[Tensor, Plan | None]:
        """Tokens after the last block in the plan's order, and the plan; None when nothing dies."""
        embedded = self.backbone.embed(images)
        return self._from_start(self.before_start(embedded), embedded, keep_dead)

    def _from_start(self, x: Tensor, embedded: Embedded, keep_dead: bool) -> tuple[Tensor, Plan | None]:
        bb = self.backbone
        if not self.schedule(embedded.image_size).drops:
            for index in range(self.start, bb.depth):
                x = bb.block(index, x, bb.rope_of(embedded.rope, index))
            return x, None
        plan = self.decide(x, embedded)
        return self._live(x, embedded, plan, keep_dead), plan

    def _live(self, x: Tensor, embedded: Embedded, plan: Plan, keep_dead: bool) -> Tensor:
        """Blocks ``start`` to the end, as the plan says."""
        if plan.counts is None:
            return run_fixed(self.backbone, x, embedded.rope, plan, keep_dead)
        return run_ragged(self.backbone, x, embedded.rope, plan)


def _restore(tokens: Tensor, plan: Plan, prefix: int) -> Tensor:
    rank = plan.rank()
    image = torch.arange(rank.shape[0], device=rank.device)[:, None]
    return torch.cat((tokens[:, :prefix], tokens[image, prefix + rank]), dim=1)


def wrap(vit: nn.Module, config: LifeConfig | None = None, scorer: LifeHead | None = None) -> SlimModel:
    """Slim a timm Vision Transformer; works at once, nothing is trained.

    Args:
        vit: the backbone; shared, not changed.
        config: budget and mode; the default is 0.6 of the FLOPs, fixed.
        scorer: who decides; by default the training-free `AttentionRule`.

    Raises:
        UnsupportedModelError: patches of this model cannot be dropped exactly.
        ConfigError: the settings do not fit the model, or the budget is out of its reach.
    """
    return SlimModel(adapt(vit), config or LifeConfig(), scorer)
