"""What `overhead.py` and `many_patches.py` compare: runs of one backbone, by name, and the parts of a decision.

Weights are random, because time and memory do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import Backbone
from patchlife.benchmarks.baselines.no_decision_bound import NoDecisionBound
from patchlife.benchmarks.baselines.tome import TOME
from patchlife.evaluation.timing import Timing, alternate
from patchlife.slimming.merging import MergeTargets, initial_sizes, key_bias, merge
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run.fixed import reorder

BOUND = "no-decision bound"
OURS = ("slices", "merging", "slices, learned scorer", "merging, learned scorer")
RUNS = ("dense", BOUND, *OURS, "ToMe")
TINY = {"embed_dim": 48, "num_heads": 3, "num_classes": 10}  # to try the scripts


def backbone_model(name: str, pixels: int, tiny: bool = False) -> Any:
    """timm's model ``name`` for images of ``pixels`` x ``pixels``, with random weights; ``tiny``: few channels."""
    torch.manual_seed(0)
    return timm.create_model(name, img_size=pixels, **(TINY if tiny else {})).eval()


def random_images(batch: int, pixels: int) -> Tensor:
    """(batch, 3, pixels, pixels), always the same."""
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def slimmed(vit: Any, run: str, budget: float) -> SlimModel:
    """The slimmed model of one of `OURS`, in fixed mode."""
    model = wrap(vit, LifeConfig(budget=budget, merge=run.startswith("merging")))
    if "learned" in run:
        model.scorer = LifeRegressor(model.backbone.dim, model.backbone.prefix)
    return model.eval()


def bound_of(model: SlimModel) -> NoDecisionBound:
    """The slices of the model's own schedule; nothing is scored, sorted or gathered."""
    return NoDecisionBound(model.backbone, model.schedule())


def build(run: str, vit: Any, images: Tensor, budget: float) -> nn.Module:
    """The model of one of `RUNS`; the bound is that of ``slices``, and ToMe has ``budget`` of the dense FLOPs."""
    if run == "dense":
        return vit
    if run == "ToMe":
        return TOME.build(slimmed(vit, "slices", budget).backbone, budget, images)
    return bound_of(slimmed(vit, "slices", budget)) if run == BOUND else slimmed(vit, run, budget)


def time_over_bound(run: str, vit: Any, images: Tensor, budget: float, **options: Any) -> Timing:
    """``run`` and the no-decision bound in turns; ``options`` are those of `alternate`.

    The bound of one of `OURS` has the schedule of that run, so the ratio is the cost of the decision alone.
    """
    model = build(run, vit, images, budget)
    bound = bound_of(model) if run in OURS else build(BOUND, vit, images, budget)
    metadata = {"run": run, "pixels": images.shape[-1], "batch": len(images), "budget": budget, "dtype": "float32"}
    metadata |= {"schedule": str(bound.schedule), **options.pop("metadata", {})}
    runs: dict[str, Callable[[], object]] = {BOUND: partial(bound, images), run: partial(model, images)}
    return alternate(runs, metadata=metadata, **options)


@torch.inference_mode()
def decision_parts(model: SlimModel, images: Tensor) -> dict[str, Callable[[], object]]:
    """The parts of the decision as functions, on the tokens that enter the start block for ``images``.

    They are: scoring; the plan (order and merge targets); the one gather; all merges with the key biases that they
    cause. What masked attention costs more than attention without a mask is in none of them.
    """
    bb = model.backbone
    embedded = bb.embed(images)
    tokens = model.before_start(embedded)
    scores = model.score(tokens, embedded)
    plan = model.make_plan(scores, embedded)
    targets, schedule = plan.merge_targets, plan.schedule
    order = plan.order if targets is not None else plan.order[:, : schedule.kept[model.start]]
    parts: dict[str, Callable[[], object]] = {
        "score": partial(model.score, tokens, embedded),
        "plan": partial(model.make_plan, scores, embedded),
        "gather": partial(reorder, tokens, embedded.rope, order, bb.prefix),
    }
    if targets is not None:
        x, _ = reorder(tokens, embedded.rope, order, bb.prefix)
        counts = tuple(dict.fromkeys((order.shape[1], *schedule.kept)))
        parts["merge"] = partial(_merges, bb, x, targets, counts)
    return parts


def _merges(bb: Backbone, x: Tensor, targets: MergeTargets, counts: tuple[int, ...]) -> Tensor:
    """What `run_fixed` does at its drop points, without the blocks between them."""
    size = initial_sizes(x.shape[:2], x)
    for before, after in pairwise(counts):
        dropped = targets.of(after, before)
        x, size = merge(x, size, bb.prefix + dropped.rank, dropped.weight)
        key_bias(size).to(x.dtype)
    return x
