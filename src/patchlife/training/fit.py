"""From photos to an adapter: collect targets, train both stages, calibrate, save."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import check_free, save
from ..backbones import adapt
from ..backbones.gated_training import add_gated_delta
from ..backbones.gates import ramps_down_to
from ..backbones.weight_delta import WeightDelta, apply_delta, begin_with, delta_between, delta_since
from ..config import TrainingConfig
from ..data import Preprocess
from ..errors import ConfigError, MissingExtraError
from ..evaluation.timing import conditions
from ..extras import require
from ..io.files import write_atomic
from ..slimming import Calibration, SlimModel, slim_model
from ..slimming.regressor import LifeRegressor, LifeRegressors
from ..version import __version__
from .caches import CALIBRATION_PHOTOS, collect_targets, collect_views
from .checkpoint import check_settings, discard
from .dense import DenseHead, DenseTarget, dense_target, predicts_densely
from .initial_model import LOWEST_BUDGET, initial_model
from .log import check_tracker, seconds_per_step
from .loop import train
from .report import write_report
from .run_settings import REGRESSION, distils_features, stage_configs_of
from .stage import StageConfig, TargetSource
from .stages import DenseDistillation, FeatureDistillation, Regression, Slimming
from .target_cache import Photo, TargetCache
from .targets import target_starts
from .validation import Validation
from .view_targets import ViewTargets

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fitted", "accelerator_for", "fit", "student_of", "work_folder"]


@dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
        model: the slimmed model with its trained scorer, as saved.
        cache: the targets of the training photos; if no stage trains on them, of as many as calibration needs.
        summary: conditions and results, as in ``fit.json``.
    """

    model: SlimModel
    cache: TargetCache
    summary: dict[str, Any]


def fit(
    model: SlimModel,
    photos: Sequence[Photo],
    preprocess: Preprocess,
    out: str | Path,
    config: TrainingConfig | None = None,
    accelerator: Accelerator | None = None,
    validation: Mapping[str, Sequence[Photo]] | None = None,
    head: DenseHead | None = None,
) -> Fitted:
    """Train the scorer of ``model``, and with stage 2 its blocks, on ``photos``; save the result as an adapter.

    An interrupted run resumes when it is called again with the same arguments: caches and checkpoints are in
    `work_folder`. Other arguments are refused, unless ``config.restart`` is set.

    Args:
        model: its backbone is the dense teacher and is not changed. A `LifeRegressor` or `LifeRegressors` as scorer is
            trained further, any other scorer is replaced by a new one for the start blocks of ``config.starts``. So is
            a gated weight delta of an earlier fit, with ``finetune="adapter"``. Budget or schedule, mode, and shapes,
            if they are set, are those of the adapter.
        photos: to train on. Labels are used only if ``config.label_weight`` is above 0.
        preprocess: from a photo to the backbone's input.
        out: folder of the adapter.
        config: settings of the training.
        accelerator: processes, device and trackers of the caller, who ends them (``accelerator.end_training()``);
            ``config.tracker`` is then not used. Trackers that are not initialised yet are initialised here. Default:
            `accelerator_for` with ``config.tracker``.
        validation: labelled photos by name, to measure accuracy on during training (see `Validation`). For a model
            without a classifier labels are of any classes, or -1 to measure the cosine to the dense embedding only.
            For dense prediction labels are not read.
        head: for dense prediction (target pixels): the head whose answers for every pixel are distilled. It is not
            trained, and not saved.

    Raises:
        ConfigError, ImageError, NumericalError, CheckpointError: see `collect` and `train`.
        AdapterError: ``out`` is a folder with other content, or the backbone cannot be saved (see `adapters.save`).
        MissingExtraError: matplotlib or accelerate is not installed.
    """
    config, out, started = config or TrainingConfig(), Path(out), time.monotonic()
    _check_teacher(model, config)
    require("matplotlib", "train", "the report of a fit")  # before training, not after it
    check_free(out)
    if accelerator is None:
        accelerator = accelerator_for(tracker=config.tracker, folder=work_folder(out))
        try:
            return fit(model, photos, preprocess, out, config, accelerator, validation, head)
        finally:
            if accelerator.trackers:
                accelerator.end_training()
    original, (model, config) = model, initial_model(model, config, preprocess, dense=predicts_densely(config, head))
    dense, scorer = dense_target(model, config, head, preprocess.size), model.scorer
    assert isinstance(scorer, LifeRegressor | LifeRegressors)
    drawn = _random_photos(photos, config)
    stage_configs = stage_configs_of(model, original.scorer, drawn, preprocess, config, dense)
    _prepare_folder(work_folder(out), stage_configs, config, accelerator)
    if not accelerator.trackers:
        accelerator.init_trackers("patchlife", config.to_dict())
    cache, held_out = collect_targets(model, drawn, preprocess, work_folder(out), config, accelerator, dense)
    views = None
    if config.fresh_views:
        views = collect_views(model, drawn, held_out, preprocess, work_folder(out), config, accelerator, dense)
    if not len(cache) or (views is not None and not len(views)):
        raise ConfigError("none of the photos could be read, so there is nothing to train on")
    stage2: TargetSource = cache if views is None else views
    measured = _validation(model, validation or {}, preprocess, work_folder(out), config, accelerator, dense)
    for stage_config in stage_configs:
        if stage_config.name == REGRESSION:
            train(Regression(scorer), cache, stage_config, work_folder(out), accelerator, measured)
        else:
            model = _train_slimming(model, stage2, stage_config, config, work_folder(out), accelerator, measured, dense)
    model.scorer.eval().requires_grad_(False)  # the flags of the backbone stay as the caller set them
    _calibrate(model, cache)
    model.set_mode(original.settings.mode)
    model.origin = original.origin
    summary = {
        "patchlife": __version__,
        "photos": max(len(cache), 0 if views is None else len(views)),
        "skipped": _skipped(cache, views),
        "stages": [stage_config.name for stage_config in stage_configs],
        "validation": {name: len(photos) for name, photos in measured.sets.items()} if measured else {},
        "seconds": round(time.monotonic() - started, 1),
        "seconds_per_step": {
            each.name: seconds_per_step(
                work_folder(out) / "metrics.jsonl",
                each.name,
                min(config.batch_size, len(cache if each.name == REGRESSION else stage2)),
            )
            for each in stage_configs
        },
        "config": config.to_dict(),
        "life": model.full_settings().to_dict(),
        "conditions": conditions(accelerator.device)
        | {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision},
    }
    if accelerator.is_main_process:
        save(model, out)
        write_atomic(work_folder(out) / "fit.json", json.dumps(summary, indent=2) + "\n")
        write_report(
            work_folder(out) / "report.html",
            model,
            held_out,
            preprocess,
            work_folder(out) / "metrics.jsonl",
            summary,
            dense,
            measured.sets if measured else None,
        )
    accelerator.wait_for_everyone()
    return Fitted(model, cache, summary)


def work_folder(out: str | Path) -> Path:
    """The folder of a fit's cache, checkpoints and metrics; it can be deleted when the adapter is finished."""
    return Path(out).with_name(Path(out).name + ".work")


def accelerator_for(device: str = "auto", tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """An accelerator for the processes that were launched; bfloat16 where a GPU supports it.

    ``tracker`` is the name of a tracker of accelerate, which keeps its files, if any, in ``folder``.

    Raises MissingExtraError without accelerate, ConfigError for a tracker that is unknown or not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingExtraError("accelerate", "train", "patchlife fit") from None
    if tracker is not None:
        check_tracker(tracker)
    gpu = device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return Accelerator(
        cpu=device == "cpu", mixed_precision="bf16" if gpu else "no", log_with=tracker, project_dir=folder
    )


def _check_teacher(model: SlimModel, config: TrainingConfig) -> None:
    """Raise ConfigError for a model that cannot be the dense teacher of this training."""
    backbone = model.backbone
    if backbone.model.training:
        raise ConfigError("the teacher must be in eval mode, but the model is in training mode; call .eval() first")
    if backbone.dtype != torch.float32:
        raise ConfigError(
            f"fit trains weights in float32, got a model in {backbone.dtype}; load it in float32, or call .float()"
        )
    if config.label_weight and not backbone.num_classes:
        raise ConfigError(
            f"label_weight needs a classifier, which this model does not have; got {config.label_weight:g}, set it to 0"
        )


def _random_photos(photos: Sequence[Photo], config: TrainingConfig) -> list[Photo]:
    """At most ``config.photos`` photos in random order, so that the first ones are a random sample too."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [photos[i] for i in order[: config.photos]]


def _prepare_folder(
    folder: Path, stage_configs: Sequence[StageConfig], config: TrainingConfig, accelerator: Accelerator
) -> None:
    """Create the work folder and compare its checkpoints with this run, before any work is done.

    Raises CheckpointError if there is one of a run with other settings, unless ``config.restart`` discards it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.restart and accelerator.is_main_process:
        for stage in [path for path in folder.iterdir() if path.is_dir()]:
            discard(stage)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    for stage_config in stage_configs:
        check_settings(folder / stage_config.name, stage_config.settings())


def _validation(
    model: SlimModel,
    sets: Mapping[str, Sequence[Photo]],
    preprocess: Preprocess,
    folder: Path,
    config: TrainingConfig,
    accelerator: Accelerator,
    dense: DenseTarget | None,
) -> Validation | None:
    """The validation sets, in the main process only; the others wait for it at their next step."""
    if not sets or not accelerator.is_main_process:
        return None
    cache = config.cache or folder / "cache"
    return Validation.from_photos(model, sets, preprocess, cache.with_name(f"{cache.name}-validation"), config, dense)


def _skipped(cache: TargetCache, views: ViewTargets | None) -> list[dict[str, Any]]:
    """Path, error and index of each photo that could not be read, once."""
    entries = [*cache.skipped, *([] if views is None else views.photos.skipped)]
    return list({entry["index"]: entry for entry in entries}.values())


def _train_slimming(
    model: SlimModel,
    cache: TargetSource,
    stage_config: StageConfig,
    config: TrainingConfig,
    folder: Path,
    accelerator: Accelerator,
    validation: Validation | None = None,
    dense: DenseTarget | None = None,
) -> SlimModel:
    """Train stage 2; the model with the weight delta of the student merged."""
    teacher, student = model.backbone.model, student_of(model, config, dense.end if dense else None)
    features: FeatureDistillation | DenseDistillation | None = None
    if dense is not None:
        features = DenseDistillation(cache, dense, config.patch_weight)
    elif distils_features(model, config):
        features = FeatureDistillation(cache, config.patch_weight)
    assert config.lowest_budget is not None  # `initial_model` has filled in the default
    stage = Slimming(
        student, config.lowest_budget, config.label_weight, features, cache.image_size, config.token_weight
    )
    train(stage, cache, stage_config, folder, accelerator, validation)
    delta = delta_between(student.backbone, model.backbone)
    earlier = delta_since(model.backbone, model.base, model.delta) or WeightDelta({}, model.base)
    gates = student.backbone.gated
    learned = replace(earlier, tensors=earlier.tensors | delta, gates=gates.ramps if gates is not None else None)
    static = {} if learned.gates else delta
    return slim_model(adapt(apply_delta(teacher, static)), model.settings, model.scorer).use_delta(learned)


def student_of(model: SlimModel, config: TrainingConfig, end: int | None = None) -> SlimModel:
    """The student of stage 2: a copy of ``model`` whose scorer, and blocks from the last start block on, are trained.

    The blocks before the last start block of the scorer stay those of the dense model, so the tokens at every start
    block do too, also at those that no schedule uses yet.

    The scorer is shared with ``model``. With ``finetune="adapter"`` a gated weight delta is trained, of low rank for
    weights of linear layers; it follows the budget of the student, from zero at budget 1.0 to all of it at the
    lowest budget. It begins with the delta of ``model`` if there is one, else at zero. ``end``: the blocks from this
    one on are not trained, because no target depends on them.
    """
    backbone = adapt(copy.deepcopy(model.backbone.model))
    student = SlimModel(backbone, model.settings, model.scorer).eval().requires_grad_(False)
    late = [
        backbone.blocks[index] for index in range(target_starts(student)[-1], backbone.depth if end is None else end)
    ]
    for module in (*late, backbone.final_norm, student.scorer):
        module.requires_grad_(True)
    if config.finetune == "adapter":
        ramps = ramps_down_to(LOWEST_BUDGET if config.lowest_budget is None else config.lowest_budget)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            backbone.gated = add_gated_delta([*late, backbone.final_norm], config.rank, ramps)
        if model.delta is not None and model.delta.gated:
            begin_with(backbone, model.delta.gated)
    return student


def _calibrate(model: SlimModel, cache: TargetCache) -> None:
    """Set the thresholds of adaptive mode for every start block, from the scores of cached photos."""
    rows = min(CALIBRATION_PHOTOS, len(cache))
    for start in model.starts:
        model.use_calibration(Calibration.of(torch.cat(list(_scores(model, cache, rows, start)))), start)


@torch.no_grad()
def _scores(model: SlimModel, cache: TargetCache, rows: int, start: int) -> Iterator[torch.Tensor]:
    device = next(model.scorer.parameters()).device
    for begin in range(0, rows, 32):
        targets = cache.targets(range(begin, min(begin + 32, rows)))
        tokens = targets.at_start(start, target_starts(model)).tokens.to(device)
        yield model.scorer(tokens, None, model.backbone, start).score
