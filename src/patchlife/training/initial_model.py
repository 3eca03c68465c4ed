"""The model with which a fit begins: its scorer, the start blocks of the scorer, and the lowest budget of stage 2."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace

import torch

from ..backbones.gates import ramps_down_to
from ..backbones.weight_delta import WeightDelta, delta_since
from ..config import TrainingConfig
from ..data import Preprocess
from ..errors import ConfigError
from ..slimming import SlimModel, slim_model
from ..slimming.regressor import LifeRegressor, LifeRegressors
from ..slimming.shapes import learned_starts
from .targets import target_starts

__all__ = ["LOWEST_BUDGET", "initial_model"]

_LOWEST_OF_SEVERAL_STARTS = 0.3
LOWEST_BUDGET = 0.35
"""The default lowest budget of stage 2 with one start block."""


def initial_model(
    model: SlimModel, config: TrainingConfig, preprocess: Preprocess, dense: bool = False
) -> tuple[SlimModel, TrainingConfig]:
    """(model at the beginning of training, settings with the lowest budget).

    The scorer is a copy of a learned one, else a new one from the seed. A gated weight delta of an earlier fit is not
    merged: the model's weights are those at budget 1.0. Rank and lowest budget of the settings become those of the
    delta. ``dense``: for dense prediction.
    """
    if model.delta is not None and model.delta.learned:
        config = _continued(model.delta, config)
    original, settings = model, model.settings.replace(mode="fixed")
    delta_since(model.backbone, model.base, model.delta)  # raises now, before training, if it could not be saved later
    backbone = original.dense_backbone()
    model = slim_model(backbone, settings, _initial_scorer(model, config, dense))
    model.base, model.delta = original.base, original.delta  # weights trained since wrapping belong to the adapter too
    if dense and len(target_starts(model)) > 1:
        raise ConfigError(
            f"dense prediction has one start block, got the start blocks {', '.join(map(str, target_starts(model)))}; "
            "set one: LifeConfig(start=...)"
        )
    return model, replace(config, lowest_budget=_lowest_budget(model, config, preprocess))


def _continued(delta: WeightDelta, config: TrainingConfig) -> TrainingConfig:
    """The settings with which a fit trains ``delta``, of an earlier fit, further.

    Raises ConfigError if it cannot, because the weights of the dense teacher are not known, or the gates are others.
    """
    if not delta.gates or config.finetune != "adapter":
        raise ConfigError(
            "the weights of this backbone were trained by an earlier stage 2, so it cannot be the dense teacher; give "
            "the original backbone, an adapter that has only a scorer, or an adapter whose weight delta follows the "
            "budget with --finetune adapter, which trains the delta further"
        )
    lowest = round(1.0 - delta.gates[0].high, 6)
    if delta.gates != ramps_down_to(lowest):
        raise ConfigError("the gates of this adapter's weight delta are of another version; fit it again")
    if config.lowest_budget not in (None, lowest):
        raise ConfigError(
            f"this adapter's weight delta was trained down to budget {lowest:g}, got lowest_budget "
            f"{config.lowest_budget:g}; leave it out"
        )
    rank = min(len(value) for key, value in delta.gated.items() if key.endswith(".down"))
    return replace(config, lowest_budget=lowest, rank=rank)


def _initial_scorer(model: SlimModel, config: TrainingConfig, dense: bool) -> LifeRegressor | LifeRegressors:
    backbone, own, scorer = model.backbone, model.settings, model.scorer
    learned = isinstance(scorer, LifeRegressor | LifeRegressors)
    if isinstance(scorer, LifeRegressor | LifeRegressors) and (
        config.starts is None or config.starts == target_starts(model)
    ):
        if isinstance(scorer, LifeRegressor) and len(model.starts) > 1:
            raise ConfigError(
                f"this scorer was fitted for one start block, got a schedule with {', '.join(map(str, model.starts))}"
            )
        return copy.deepcopy(scorer).requires_grad_(True)  # the scorer of an earlier fit is frozen
    if not config.epochs:
        which = "has no learned scorer" if not learned else f"has no scorer for the start blocks {config.starts}"
        raise ConfigError(f"epochs=0 skips stage 1, but this model {which}; set epochs to 1 or more")
    starts = config.starts
    if starts is None and (own.start is not None or own.drops is not None or own.shapes is not None):
        starts = model.starts
    if starts is None:
        starts = () if dense else learned_starts(backbone.depth)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.starts is None and len(starts) < 2:
            return LifeRegressor(backbone.dim, backbone.prefix)
        if max(starts, default=0) >= backbone.depth:
            raise ConfigError(
                f"starts must be blocks from 1 to {backbone.depth - 1} (the model has {backbone.depth} blocks), "
                f"got {', '.join(map(str, starts))}"
            )
        return LifeRegressors(backbone.dim, backbone.prefix, starts)


def _lowest_budget(model: SlimModel, config: TrainingConfig, preprocess: Preprocess) -> float:
    """The lowest budget of stage 2. Raises ConfigError now, not at the first step that draws it, if out of reach."""
    asked = config.lowest_budget
    if config.finetune == "none":
        return asked or LOWEST_BUDGET
    if asked is None and len(model.starts) > 1:
        with suppress(ConfigError):
            SlimModel(model.backbone, model.settings.replace(budget=_LOWEST_OF_SEVERAL_STARTS), model.scorer).schedule(
                preprocess.size
            )
            return _LOWEST_OF_SEVERAL_STARTS
    lowest = LOWEST_BUDGET if asked is None else asked
    try:
        SlimModel(model.backbone, model.settings.replace(budget=lowest), model.scorer).schedule(preprocess.size)
    except ConfigError as error:
        raise ConfigError(f"lowest_budget of stage 2, now {lowest:g}, must be larger: {error}") from None
    return lowest
