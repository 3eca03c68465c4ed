"""From a folder of photos to an adapter: collect, regress, slim, calibrate, save."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..adapters import check_free, save
from ..backbones import adapt, signature
from ..backbones.identity import fingerprints
from ..backbones.weight_delta import WeightDelta, add_low_rank, apply_delta, delta_between, delta_since
from ..config import TrainingConfig
from ..data import Preprocess, evenly_spaced
from ..errors import ConfigError, MissingExtraError
from ..evaluation.timing import conditions
from ..extras import require
from ..io.files import write_atomic
from ..slimming import Calibration, Scorer, SlimModel
from ..slimming.regressor import LifeRegressor
from ..version import __version__
from .checkpoint import check_settings, discard
from .log import require_tensorboard
from .loop import train
from .report import write_report
from .stage import StageConfig
from .stages import Regression, Slimming
from .target_cache import Photo, TargetCache, checksum, collect, content_of
from .targets import compute_targets
from .validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fitted", "accelerator_for", "fit", "student_of", "work_folder"]

_REGRESSION = "regression"
_COMPARED = 1000  # photos that are looked at to tell whether an earlier run had the same ones
_CALIBRATION_ROWS = 256
_HELD_OUT = 64  # photos for the report, a twentieth where there are few


@dataclass(frozen=True)
class Fitted:
    """What came out.

    Attributes:
        model: slimmed, with its learned head; saved already.
        cache: what it learned from.
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
    validated: Mapping[str, Sequence[Photo]] | None = None,
) -> Fitted:
    """Learn the lives of ``model``'s patches on ``photos`` and save them as an adapter.

    A run that was interrupted goes on where it stopped when it is called again with the same arguments: caches
    and checkpoints lie in `work_folder`. With other arguments it is refused, unless ``config.restart`` is set.

    Args:
        model: its backbone is the dense teacher, and is not changed; its start block and drop points are learned
            for. A head that was learned already is learned further, others are replaced. Its settings (budget or
            schedule, mode) are those of the adapter.
        photos: to learn from. Labels are read only where ``config.label_weight`` asks for them.
        preprocess: how a photo becomes the backbone's input.
        out: folder of the adapter.
        config: how to learn.
        accelerator: where to learn; by default whatever accelerate finds.
        validated: labelled photos by name, on which to measure meanwhile (see `Validation`); nothing is learned from them.

    Raises:
        ConfigError, ImageError, NumericalError, CheckpointError: see `collect` and `train`.
        AdapterError: ``out`` is a folder of something else, or the backbone cannot be saved (see `adapter.save`).
        MissingExtraError: matplotlib or accelerate is not there, or TensorBoard is asked for and not there.
    """
    if model.backbone.vit.training:
        raise ConfigError("the dense model teaches as it predicts, but it is in training mode; call .eval() first")
    config, out, started = config or TrainingConfig(), Path(out), time.monotonic()
    require("matplotlib", "learn", "the report of a fit")  # now, not when all is learned
    if config.tensorboard:
        require_tensorboard()
    check_free(out)
    accelerator = accelerator or accelerator_for()
    given, (model, head) = model, _beginning(model, config)
    drawn = _drawn(photos, config)
    stage_configs = _stage_configs(model, given.scorer, drawn, preprocess, config)
    _prepare(work_folder(out), stage_configs, config, accelerator)
    cache = _collect(model, drawn, preprocess, work_folder(out), config, accelerator)
    if not len(cache):
        raise ConfigError("not one photo could be read, so there is nothing to learn from")
    cache, held_out = cache.split(min(_HELD_OUT, len(cache) // 20))
    validation = _validation(model, validated or {}, preprocess, work_folder(out), config, accelerator)
    for stage_config in stage_configs:
        if stage_config.name == _REGRESSION:
            train(Regression(head), cache, stage_config, work_folder(out), accelerator, validation, config.tensorboard)
        else:
            model = _slimmed(model, cache, stage_config, config, work_folder(out), accelerator, validation)
    model.scorer.eval().requires_grad_(False)  # the backbone is the caller's: its flags stay as they are
    model.use_calibration(_calibration(model, cache)).set_mode(given.config.mode)
    model.origin = given.origin
    summary = {
        "patchlife": __version__,
        "photos": len(cache),
        "skipped": cache.skipped,
        "stages": [stage_config.name for stage_config in stage_configs],
        "validated": {name: len(photos) for name, photos in validation.sets.items()} if validation else {},
        "seconds": round(time.monotonic() - started, 1),
        "config": config.to_dict(),
        "life": model.config.to_dict() | {"start": model.start, "drops": list(model.drops)},
        "conditions": conditions(accelerator.device)
        | {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision},
    }
    if accelerator.is_main_process:
        save(model, out)
        write_atomic(work_folder(out) / "fit.json", json.dumps(summary, indent=2) + "\n")
        write_report(
            work_folder(out) / "report.html", model, held_out, preprocess, work_folder(out) / "metrics.jsonl", summary
        )
    accelerator.wait_for_everyone()
    return Fitted(model, cache, summary)


def work_folder(out: str | Path) -> Path:
    """Where a fit keeps its cache, checkpoints and metrics; safe to delete once the adapter is there."""
    return Path(out).with_name(Path(out).name + ".work")


def accelerator_for(device: str = "auto") -> Accelerator:
    """One process or several, as launched; bfloat16 where a GPU computes it.

    Raises MissingExtraError without accelerate.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingExtraError("accelerate", "learn", "learning lives") from None
    gpu = device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if gpu else "no")


def _beginning(model: SlimModel, config: TrainingConfig) -> tuple[SlimModel, LifeRegressor]:
    """The model as learning begins, the same on every machine, and its head: a new one, or a copy."""
    if model.delta is not None and model.delta.learned:
        raise ConfigError(
            "this adapter has changed the backbone already, so the dense teacher is gone; begin with the backbone or "
            "with an adapter that holds only a head"
        )
    given, backbone, settings = model, model.backbone, model.config.replace(mode="fixed")
    delta_since(backbone, given.base, given.delta)  # what could not be saved is not importance learning for
    if config.finetune != "none":  # an error now is better than one at the step that first draws it
        SlimModel(backbone, settings.replace(budget=config.lowest_budget), model.scorer)
    if isinstance(model.scorer, LifeRegressor):
        head = copy.deepcopy(model.scorer).requires_grad_(True)  # what an earlier fit returned is frozen
    elif not config.epochs:
        raise ConfigError("epochs 0 skips stage 1, but this model has no learned head to go on with")
    else:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            head = LifeRegressor(backbone.dim, backbone.prefix)
    model = SlimModel(backbone, settings, head)
    model.base, model.delta = given.base, given.delta  # what was trained since belongs to the adapter, too
    return model, head


def _drawn(photos: Sequence[Photo], config: TrainingConfig) -> list[Photo]:
    """Photos in random order, as many as are wanted: any beginning of the list is a fair sample."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [photos[i] for i in order[: config.photos]]


def _stage_configs(
    model: SlimModel, scorer: Scorer, photos: Sequence[Photo], preprocess: Preprocess, config: TrainingConfig
) -> list[StageConfig]:
    """The stages of this run, with all that each one's result follows from."""
    also = _known(model, scorer, photos, preprocess, config)
    common: dict[str, Any] = {"batch_size": config.batch_size, "save_every": config.save_every}
    stage_configs = []
    if config.epochs:
        first = StageConfig(
            _REGRESSION, config.epochs, learning_rate=config.learning_rate, seed=config.seed, also=also, **common
        )
        stage_configs.append(first)
        also = first.settings()
    if config.finetune != "none":
        second = StageConfig(
            f"slimming-{config.finetune}",
            config.finetune_epochs,
            learning_rate=config.stage2_learning_rate,
            seed=config.seed + 1,
            after=tuple(stage_config.name for stage_config in stage_configs),
            also=also | _known_of_stage_two(model, photos, config),
            **common,
        )
        stage_configs.append(second)
    return stage_configs


def _known(
    model: SlimModel, scorer: Scorer, photos: Sequence[Photo], preprocess: Preprocess, config: TrainingConfig
) -> dict[str, Any]:
    """What every stage follows from, in a form to be shown and compared; ``scorer`` is what the fit was given."""
    backbone = model.backbone
    weights = checksum({name: value for name, value in signature(backbone).items() if name != "name"})
    learned = isinstance(scorer, LifeRegressor) and checksum(fingerprints(scorer.state_dict()))
    return {
        "seed": config.seed,
        "backbone": f"{backbone.family}, {backbone.depth} blocks of width {backbone.dim}, weights {weights}",
        "photos": f"{len(photos)} ({content_of(evenly_spaced(photos, _COMPARED))})",
        **{f"preprocess {name}": value for name, value in preprocess.to_dict().items()},
        "start": model.start,
        "scorer at the beginning": f"{model.scorer.kind}, weights {learned}" if learned else "a new one",
    }


def _known_of_stage_two(model: SlimModel, photos: Sequence[Photo], config: TrainingConfig) -> dict[str, Any]:
    known: dict[str, Any] = {
        "drops": list(model.drops),
        "merge": model.config.merge,
        "lowest_budget": config.lowest_budget,
        "label_weight": config.label_weight,
    }
    if config.finetune == "adapter":
        known["rank"] = config.rank
    if config.label_weight:
        known["labels"] = checksum([photo.label for photo in photos])
    return known


def _prepare(
    folder: Path, stage_configs: Sequence[StageConfig], config: TrainingConfig, accelerator: Accelerator
) -> None:
    """Make the work folder ours, before anything takes time: no checkpoint of a run with other settings stays in use.

    Raises CheckpointError where there is one, and it is not to be discarded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.restart and accelerator.is_main_process:
        for stage in [path for path in folder.iterdir() if path.is_dir()]:
            discard(stage)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    for stage_config in stage_configs:
        check_settings(folder / stage_config.name, stage_config.settings())


def _collect(
    model: SlimModel,
    photos: list[Photo],
    preprocess: Preprocess,
    folder: Path,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> TargetCache:
    """The targets of all photos; the first process of each machine asks, the others read what it wrote."""
    backbone = model.backbone.to(accelerator.device).eval()
    depends_on = {"backbone": signature(backbone), "start": model.start, "preprocess": preprocess.to_dict()}

    def gather(quiet: bool) -> TargetCache:
        with tqdm(total=len(photos), desc="collect", unit="photo", disable=quiet) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return collect(
                photos,
                lambda images: compute_targets(backbone, images.to(accelerator.device), model.start),
                preprocess,
                config.cache or folder / "cache",
                depends_on=depends_on,
                limit_bytes=config.cache_gb * 1e9,
                max_unreadable=config.max_unreadable,
                report=report,
            )

    with accelerator.local_main_process_first():
        return gather(quiet=not accelerator.is_local_main_process)


def _validation(
    model: SlimModel,
    sets: Mapping[str, Sequence[Photo]],
    preprocess: Preprocess,
    folder: Path,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> Validation | None:
    """What is looked at while learning: by the first process only, the others wait for it at their next step."""
    if not sets or not accelerator.is_main_process:
        return None
    cache = config.cache or folder / "cache"
    return Validation.collected(model, sets, preprocess, cache.with_name(f"{cache.name}-watch"), config)


def _slimmed(
    model: SlimModel,
    cache: TargetCache,
    stage_config: StageConfig,
    config: TrainingConfig,
    folder: Path,
    accelerator: Accelerator,
    validation: Validation | None = None,
) -> SlimModel:
    """Stage 2: a student that shares the teacher's first blocks; returns the model with what it learned merged."""
    teacher, student = model.backbone.vit, student_of(model, config)
    stage = Slimming(student, config.lowest_budget, config.label_weight)
    train(stage, cache, stage_config, folder, accelerator, validation, config.tensorboard)
    delta = delta_between(student.backbone.vit, teacher)
    before = delta_since(model.backbone, model.base, model.delta) or WeightDelta({}, model.base)
    result = SlimModel(adapt(apply_delta(teacher, delta)), model.config, model.scorer)
    result.delta = replace(before, tensors=before.tensors | delta)
    return result


def student_of(model: SlimModel, config: TrainingConfig) -> SlimModel:
    """A copy of ``model`` in which stage 2 may change the head, and the backbone from the start block on.

    The head is ``model``'s own. With ``finetune="adapter"`` linear layers get a change of low rank.
    """
    student = (
        SlimModel(adapt(copy.deepcopy(model.backbone.vit)), model.config, model.scorer).eval().requires_grad_(False)
    )
    backbone = student.backbone
    late = [backbone.vit.blocks[index] for index in range(student.start, backbone.depth)]
    for module in (*late, backbone.vit.norm, student.scorer):
        module.requires_grad_(True)
    if config.finetune == "adapter":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            add_low_rank(late, config.rank)
    return student


def _calibration(model: SlimModel, cache: TargetCache) -> Calibration:
    """Thresholds from the scores of cached photos."""
    return Calibration.of(torch.cat(list(_scores(model, cache, min(_CALIBRATION_ROWS, len(cache))))))


@torch.no_grad()
def _scores(model: SlimModel, cache: TargetCache, rows: int) -> Iterator[torch.Tensor]:
    device = next(model.scorer.parameters()).device
    for begin in range(0, rows, 32):
        tokens = cache.targets(range(begin, min(begin + 32, rows))).tokens.to(device)
        yield model.scorer(tokens, None, model.backbone, model.start).score
