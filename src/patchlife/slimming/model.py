"""The slimmed model: a backbone, a scorer that decides once, and a schedule or thresholds that follow a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone, Embedded, Origin, adapt, resident, signature
from ..backbones.weight_delta import Change
from ..config import LifeConfig, Mode
from ..errors import ConfigError
from ..flop_counter import counted
from .calibration import Calibration, images_in
from .features import Indices, block_indices, intermediates
from .lives import Lives
from .merging import without_autocast
from .plan import Plan, adaptive_plan, fixed_plan
from .run.adaptive import run_ragged
from .run.fixed import Taps, run_fixed
from .run.gated import run_gated
from .schedule import Cost, Schedule, resolve_drops, solve
from .scorers import AttentionRule, LifeHead, Opinion
from .wrapper import Surroundings, from_bytes, to_bytes

__all__ = ["SlimModel", "wrap"]

ImageBatch = Float[Tensor, "batch channels height width"]


class SlimModel(Surroundings):
    """A Vision Transformer whose patches take part in only as many blocks as they are needed in.

    Call it as the backbone it wraps. The backbone's modules are shared, not copied, and not changed; its attributes,
    the names of its parameters and its state-dict keys are this model's, too (see `Surroundings`).

    Attributes:
        vit: the wrapped model.
        backbone: the same, seen as the parts that the method needs.
        scorer: what decides; see `heads.py`. A learned one that may learn (``requires_grad``) gets gradients in
            training mode; adapters bring theirs frozen.
        config: budget, mode, drop points. Change it with `set_budget`, `set_mode` and `temporarily`.
        calibrations: adaptive mode's thresholds, by the number of patches of an image.
        origin: where the backbone came from, if known.
        base: the backbone's signature when it was wrapped: by it `save` knows what has been trained since.
        change: what was learned about the backbone's own weights, already merged; None for an untouched backbone.
    """

    backbone: Backbone
    scorer: LifeHead

    def __init__(self, backbone: Backbone, config: LifeConfig, scorer: LifeHead | None = None) -> None:
        super().__init__(backbone.vit, scorer or AttentionRule())
        self.__dict__["backbone"] = backbone  # no child module: all its modules are children already
        self.calibrations: dict[int, Calibration] = {}
        self.origin: Origin | None = None
        self.base = signature(backbone)
        self.change: Change | None = None
        self.start, self.drops = resolve_drops(backbone.depth, config.start, config.drops)
        self._costs: dict[tuple, Cost] = {}
        self._schedules: dict[tuple, Schedule] = {}
        self.config = config
        self._settle(config)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "scorer":  # thresholds and costs were the earlier one's
            self.scorer.train(self.training)
            self.calibrations, self._costs = {}, {}
            self._settle(self.config)

    # ---- one forward pass

    def forward(self, images: ImageBatch) -> Tensor:
        """Logits, as the backbone gives them."""
        return self.classify(*self._run(images, keep_dead=not self.backbone.reads_class))

    def _run(self, images: Tensor, keep_dead: bool, taps: Taps | None = None) -> tuple[Tensor, Plan | None]:
        """Tokens after the last block in the plan's order, and the plan; None when nothing is dropped."""
        with self._entered():
            embedded = self.backbone.embed(images)
            return self._from_start(self.before_start(embedded, taps), embedded, keep_dead, taps)

    def before_start(self, embedded: Embedded, taps: Taps | None = None) -> Float[Tensor, "batch tokens dim"]:
        """The tokens that are about to enter block ``start``: all of them."""
        return self._dense(embedded.tokens, embedded, range(self.start), taps)

    def _dense(self, x: Tensor, embedded: Embedded, blocks: range, taps: Taps | None) -> Tensor:
        for index in blocks:
            x = self.backbone.block(index, x, self.backbone.rope_of(embedded.rope, index))
            if taps and index in taps:
                taps[index] = x
        return x

    def _from_start(
        self, x: Tensor, embedded: Embedded, keep_dead: bool, taps: Taps | None = None
    ) -> tuple[Tensor, Plan | None]:
        learns = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.scorer.parameters())
        if not self._schedule_of(embedded).drops:
            x = self._dense(x, embedded, range(self.start, self.backbone.depth), taps)
            return (_with_no_gradient_to(self.scorer, x) if learns else x), None
        plan, opinion = self._decide(x, embedded)
        if plan.counts is not None:
            return self._run_adaptive(x, embedded, plan, taps), plan
        if learns and not taps:
            return run_gated(self.backbone, x, embedded.rope, plan, opinion.kin, keep_dead), plan
        return run_fixed(self.backbone, x, embedded.rope, plan, keep_dead, taps), plan

    def _run_adaptive(self, x: Tensor, embedded: Embedded, plan: Plan, taps: Taps | None) -> Tensor:
        return run_ragged(self.backbone, x, embedded.rope, plan, taps=taps)

    def decide(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Plan:
        """The only decision ever taken, on the tokens that enter block ``start``.

        Raises ConfigError in adaptive mode, if there are no thresholds for images of this size.
        """
        return self._decide(tokens, embedded)[0]

    def _decide(self, tokens: Tensor, embedded: Embedded) -> tuple[Plan, Opinion]:
        with without_autocast(tokens):
            opinion = self._opinion(tokens, embedded)
            score, likeness = opinion.score, opinion.alike() if self.config.heirs else None
        schedule = self._schedule_of(embedded)
        if self.config.mode == "fixed":
            return fixed_plan(score, likeness, schedule, embedded.grid), opinion
        if self.training:
            raise ConfigError("adaptive mode is for inference: call .eval() first, or train in fixed mode")
        calibration = self._calibration_for(score.shape[1], embedded.image_size)
        thresholds = calibration.thresholds(schedule.survivors, score.shape[1])
        return adaptive_plan(score, likeness, schedule, embedded.grid, thresholds), opinion

    def _opinion(self, tokens: Tensor, embedded: Embedded) -> Opinion:
        """What the scorer says, in the weights' own precision."""
        return self.scorer(tokens.to(self.backbone.dtype), embedded.rope, self.backbone, self.start)

    def classify(self, tokens: Tensor, plan: Plan | None) -> Tensor:
        """Logits from tokens after the last block, in the order of the plan that they ran by."""
        if plan is not None and not self.backbone.pools:  # an answer for each token: the grid's order counts
            tokens = _restore(tokens, plan, self.backbone.prefix)
        return self.backbone.classify(self.backbone.norm(tokens))

    # ---- other things to ask of it

    def forward_features(self, images: ImageBatch) -> Float[Tensor, "batch tokens dim"]:
        """Normalised tokens as timm's ``forward_features``: grid order, dropped patches at their last state."""
        tokens, plan = self._run(images, keep_dead=True)
        if plan is not None:
            tokens = _restore(tokens, plan, self.backbone.prefix)
        return self.backbone.norm(tokens)

    def forward_intermediates(
        self,
        x: ImageBatch,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens after some blocks, as timm's ``forward_intermediates``: in grid order, whatever was dropped.

        A dropped patch stands at its last state in every later block.

        Args:
            x: images.
            indices: the last n blocks for a number, these blocks for a list, all for None.
            return_prefix_tokens: give pairs of patches and prefix tokens.
            norm: apply the final norm to them.
            stop_early: has no effect on the result; blocks that nothing asks for run unless ``intermediates_only``.
            output_fmt: NCHW for (batch, dim, rows, cols), NLC for (batch, patches, dim).
            intermediates_only: give the list alone, not (final normalised tokens, list).
            output_dict: give a dict instead, with the keys that timm uses.

        Raises ConfigError for blocks that the model does not have, or another format.
        """
        taps: Taps = dict.fromkeys(block_indices(self.backbone.depth, indices), x)
        tokens, plan = self._run(x, keep_dead=True, taps=taps)
        prefix, grid = self.backbone.prefix, self.backbone.grid_of(x)

        def in_grid_order(tokens: Tensor, block: int) -> Tensor:
            return tokens if plan is None or block < self.start else _restore(tokens, plan, prefix)

        each = [in_grid_order(tapped, block) for block, tapped in taps.items()]
        each = [self.backbone.norm(tapped) for tapped in each] if norm else each
        final = self.backbone.norm(in_grid_order(tokens, self.backbone.depth))
        if not output_dict:
            found = intermediates(each, prefix, grid, output_fmt, return_prefix_tokens)
            return found if intermediates_only else (final, found)
        result: dict[str, Any] = {"image_intermediates": intermediates(each, prefix, grid, output_fmt, False)}
        if return_prefix_tokens and prefix:
            result["image_intermediates_prefix"] = [tapped[:, :prefix] for tapped in each]
        return result if intermediates_only else result | {"image_features": final}

    def get_intermediate_layers(
        self,
        x: ImageBatch,
        n: Indices = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` under the name that DINO's users know; patches as a list unless ``reshape``."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The blocks that ``indices`` means, for timm's feature extractors. Nothing is removed.

        The backbone is the caller's, and its schedule is for the whole depth.
        """
        return block_indices(self.backbone.depth, indices)

    def predict(self, images: ImageBatch) -> tuple[Tensor, Lives]:
        """(logits, lives) from one run."""
        tokens, plan = self._run(images, keep_dead=not self.backbone.reads_class)
        logits = self.classify(tokens, plan)
        if plan is None:  # nothing had to be decided
            grid = self.backbone.grid_of(images)
            return logits, Lives.endless(images.shape[0], grid, self.backbone.depth, tokens.device)
        return logits, plan.lives()

    def resume(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Tensor:
        """Logits from tokens that are about to enter block ``start``; ``embedded`` says of which images.

        Its own tokens are not read, so one embedding serves all images of a size.
        """
        return self.classify(*self._from_start(tokens, embedded, keep_dead=not self.backbone.reads_class))

    @torch.no_grad()
    def lives(self, images: ImageBatch) -> Lives:
        """How long every patch lives; runs the blocks before ``start`` and the scorer, nothing more."""
        return self.plan(images).lives()

    def plan(self, images: ImageBatch) -> Plan:
        """The decision on ``images``, also at budget 1.0 (where a run would not take it)."""
        with self._entered():
            embedded = self.backbone.embed(images)
            return self.decide(self.before_start(embedded), embedded)

    def _entered(self) -> AbstractContextManager[object]:
        """Around a forward pass: nothing that is attached is passed over, and the model's own weights are there."""
        if torch.compiler.is_compiling():
            return nullcontext()
        self._check_attached(self.config)
        return resident(self) if self.backbone.device.type == "meta" else nullcontext()

    def _check_attached(self, config: LifeConfig) -> None:
        adaptive = config.mode == "adaptive"
        self.backbone.check_attached(opened=adaptive, masked=config.heirs and not adaptive)

    # ---- settings

    def set_budget(self, budget: float) -> SlimModel:
        """Spend this fraction of the dense FLOPs from now on. No retraining; returns the model itself."""
        self._settle(self.config.replace(budget=budget))
        return self

    def set_mode(self, mode: Mode) -> SlimModel:
        """``fixed``: every image keeps as many patches; ``adaptive``: its own scores decide. Returns the model."""
        self._settle(self.config.replace(mode=mode))
        return self

    @contextmanager
    def temporarily(self, **changes: Any) -> Iterator[SlimModel]:
        """Other settings for a while; afterwards the exact earlier ones, an explicit schedule included."""
        before = self.config
        try:
            self._settle(before.replace(**changes))
            yield self
        finally:
            self._settle(before)

    @property
    def calibration(self) -> Calibration | None:
        """Thresholds for images of the model's own size, or of the one size that was calibrated; None without any."""
        rows, cols = self.backbone.grid
        only = next(iter(self.calibrations.values())) if len(self.calibrations) == 1 else None
        return self.calibrations.get(rows * cols, only)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Any]) -> SlimModel:
        """Look at unlabelled images, so that adaptive mode meets its budget on average over images like them.

        ``batches`` yields (batch, channels, height, width) tensors, or what data loaders give: tuples that begin with
        one, or dicts that hold one as ``pixel_values``, ``image`` or ``images``. A few hundred images are enough.
        Where images of several sizes will come, give some of each size.

        Raises ConfigError when there are no images in it.
        """
        scores: dict[int, list[Tensor]] = {}
        for batch in batches:
            images = images_in(batch)
            images = images if self.backbone.device.type == "meta" else images.to(self.backbone.device)
            score = self._score(images)
            scores.setdefault(score.shape[1], []).append(score)
        for found in scores.values() if scores else [[torch.empty(0, 1)]]:
            self.use_calibration(Calibration.of(torch.cat(found)))
        return self

    def use_calibration(self, calibration: Calibration) -> SlimModel:
        """Take adaptive mode's thresholds from ``calibration`` (of this scorer on this backbone)."""
        previous, self.calibrations = self.calibrations, {**self.calibrations, calibration.patches: calibration}
        try:
            self._settle(self.config)
        except Exception:
            self.calibrations = previous
            raise
        return self

    def _calibration_for(self, patches: int, image_size: tuple[int, int]) -> Calibration:
        if patches not in self.calibrations:
            known = ", ".join(map(str, self.calibrations)) or "none"
            raise ConfigError(
                f"adaptive mode has no thresholds for images of {image_size[0]} x {image_size[1]} pixels ({patches} "
                f"patches; calibrated for: {known}); call model.calibrate(batches) with a few hundred unlabelled "
                "images of this size, or use fixed mode"
            )
        return self.calibrations[patches]

    def _score(self, images: Tensor) -> Tensor:
        """What the scorer says about every patch, before anything is decided or cleaned."""
        with self._entered():
            embedded = self.backbone.embed(images)
            tokens = self.before_start(embedded)
        with without_autocast(tokens):
            return self._opinion(tokens, embedded).score

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's: the backbone gets a new classifier, and pools as ``global_pool`` says if it is given."""
        self.vit.reset_classifier(num_classes, global_pool)
        self._settle(self.config)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's: the backbone takes images of another size from now on."""
        if self.config.survivors is not None:
            raise ConfigError(
                f"this model has an explicit schedule for {self.config.survivors[0]} patches; call set_budget first, "
                "so that the schedule follows the image size"
            )
        self.vit.set_input_size(img_size=img_size, patch_size=patch_size)
        self._settle(self.config)

    # ---- state dict

    def get_extra_state(self) -> Tensor:
        """Settings and calibration, for the state dict: a JSON text as a tensor of bytes."""
        about = {
            "config": self.config.to_dict(),
            "start": self.start,
            "drops": self.drops,
            "calibrations": [calibration.to_dict() for calibration in self.calibrations.values()],
            "base": self.base,
            "change": {"base": self.change.base, "classes": self.change.classes} if self.change else None,
        }
        return to_bytes(json.dumps(about))

    def set_extra_state(self, state: Tensor) -> None:
        """Take settings and calibration from a state dict. Raises ConfigError for a tensor that does not hold them."""
        try:
            about = json.loads(from_bytes(state))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"the state dict's settings (_extra_state) are damaged: {error}") from None
        config = LifeConfig.from_dict(about["config"])
        self.start, self.drops = resolve_drops(self.backbone.depth, about["start"], tuple(about["drops"]))
        self.calibrations = {c.patches: c for c in map(Calibration.from_dict, about["calibrations"])}
        self._settle(config)
        self._loading = about

    def weight_delta(self) -> dict[str, Tensor]:
        """What was learned about the backbone's own weights, already merged into them; empty where nothing was."""
        return self.change.tensors if self.change else {}

    def extra_repr(self) -> str:
        """Shown by ``repr`` beside the backbone's modules."""
        return f"budget={self.config.budget:g}, mode={self.config.mode}, kept={self.schedule()}, scorer={self.scorer}"

    def loaded(self, delta: dict[str, Tensor], bare: bool) -> None:
        """Called when a state dict was loaded; ``bare``: it was the backbone's own, without anything of ours.

        What was loaded is what `save` compares with from now on.
        """
        about = self.__dict__.pop("_loading")
        self.base = signature(self.backbone) if bare else about["base"]
        self.change = None if bare or about["change"] is None else Change(delta, **about["change"])

    # ---- settings to integers

    def schedule(self, image_size: tuple[int, int] | None = None) -> Schedule:
        """Patches that enter each block, for images of this size (height, width); adaptive mode: on average."""
        size = image_size or self.backbone.image_size
        key = (size, self.backbone.settings)
        if key not in self._schedules:
            self._schedules[key] = self._solve(self.cost(size))
        return self._schedules[key]

    def cost(self, image_size: tuple[int, int] | None = None) -> Cost:
        """What the parts cost for images of this size (height, width)."""
        size = image_size or self.backbone.image_size
        key = (size, self.config.mode, self.config.heirs, self.backbone.settings)
        if key not in self._costs:
            self._costs[key] = Cost(*self._counted(size, *key[1:3]))
        return self._costs[key]

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs that each image of ``lives`` costs."""
        cost, decided = self.cost(image_size), bool(self.schedule(image_size).drops)
        return [round(cost.total(counts, decided=decided)) for counts in lives.survivors.tolist()]

    @torch.compiler.assume_constant_result  # plain numbers, settled while a graph is traced and not by it
    def _counted(self, size: tuple[int, int], mode: Mode, heirs: bool) -> tuple:
        """The fields of a `Cost`."""
        bb = self.backbone
        twin = bb.skeleton()
        embedded = twin.embed(twin.blank(size))
        head, opinion = self._counted_scorer(twin, embedded)
        patches, kin_dim = opinion.kin.shape[1:]
        if heirs and opinion.likeness is None:
            head += 2 * kin_dim * patches**2
        heir = 2 * bb.dim if heirs and mode == "fixed" else 0  # adaptive mode adds, without products
        blocks = tuple(bb.block_flops(i) for i in range(bb.depth))
        return patches, bb.prefix, sum(bb.outer_flops(size)), head, blocks, heir

    def _counted_scorer(self, twin: Backbone, embedded: Embedded) -> tuple[int, Opinion]:
        """(FLOPs, opinion) of the scorer on zeros; one that needs real numbers is counted where it is."""
        with torch.no_grad():
            try:
                scorer = twin.of(self.scorer)
                return counted(scorer, embedded.tokens, embedded.rope, twin, self.start)
            except Exception:
                real = self.backbone
                tokens = torch.zeros(embedded.tokens.shape, device=real.device, dtype=real.dtype)
                rope = None if embedded.rope is None else torch.zeros(embedded.rope.shape, device=real.device)
                return counted(self.scorer, tokens, rope, real, self.start)

    def _schedule_of(self, embedded: Embedded) -> Schedule:
        """For these images; where patch dropout left only some patches, the same fractions of them."""
        schedule = self.schedule(embedded.image_size)
        patches, there = schedule.survivors[0], embedded.grid[0] * embedded.grid[1]
        if there == patches or self.config.mode == "adaptive":
            return schedule
        return Schedule(tuple(max(1, n * there // patches) for n in schedule.survivors), self.start)

    def _settle(self, config: LifeConfig) -> None:
        """Settle the schedule now, so that a bad setting fails here and changes nothing."""
        previous = self.config, self._schedules
        self.config, self._schedules = config, {}
        try:
            self._check_attached(config)
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
        if self.config.mode == "adaptive" and cost.patches in self.calibrations:
            return self.calibrations[cost.patches].solve(cost, self.config.budget, self.start, self.drops)
        return solve(cost, self.config.budget, self.start, self.drops)


def _restore(tokens: Tensor, plan: Plan, prefix: int) -> Tensor:
    rank = plan.rank()
    image = torch.arange(rank.shape[0], device=rank.device)[:, None]
    return torch.cat((tokens[:, :prefix], tokens[image, prefix + rank]), dim=1)


def _with_no_gradient_to(scorer: nn.Module, x: Tensor) -> Tensor:
    """``x``, with a gradient of 0 for a scorer that was not asked: DistributedDataParallel waits for every weight."""
    nothing = cast(Tensor, sum(p.flatten()[:0].sum() for p in scorer.parameters() if p.requires_grad))
    return x + nothing.to(x.dtype)


def wrap(vit: nn.Module, config: LifeConfig | None = None, scorer: LifeHead | None = None) -> SlimModel:
    """Slim a timm Vision Transformer; works at once, nothing is trained.

    Args:
        vit: the backbone; shared, not changed. ``unwrap()`` of the result gives it back.
        config: budget and mode; the default is 0.6 of the FLOPs, fixed.
        scorer: what decides; by default the training-free `AttentionRule`.

    Raises:
        UnsupportedModelError: patches of this model cannot be dropped exactly, or something that is attached to it
            would be passed over.
        ConfigError: the settings do not fit the model, or the budget is out of its reach.
    """
    return SlimModel(adapt(vit), config or LifeConfig(), scorer)
