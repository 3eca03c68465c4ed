"""The slimmed model: one forward pass of a backbone, with fewer patches in the later blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Embedded, resident
from ..config import Restore
from ..errors import ConfigError
from .calibration import Calibration, bands, images_in
from .features import FeatureExtraction
from .lives import Lives
from .merging import without_autocast
from .plan import Plan, adaptive_plan, fixed_plan
from .run.adaptive import run_adaptive
from .run.fixed import Taps, run_fixed
from .run.gated import run_gated
from .run.mixed import SizeGroup, before_start, by_size, from_start, in_order, lives_in_order
from .scorers import Scores
from .settings import SlimSettings
from .similarity import take

__all__ = ["SlimModel"]

ImageBatch = Float[Tensor, "batch channels height width"]
ImageList = Sequence[Float[Tensor, "channels height width"]]
"""Images of any sizes, for a model that takes them (`Backbone.any_size`)."""


class SlimModel(FeatureExtraction, SlimSettings):
    """A Vision Transformer in which each patch takes part in its own number of blocks, its life.

    Call it as the backbone that it wraps. The backbone's modules are shared, not copied, and not changed; its
    attributes, parameter names and state-dict keys are those of this model too (`wrapper.py`). Settings and schedules
    are in `settings.py`, feature extraction in `features.py`; this file has the forward pass.
    """

    def forward(self, images: ImageBatch | ImageList) -> Any:
        """What the backbone gives; for a model of timm the logits. Images of different sizes: see `output`."""
        return self.output(images)

    def output(self, images: ImageBatch | ImageList) -> Tensor:
        """Logits; for a model without a classifier, the embedding.

        ``images`` may be a list of images of different sizes. They run together, without padding or resizing. Each
        gets the result that it gets alone, at the budget of its own size; results are in the order of the list.

        Raises ConfigError for images that the model does not take; and for different sizes in training mode.
        """
        if not isinstance(images, Tensor):
            return in_order(self._run_list(images), self.classify)
        tokens, plan = self._run(images, keep_dropped=not self.backbone.reads_class)
        return self.classify(tokens, plan)

    def _run(self, images: Tensor, keep_dropped: bool, taps: Taps | None = None) -> tuple[Tensor, Plan | None]:
        """(tokens after the last block, in the plan's order; the plan, or None if no patch is dropped)."""
        with self._prepared():
            embedded = self.backbone.embed(images)
            tokens = self.before_start(embedded, taps)
            return self._run_from_start(tokens, embedded, keep_dropped, taps)

    def _run_list(self, images: ImageList) -> list[SizeGroup]:
        """A list of images after the last block."""
        if not self.backbone.pools:
            raise ConfigError(
                "this model gives a prediction for each patch, so results of different sizes do not form one tensor; "
                "give one batch for each size"
            )
        keep_dropped = not self.backbone.reads_class
        if len(batches := by_size(images)) == 1:
            places, batch = batches[0]
            with self._prepared():
                embedded = self.backbone.embed(batch)
                tokens, plan = self._run_from_start(self.before_start(embedded), embedded, keep_dropped)
            return [SizeGroup(places, embedded, tokens, plan)]
        groups = self._decide_list(batches)
        with self._prepared(packed=True):
            return from_start(self.backbone, groups, self.start, self.settings.restore_by if keep_dropped else "last")

    def _decide_list(self, batches: Sequence[tuple[list[int], Tensor]]) -> list[SizeGroup]:
        """Images of different sizes at the start block, with the decisions."""
        if self.training:
            raise ConfigError(
                "expected images of one size in training mode, got several; call .eval() first, or train on batches of "
                "one size"
            )
        with self._prepared(packed=True):
            groups = before_start(self.backbone, batches, self.start)
            for group in groups:
                if self._schedule_of(group.embedded).drops:
                    group.plan = self.decide(group.tokens, group.embedded)
        return groups

    def _run_from_start(
        self, tokens: Tensor, embedded: Embedded, keep_dropped: bool, taps: Taps | None = None
    ) -> tuple[Tensor, Plan | None]:
        """The decision, then the blocks from the start block on."""
        if not self._schedule_of(embedded).drops:
            tokens = self._run_all_patches(tokens, embedded, range(self.start, self.backbone.depth), taps)
            return (_with_zero_gradient(self.scorer, tokens) if self._trains_scorer() else tokens), None
        scores = self.score(tokens, embedded)
        plan, restore = self.make_plan(scores, embedded), self.settings.restore_by
        if plan.counts is not None:
            return self._adaptive_run(tokens, embedded, plan, taps, restore if keep_dropped else "last"), plan
        run = self.backbone, tokens, embedded.rope, plan
        if self._trains_scorer():
            tokens = run_gated(*run, scores.embedding, keep_dropped, taps, restore)
            return _with_zero_gradient(self.scorer, tokens), plan
        return run_fixed(*run, keep_dropped, taps, restore), plan

    def before_start(self, embedded: Embedded, taps: Taps | None = None) -> Float[Tensor, "batch tokens dim"]:
        """The input of the start block: all tokens."""
        return self._run_all_patches(embedded.tokens, embedded, range(self.start), taps)

    def _run_all_patches(self, x: Tensor, embedded: Embedded, blocks: range, taps: Taps | None) -> Tensor:
        for index in blocks:
            x = self.backbone.block(index, x, self.backbone.rope_of(embedded.rope, index))
            if taps and index in taps:
                taps[index] = x
        return x

    def score(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded, start: int | None = None) -> Scores:
        """The scorer on the input of the start block, in the precision of the weights, without autocast.

        ``start``: the start block of other budgets, whose input ``tokens`` is; that of the present budget if not given.
        """
        if torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(self.backbone.dtype)
        with without_autocast(tokens):
            return self.scorer(tokens, embedded.rope, self.backbone, self.start if start is None else start)

    def make_plan(self, scores: Scores, embedded: Embedded) -> Plan:
        """The only decision of a forward pass.

        Raises ConfigError in adaptive mode, in training or without thresholds for images of this size.
        """
        embedding, schedule = scores.embedding if self.settings.merge else None, self._schedule_of(embedded)
        if self.settings.mode == "fixed":
            with without_autocast(scores.score):
                return fixed_plan(scores.score, embedding, schedule, embedded.grid)
        if self.training:
            raise ConfigError("adaptive mode is for inference: call .eval() first, or train in fixed mode")
        thresholds = self._thresholds(schedule, scores.score.shape[1], embedded.image_size, scores.score.device)
        with without_autocast(scores.score):
            return adaptive_plan(scores.score, embedding, schedule, embedded.grid, thresholds)

    def _adaptive_run(
        self, tokens: Tensor, embedded: Embedded, plan: Plan, taps: Taps | None, restore: Restore
    ) -> Tensor:
        return run_adaptive(self.backbone, tokens, embedded.rope, plan, taps=taps, restore=restore)

    def classify(self, tokens: Float[Tensor, "batch tokens dim"], plan: Plan | None) -> Tensor:
        """Logits from the tokens after the last block, in the order of ``plan``."""
        if plan is not None and not self.backbone.pools:  # a prediction for each token: grid order matters
            tokens = plan.in_grid_order(tokens, self.backbone.prefix)
        return self.backbone.classify(self.backbone.norm(tokens))

    # ---- parts of a forward pass, and its decision

    @overload
    def predict(self, images: ImageBatch) -> tuple[Tensor, Lives]: ...
    @overload
    def predict(self, images: ImageList) -> tuple[Tensor, list[Lives]]: ...
    def predict(self, images: ImageBatch | ImageList) -> tuple[Tensor, Lives | list[Lives]]:
        """(logits, lives) from one forward pass. For a list of images the lives are a list, each of one image."""
        if not isinstance(images, Tensor):
            groups = self._run_list(images)
            return in_order(groups, self.classify), lives_in_order(groups, self.backbone.depth)
        tokens, plan = self._run(images, keep_dropped=not self.backbone.reads_class)
        return self.classify(tokens, plan), self._lives_of(images, plan, tokens.device)

    @overload
    def embedding(self, images: ImageBatch) -> tuple[Tensor, Lives]: ...
    @overload
    def embedding(self, images: ImageList) -> tuple[Tensor, list[Lives]]: ...
    def embedding(self, images: ImageBatch | ImageList) -> tuple[Float[Tensor, "batch width"], Lives | list[Lives]]:
        """(embedding, lives) from one forward pass: the vector that the classifier reads.

        For a model without a classifier the embedding is `output`. For a list of images see `predict`.

        Raises ConfigError for a model that gives one vector per patch.
        """
        if not self.backbone.pools:
            raise ConfigError(
                "this model gives a vector for each patch, not one for the image; build it with pooling, for example "
                "global_pool='avg'"
            )
        if not isinstance(images, Tensor):
            groups = self._run_list(images)
            return in_order(groups, self._pooled), lives_in_order(groups, self.backbone.depth)
        tokens, plan = self._run(images, keep_dropped=not self.backbone.reads_class)
        return self._pooled(tokens, plan), self._lives_of(images, plan, tokens.device)

    def _pooled(self, tokens: Tensor, _: Plan | None) -> Float[Tensor, "batch width"]:
        return self.backbone.pooled(self.backbone.norm(tokens))

    def _lives_of(self, images: Tensor, plan: Plan | None, device: torch.device) -> Lives:
        if plan is not None:
            return plan.lives()
        grid = self.backbone.grid_of(images)
        return Lives.full(images.shape[0], grid, self.backbone.depth, device)

    def resume(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Tensor:
        """Logits from ``tokens``, the input of the start block; ``embedded`` gives image size and rotary tables.

        The tokens of ``embedded`` are not read, so one embedding serves all images of a size.
        """
        tokens, plan = self._run_from_start(tokens, embedded, keep_dropped=not self.backbone.reads_class)
        return self.classify(tokens, plan)

    def resume_intermediates(
        self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded, blocks: Iterable[int]
    ) -> list[Float[Tensor, "batch tokens dim"]]:
        """Tokens after each of ``blocks``, in grid order, from ``tokens``; see `resume`. No norm is applied.

        ``blocks`` are from the start block on, in rising order.
        """
        taps: Taps = dict.fromkeys(blocks, tokens)
        _, plan = self._run_from_start(tokens, embedded, keep_dropped=True, taps=taps)
        if plan is None:
            return list(taps.values())
        index = plan.grid_index(self.backbone.prefix)
        return [take(tapped, index) for tapped in taps.values()]

    @overload
    def lives(self, images: ImageBatch) -> Lives: ...
    @overload
    def lives(self, images: ImageList) -> list[Lives]: ...
    @torch.no_grad()
    def lives(self, images: ImageBatch | ImageList) -> Lives | list[Lives]:
        """The life of every patch; runs the blocks before the start block and the scorer only.

        For a list of images a list of lives, each of one image.
        """
        if not isinstance(images, Tensor):
            return lives_in_order(self._decide_list(by_size(images)), self.backbone.depth)
        return self.plan(images).lives()

    def plan(self, images: ImageBatch) -> Plan:
        """The decision for ``images``, also at budget 1.0, where a forward pass skips it."""
        with self._prepared():
            embedded = self.backbone.embed(images)
            return self.decide(self.before_start(embedded), embedded)

    def decide(self, tokens: Float[Tensor, "batch tokens dim"], embedded: Embedded) -> Plan:
        """The decision from ``tokens``, the input of the start block."""
        return self.make_plan(self.score(tokens, embedded), embedded)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Any]) -> Self:
        """Set the thresholds of adaptive mode, for all budgets, from unlabelled images.

        Adaptive mode then meets its budget on average.

        ``batches`` yields (batch, channels, height, width) tensors, or what data loaders give: tuples that begin with
        one, or dicts that hold one as ``pixel_values``, ``image`` or ``images``. A few hundred images are enough. Give
        images of each size that will be run; thresholds also serve numbers of patches that differ by at most a quarter.
        Lists of images of different sizes are calibrated together where their numbers of patches are as near as that.
        Both are for scorers whose scores are shares of an image (`Scorer.gives_shares`), as those of this library are.

        Raises ConfigError when there are no images.
        """
        scores: dict[int, dict[int, list[Tensor]]] = {start: {} for start in self.starts}
        mixed: dict[int, list[Tensor]] = {start: [] for start in self.starts}
        for batch in batches:
            images = images_in(batch)
            for of_size in [images] if isinstance(images, Tensor) else [found for _, found in by_size(images)]:
                for start, score in self._scores_of(of_size):
                    if isinstance(images, Tensor):
                        scores[start].setdefault(score.shape[1], []).append(score)
                    else:
                        mixed[start] += score
        found: list[tuple[Calibration, int]] = []
        for start in self.starts:
            found += [(Calibration.of(torch.cat(each)), start) for each in scores[start].values()]
            found += [(Calibration.of(band), start) for band in bands(mixed[start], self.scorer.gives_shares)]
        for calibration, start in found or [(Calibration.of([]), self.start)]:
            self.use_calibration(calibration, start)
        return self

    def _scores_of(self, images: ImageBatch) -> Iterator[tuple[int, Float[Tensor, "batch patches"]]]:
        """(start block, scores) for all start blocks; the blocks before them run once."""
        images = images if self.backbone.device.type == "meta" else images.to(self.backbone.device)
        with self._prepared():
            embedded = self.backbone.embed(images)
            tokens, begin = embedded.tokens, 0
            for start in self.starts:
                tokens, begin = self._run_all_patches(tokens, embedded, range(begin, start), None), start
                yield start, self.score(tokens, embedded, start).score

    def _prepared(self, packed: bool = False) -> AbstractContextManager[object]:
        """Around a forward pass: check what is attached to the backbone, and load offloaded weights.

        ``packed``: images of different sizes, whose blocks are not called as modules.
        """
        if torch.compiler.is_compiling():
            return nullcontext()
        self._check_attached(self.settings, packed)
        self.follow_budget()
        offloaded = "_hf_hook" in self.__dict__ and self.backbone.device.type == "meta"
        return resident(self) if offloaded else nullcontext()

    def _trains_scorer(self) -> bool:
        return self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.scorer.parameters())


def _with_zero_gradient(scorer: nn.Module, x: Tensor) -> Tensor:
    """``x``, with a gradient of 0 for what did not run of a scorer, such as the regressors of other start blocks.

    DistributedDataParallel waits for a gradient of every parameter.
    """
    zero = cast(Tensor, sum(p.flatten()[:0].sum() for p in scorer.parameters() if p.requires_grad))
    return x + zero.to(x.dtype)
