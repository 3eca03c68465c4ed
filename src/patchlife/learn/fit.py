"""From a folder of photos to an adapter: collect, regress, slim, calibrate, save."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .. import __version__
from ..backbones import adapt
from ..errors import ConfigError, MissingExtraError
from ..extras import require
from ..files import write_atomic
from ..images import Preprocess
from ..life import Calibration, SlimModel
from ..life.adapter import signature
from ..life.change import Change, add_low_rank, change_of, merged
from ..life.regressor import LifeRegressor
from ..measure.timing import conditions
from .cache import LessonCache, Photo, collect
from .config import LearnConfig
from .log import require_tensorboard
from .loop import Course, train
from .report import write_report
from .stages import Regression, Slimming
from .targets import teach
from .watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fitted", "accelerator_for", "fit", "student_of", "work_folder"]

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
    cache: LessonCache
    summary: dict[str, Any]


def fit(
    model: SlimModel,
    photos: Sequence[Photo],
    preprocess: Preprocess,
    out: str | Path,
    config: LearnConfig | None = None,
    accelerator: Accelerator | None = None,
    watched: Mapping[str, Sequence[Photo]] | None = None,
) -> Fitted:
    """Learn the lives of ``model``'s patches on ``photos`` and save them as an adapter.

    A run that was interrupted goes on where it stopped when it is called again with the same arguments: caches
    and checkpoints lie in `work_folder`.

    Args:
        model: its backbone is the dense teacher, and is not changed; its start block and drop points are learned
            for. A head that was learned already is learned further, others are replaced.
        photos: to learn from. Labels are read only where ``config.label_weight`` asks for them.
        preprocess: how a photo becomes the backbone's input.
        out: folder of the adapter.
        config: how to learn.
        accelerator: where to learn; by default whatever accelerate finds.
        watched: labelled photos by name, on which to measure meanwhile (see `Watch`); nothing is learned from them.

    Raises:
        ConfigError, ImageError, NumericalError, CheckpointError: see `collect` and `train`.
        MissingExtraError: matplotlib or accelerate is not there, or TensorBoard is asked for and not there.
    """
    if model.backbone.vit.training:
        raise ConfigError("the dense model teaches as it predicts, but it is in training mode; call .eval() first")
    config, out, started = config or LearnConfig(), Path(out), time.monotonic()
    require("matplotlib", "learn", "the report of a fit")  # now, not when all is learned
    if config.tensorboard:
        require_tensorboard()
    accelerator = accelerator or accelerator_for()
    origin, (model, head) = model.origin, _beginning(model, config)
    work_folder(out).mkdir(parents=True, exist_ok=True)
    cache = _collect(model, _drawn(photos, config), preprocess, work_folder(out), config, accelerator)
    if not len(cache):
        raise ConfigError("not one photo could be read, so there is nothing to learn from")
    cache, held_out = cache.split(min(_HELD_OUT, len(cache) // 20))
    watch = _watch(model, watched or {}, preprocess, work_folder(out), config, accelerator)
    if config.epochs:
        course = _regression_course(config)
        train(Regression(head), cache, course, work_folder(out), accelerator, watch, config.tensorboard)
    if config.finetune != "none":
        model = _slimmed(model, cache, config, work_folder(out), accelerator, watch)
    model.scorer.eval().requires_grad_(False)  # the backbone is the caller's: its flags stay as they are
    model.use_calibration(_calibration(model, cache))
    model.origin = origin
    summary = {
        "patchlife": __version__,
        "photos": len(cache),
        "skipped": cache.skipped,
        "watched": {name: len(photos) for name, photos in watch.sets.items()} if watch else {},
        "seconds": round(time.monotonic() - started, 1),
        "config": config.to_dict(),
        "life": model.config.to_dict() | {"start": model.start, "drops": list(model.drops)},
        "conditions": conditions(accelerator.device)
        | {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision},
    }
    if accelerator.is_main_process:
        model.save(out)
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


def _beginning(model: SlimModel, config: LearnConfig) -> tuple[SlimModel, LifeRegressor]:
    """The model as learning begins, the same on every machine, and its head: a new one, or a copy."""
    if model.change is not None:
        raise ConfigError(
            "this adapter has changed the backbone already, so the dense teacher is gone; begin with the backbone or "
            "with an adapter that holds only a head"
        )
    backbone, settings = model.backbone, model.config.replace(mode="fixed")
    if config.finetune != "none":  # an error now is better than one at the step that first draws it
        SlimModel(backbone, settings.replace(budget=config.lowest_budget), model.scorer)
    if isinstance(model.scorer, LifeRegressor):
        head = copy.deepcopy(model.scorer).requires_grad_(True)  # what an earlier fit returned is frozen
        return SlimModel(backbone, settings, head), head
    if not config.epochs:
        raise ConfigError("epochs 0 skips stage 1, but this model has no learned head to go on with")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = LifeRegressor(backbone.dim, backbone.prefix)
    return SlimModel(backbone, settings, head), head


def _drawn(photos: Sequence[Photo], config: LearnConfig) -> list[Photo]:
    """Photos in random order, as many as are wanted: any beginning of the list is a fair sample."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [photos[i] for i in order[: config.photos]]


def _collect(
    model: SlimModel,
    photos: list[Photo],
    preprocess: Preprocess,
    folder: Path,
    config: LearnConfig,
    accelerator: Accelerator,
) -> LessonCache:
    """The lessons of all photos; the first process of each machine asks, the others read what it wrote."""
    backbone = model.backbone.to(accelerator.device).eval()
    about = {"backbone": signature(backbone), "start": model.start, "preprocess": preprocess.to_dict()}

    def gather(quiet: bool) -> LessonCache:
        with tqdm(total=len(photos), desc="collect", unit="photo", disable=quiet) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return collect(
                photos,
                lambda images: teach(backbone, images.to(accelerator.device), model.start),
                preprocess,
                config.cache or folder / "cache",
                about=about,
                limit_bytes=config.cache_gb * 1e9,
                max_unreadable=config.max_unreadable,
                report=report,
            )

    with accelerator.local_main_process_first():
        return gather(quiet=not accelerator.is_local_main_process)


def _watch(
    model: SlimModel,
    sets: Mapping[str, Sequence[Photo]],
    preprocess: Preprocess,
    folder: Path,
    config: LearnConfig,
    accelerator: Accelerator,
) -> Watch | None:
    """What is looked at while learning: by the first process only, the others wait for it at their next step."""
    if not sets or not accelerator.is_main_process:
        return None
    cache = config.cache or folder / "cache"
    return Watch.collected(model, sets, preprocess, cache.with_name(f"{cache.name}-watch"), config)


def _regression_course(config: LearnConfig) -> Course:
    return Course(
        "regression",
        config.epochs,
        config.batch_size,
        config.learning_rate,
        save_every=config.save_every,
        seed=config.seed,
    )


def _slimmed(
    model: SlimModel,
    cache: LessonCache,
    config: LearnConfig,
    folder: Path,
    accelerator: Accelerator,
    watch: Watch | None = None,
) -> SlimModel:
    """Stage 2: a student that shares the teacher's first blocks; returns the model with what it learned merged."""
    teacher, student = model.backbone.vit, student_of(model, config)
    course = Course(
        f"slimming-{config.finetune}",
        config.finetune_epochs,
        config.batch_size,
        config.stage2_learning_rate,
        save_every=config.save_every,
        seed=config.seed + 1,
    )
    stage = Slimming(student, config.lowest_budget, config.label_weight)
    train(stage, cache, course, folder, accelerator, watch, config.tensorboard)
    change = change_of(student.backbone.vit, teacher)
    result = SlimModel(adapt(merged(teacher, change)), model.config, model.scorer)
    result.change = Change(change, signature(model.backbone))
    return result


def student_of(model: SlimModel, config: LearnConfig) -> SlimModel:
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


def _calibration(model: SlimModel, cache: LessonCache) -> Calibration:
    """Thresholds from the scores of cached photos."""
    return Calibration.of(torch.cat(list(_scores(model, cache, min(_CALIBRATION_ROWS, len(cache))))))


@torch.no_grad()
def _scores(model: SlimModel, cache: LessonCache, rows: int) -> Iterator[torch.Tensor]:
    device = next(model.scorer.parameters()).device
    for begin in range(0, rows, 32):
        tokens = cache.lessons(range(begin, min(begin + 32, rows))).tokens.to(device)
        yield model.scorer(tokens, None, model.backbone, model.start).score
