"""The stages of a fit with all settings that change their results: a checkpoint of other settings is not continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backbones import signature
from ..backbones.identity import fingerprints
from ..config import TrainingConfig
from ..data import Preprocess, evenly_spaced
from ..slimming import Scorer, SlimModel
from ..slimming.regressor import LifeRegressor, LifeRegressors
from .dense import DenseTarget
from .stage import StageConfig
from .target_cache import Photo, checksum, content_of
from .targets import target_starts

__all__ = ["REGRESSION", "distils_features", "stage_configs_of"]

REGRESSION = "regression"
"""Name of stage 1."""

_PHOTOS_COMPARED = 1000  # whose content tells whether an earlier run had the same photos


def stage_configs_of(
    model: SlimModel,
    scorer: Scorer,
    photos: Sequence[Photo],
    preprocess: Preprocess,
    config: TrainingConfig,
    dense: DenseTarget | None = None,
) -> list[StageConfig]:
    """The stages of this run, each with all settings that change its result."""
    run_settings = _run_settings(model, scorer, photos, preprocess, config) | (dense.settings() if dense else {})
    common: dict[str, Any] = {"batch_size": config.batch_size, "save_every": config.save_every}
    stage_configs = []
    if config.epochs:
        first = StageConfig(
            REGRESSION,
            config.epochs,
            learning_rate=config.learning_rate,
            seed=config.seed,
            run_settings=run_settings,
            **common,
        )
        stage_configs.append(first)
        run_settings = first.settings()
    if config.finetune != "none":
        second = StageConfig(
            f"slimming-{config.finetune}",
            config.finetune_epochs,
            learning_rate=config.stage2_learning_rate,
            seed=config.seed + 1 + _seed_of(_initial_delta(model)),
            prior_stages=tuple(stage_config.name for stage_config in stage_configs),
            run_settings=run_settings | _stage2_settings(model, photos, config, dense),
            **common,
        )
        stage_configs.append(second)
    return stage_configs


def distils_features(model: SlimModel, config: TrainingConfig) -> bool:
    """Whether stage 2 distils the output and patch features of a model without a classifier, for want of logits."""
    return config.finetune != "none" and not model.backbone.num_classes


def _run_settings(
    model: SlimModel, scorer: Scorer, photos: Sequence[Photo], preprocess: Preprocess, config: TrainingConfig
) -> dict[str, Any]:
    """The settings that change the result of every stage, by name; ``scorer`` is that of the model given to `fit`."""
    backbone, starts = model.backbone, target_starts(model)
    weights = checksum({name: value for name, value in signature(backbone).items() if name != "name"})
    return {
        "seed": config.seed,
        "backbone": f"{backbone.family}, {backbone.depth} blocks of width {backbone.dim}, weights {weights}",
        "photos": f"{len(photos)} ({content_of(evenly_spaced(photos, _PHOTOS_COMPARED))})",
        **{f"preprocess {name}": value for name, value in preprocess.to_dict().items()},
        "start": list(starts) if isinstance(model.scorer, LifeRegressors) else starts[0],
        "initial scorer": _shown_scorer(scorer),
    }


def _initial_delta(model: SlimModel) -> dict[str, str]:
    """The weight delta of an earlier fit that stage 2 trains further; empty without one."""
    gated = model.delta.gated if model.delta is not None else {}
    return {"initial delta": checksum(fingerprints(gated))} if gated else {}


def _shown_scorer(scorer: Scorer) -> str:
    learned = isinstance(scorer, LifeRegressor | LifeRegressors)
    return f"{scorer.kind}, weights {checksum(fingerprints(scorer.state_dict()))}" if learned else "new"


def _seed_of(delta: dict[str, str]) -> int:
    """A part of the seed: a fit that trains a delta further must not see the views of the fit before it again."""
    return int(delta["initial delta"][:6], 16) if delta else 0


def _stage2_settings(
    model: SlimModel, photos: Sequence[Photo], config: TrainingConfig, dense: DenseTarget | None
) -> dict[str, Any]:
    shapes = model.full_settings().shapes
    settings: dict[str, Any] = {
        **({"shapes": [shape.to_dict() for shape in shapes]} if shapes else {"drops": list(model.drops)}),
        "merge": model.settings.merge,
        "lowest_budget": config.lowest_budget,
        "views": config.views,
        "label_weight": config.label_weight,
        **_initial_delta(model),
    }
    if model.settings.restore_by != "last":  # as before there was a choice: earlier checkpoints stay valid
        settings["restore"] = model.settings.restore_by
    if config.finetune == "adapter":
        settings["rank"] = config.rank
    if dense.head is not None if dense else distils_features(model, config):
        settings["patch_weight"] = config.patch_weight
    if config.token_weight:
        settings["token_weight"] = config.token_weight
    if config.label_weight:
        settings["labels"] = checksum([photo.label for photo in photos])
    return settings
