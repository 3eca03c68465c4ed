"""One training loop, for both stages, on whatever accelerate was launched on.

Nothing here depends on how often a run was interrupted, or on how many processes share it: photos, order and
draws follow from the seed and the step, and a step always sees the same global batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, NumericalError
from .cache import LessonCache
from .checkpoint import restore_latest, save_checkpoint
from .log import Log
from .targets import Lesson
from .watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Course", "Stage", "Step", "train"]


class Step(NamedTuple):
    """What a stage is given: a batch, and a number in [0, 1) to draw from, the same on every process."""

    lesson: Lesson
    labels: Tensor
    chance: float


class Stage(nn.Module):
    """Something that learns: `forward` turns a step into a loss and named numbers for the log."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step, mean over its photos."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learned, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def pace(self, name: str) -> float:
        """How many times the course's learning rate a parameter learns at."""
        return 1.0


@dataclass(frozen=True)
class Course:
    """How much, how fast and in which order.

    Attributes:
        name: of the stage, for logs and folders.
        epochs: passes over the photos. batch_size: photos per step, all processes together.
        learning_rate: the peak. warmup: the fraction of all steps that lead up to it.
        weight_decay: AdamW's. clip: the gradient's largest norm.
        save_every: seconds between checkpoints. seed: of the order and of every draw.
        after: names of the run's earlier stages.
        also: what else the result follows from (weights, photos), by name, as JSON values.
    """

    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    save_every: float = 30.0
    seed: int = 0
    after: tuple[str, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All that the result follows from, by name. Processes, device and how often it is saved are not among it."""
        own = ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay", "clip")
        return {"seed": self.seed, **{f"{self.name} {name}": getattr(self, name) for name in own}, **self.also}

    def steps(self, photos: int) -> int:
        """Steps of the whole course; photos that do not fill an epoch's last batch wait for the next epoch."""
        return self.epochs * max(1, photos // self.batch_size)

    def rows(self, step: int, photos: int) -> list[int]:
        """The photos of one step's global batch."""
        epoch, batch = divmod(step, max(1, photos // self.batch_size))
        order = torch.randperm(photos, generator=self._dice(epoch, 0))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def chance(self, step: int) -> float:
        """The step's draw, uniform in [0, 1)."""
        return torch.rand((), generator=self._dice(step, 1)).item()

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a linear rise, then a cosine to zero."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    def _dice(self, index: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2 + stream) * 2**32 + index)


def train(
    stage: Stage,
    cache: LessonCache,
    course: Course,
    folder: Path,
    accelerator: Accelerator,
    watch: Watch | None = None,
    tensorboard: bool = False,
) -> None:
    """Take ``stage`` through ``course``, going on from the latest checkpoint under ``folder``.

    Args:
        stage: what learns.
        cache: what from.
        course: how.
        folder: for checkpoints, metrics.jsonl and TensorBoard's files.
        accelerator: where.
        watch: what to look at meanwhile; it changes nothing of what is learned.
        tensorboard: draw the metrics there, too.

    Raises:
        NumericalError: the loss or its gradient is not finite; names the step and the photos. Nothing bad was
            applied or saved.
        CheckpointError: a checkpoint cannot be written, or ``folder`` holds one of a run with other settings.
    """
    _check_share(course, len(cache), accelerator)
    parameters = stage.trained()
    paces = {name: stage.pace(name) for name in parameters}
    groups = [
        {"params": [value for name, value in parameters.items() if paces[name] == pace], "pace": pace}
        for pace in dict.fromkeys(paces.values())
    ]
    optimizer = torch.optim.AdamW(groups, lr=course.learning_rate, weight_decay=course.weight_decay)
    module = accelerator.prepare_model(stage.to(accelerator.device))
    checkpoints = folder / course.name
    settings = course.settings() | {"photos learned from": len(cache), "features": cache.content}
    first, steps = restore_latest(checkpoints, parameters, optimizer, settings), course.steps(len(cache))
    metrics, batch_size = folder / "metrics.jsonl", min(course.batch_size, len(cache))
    saved = time.monotonic()
    watched = {name: photos.seen for name, photos in watch.sets.items()} if watch else {}
    with (
        Log(
            metrics, course.name, first, accelerator.is_main_process, batch_size, tensorboard, course.after, watched
        ) as log,
        _progress(course, first, steps, accelerator) as bar,
    ):
        for step in range(first, steps):
            if watch is not None:
                watch.look(stage, course, len(cache), step, log)
            begin = time.monotonic()
            rows = course.rows(step, len(cache))
            batch = _share(rows, cache, course.chance(step), accelerator)
            for group in optimizer.param_groups:
                group["lr"] = group["pace"] * course.rate(step, steps)
            with accelerator.autocast():
                loss, notes = module(batch)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(parameters.values(), course.clip)
            _check_finite(loss, norm, course, step, cache.names(rows), accelerator)
            optimizer.step()
            optimizer.zero_grad()
            value = accelerator.reduce(loss.detach(), "mean").item()
            speed = len(rows) / (time.monotonic() - begin)
            log.write(
                {"step": step, "epoch": step * course.epochs / steps, "loss": value, **notes, "photos_per_s": speed}
            )
            bar.set_postfix(loss=f"{value:.3f}", **{k: f"{v:.2f}" for k, v in notes.items()}, photos_s=f"{speed:.0f}")
            bar.update()
            if step + 1 == steps or time.monotonic() - saved > course.save_every:
                if accelerator.is_main_process:
                    save_checkpoint(checkpoints, step + 1, parameters, optimizer, settings)
                saved = time.monotonic()
        if watch is not None:
            watch.look(stage, course, len(cache), steps, log)
    accelerator.wait_for_everyone()


@contextmanager
def _progress(course: Course, first: int, steps: int, accelerator: Accelerator) -> Iterator[tqdm]:
    bar = tqdm(total=steps, initial=first, desc=course.name, unit="step", disable=not accelerator.is_local_main_process)
    with bar:
        yield bar


def _share(rows: list[int], cache: LessonCache, chance: float, accelerator: Accelerator) -> Step:
    """This process's part of a global batch, on its device."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    lesson = Lesson(*(values.to(accelerator.device) for values in cache.lessons(mine)))
    return Step(lesson, cache.labels(mine).to(accelerator.device), chance)


def _check_share(course: Course, photos: int, accelerator: Accelerator) -> None:
    batch = min(course.batch_size, photos)
    if batch % accelerator.num_processes:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, got {batch} for {accelerator.num_processes}"
        )


def _check_finite(
    loss: Tensor, norm: Tensor, course: Course, step: int, names: list[str], accelerator: Accelerator
) -> None:
    fine = torch.stack((loss.detach().isfinite(), norm.isfinite())).all()
    if accelerator.reduce(fine.float(), "mean").item() != 1:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise NumericalError(
            f"{course.name}: the loss or its gradient is not finite at step {step}; the last checkpoint is good, "
            f"a lower learning rate may help. Photos of this step: {shown}"
        )
