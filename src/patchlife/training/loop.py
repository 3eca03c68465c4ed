"""The training loop of both stages, on any number of processes that accelerate has launched.

The result does not depend on interruptions or on the number of processes: photos, order and random draws follow from
the seed and the step, and the global batch of a step is always the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, NumericalError, shortened
from .checkpoint import restore_latest, save_checkpoint
from .log import Log
from .stage import Stage, StageConfig, Step, TargetSource
from .validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train"]


def train(
    stage: Stage,
    cache: TargetSource,
    stage_config: StageConfig,
    folder: Path,
    accelerator: Accelerator,
    validation: Validation | None = None,
) -> None:
    """Train ``stage`` as ``stage_config`` says, from the latest checkpoint under ``folder`` if there is one.

    Args:
        stage: the module to train.
        cache: the photos and the targets of each step.
        stage_config: length, learning rate and order of photos.
        folder: for checkpoints and metrics.jsonl.
        accelerator: processes, device and precision; its initialised trackers get the metrics too.
        validation: labelled photos to evaluate on meanwhile; the trained weights do not depend on it.

    Raises:
        NumericalError: the loss or its gradient is not finite; the message names the step and the photos. The step
            is neither applied nor saved.
        CheckpointError: a checkpoint cannot be written, or ``folder`` has one of a run with other settings.
    """
    _check_divisible(stage_config, len(cache), accelerator)
    parameters = stage.trained()
    optimizer = _optimizer(stage, parameters, stage_config)
    module = accelerator.prepare_model(stage.to(accelerator.device))
    checkpoints = folder / stage_config.name
    settings = stage_config.settings() | {"training photos": len(cache), "targets": cache.content}
    first, steps = restore_latest(checkpoints, parameters, optimizer, settings), stage_config.steps(len(cache))
    last_saved = time.monotonic()
    log = Log(
        folder / "metrics.jsonl",
        stage_config.name,
        first,
        accelerator.is_main_process,
        min(stage_config.batch_size, len(cache)),
        stage_config.prior_stages,
        validation.content if validation else {},
        accelerator.log,
    )
    with _progress(stage_config, first, steps, accelerator) as bar:
        for step in range(first, steps):
            if validation is not None:
                validation.measure(stage, stage_config, len(cache), step, log)
            begin = time.monotonic()
            rows = stage_config.rows(step, len(cache))
            batch = _local_batch(rows, cache, stage_config, step, accelerator)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_multiplier"] * stage_config.learning_rate_at(step, steps)
            with accelerator.autocast():
                loss, numbers = module(batch)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(parameters.values(), stage_config.clip)
            _check_finite(loss, norm, stage_config, step, cache.names(rows), accelerator)
            optimizer.step()
            optimizer.zero_grad()
            numbers = {"loss": accelerator.reduce(loss.detach(), "mean").item(), **numbers}
            speed = len(rows) / (time.monotonic() - begin)
            epoch = step * stage_config.epochs / steps
            log.write({"step": step, "epoch": epoch, **numbers, "photos_per_s": speed})
            bar.set_postfix(_shown(numbers, speed))
            bar.update()
            if step + 1 == steps or time.monotonic() - last_saved > stage_config.save_every:
                if accelerator.is_main_process:
                    save_checkpoint(checkpoints, step + 1, parameters, optimizer, settings)
                last_saved = time.monotonic()
        if validation is not None:
            validation.measure(stage, stage_config, len(cache), steps, log)
    accelerator.wait_for_everyone()


def _optimizer(stage: Stage, parameters: Mapping[str, nn.Parameter], stage_config: StageConfig) -> torch.optim.AdamW:
    """AdamW with a group of parameters for each learning-rate multiplier."""
    multipliers = {name: stage.lr_multiplier(name) for name in parameters}
    groups = [
        {
            "params": [value for name, value in parameters.items() if multipliers[name] == multiplier],
            "lr_multiplier": multiplier,
        }
        for multiplier in dict.fromkeys(multipliers.values())
    ]
    return torch.optim.AdamW(groups, lr=stage_config.learning_rate, weight_decay=stage_config.weight_decay)


@contextmanager
def _progress(stage_config: StageConfig, first: int, steps: int, accelerator: Accelerator) -> Iterator[tqdm]:
    bar = tqdm(
        total=steps, initial=first, desc=stage_config.name, unit="step", disable=not accelerator.is_local_main_process
    )
    with bar:
        yield bar


def _shown(numbers: Mapping[str, float], photos_per_s: float) -> dict[str, str]:
    """The numbers of the progress bar."""
    digits = {name: f"{value:.{3 if name == 'loss' else 2}f}" for name, value in numbers.items()}
    return digits | {"photos_s": f"{photos_per_s:.0f}"}


def _local_batch(
    rows: list[int], cache: TargetSource, stage_config: StageConfig, step: int, accelerator: Accelerator
) -> Step:
    """This process's part of a global batch, on its device."""
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    with accelerator.autocast():
        targets = cache.step_targets(rows, part, stage_config.view_generator(step))
    return Step(
        targets.to(accelerator.device), cache.labels(rows[part]).to(accelerator.device), stage_config.random_draw(step)
    )


def _check_divisible(stage_config: StageConfig, photos: int, accelerator: Accelerator) -> None:
    batch = min(stage_config.batch_size, photos)
    if batch % accelerator.num_processes:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, got {batch} for {accelerator.num_processes}"
        )


def _check_finite(
    loss: Tensor, norm: Tensor, stage_config: StageConfig, step: int, names: list[str], accelerator: Accelerator
) -> None:
    finite = torch.stack((loss.detach().isfinite(), norm.isfinite())).all()
    if accelerator.reduce(finite.float(), "mean").item() != 1:
        raise NumericalError(
            f"{stage_config.name}: the loss or its gradient is not finite at step {step}; the last checkpoint is good, "
            f"a lower learning rate may help. Photos of this step: {shortened(names, 10)}"
        )
