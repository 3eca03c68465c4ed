"""One training loop, for both stages, on whatever accelerate was launched on.

Nothing here depends on how often a run was interrupted, or on how many processes share it: photos, order and
draws follow from the seed and the step, and a step always sees the same global batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, NumericalError
from .checkpoint import restore_latest, save_checkpoint
from .log import Log
from .stage import Stage, StageConfig, Step
from .target_cache import TargetCache
from .targets import Targets
from .validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train"]


def train(
    stage: Stage,
    cache: TargetCache,
    stage_config: StageConfig,
    folder: Path,
    accelerator: Accelerator,
    validation: Validation | None = None,
    tensorboard: bool = False,
) -> None:
    """Take ``stage`` through ``stage_config``, going on from the latest checkpoint under ``folder``.

    Args:
        stage: what learns.
        cache: what from.
        stage_config: how.
        folder: for checkpoints, metrics.jsonl and TensorBoard's files.
        accelerator: where.
        validation: what to look at meanwhile; it changes nothing of what is learned.
        tensorboard: draw the metrics there, too.

    Raises:
        NumericalError: the loss or its gradient is not finite; names the step and the photos. Nothing bad was
            applied or saved.
        CheckpointError: a checkpoint cannot be written, or ``folder`` holds one of a run with other settings.
    """
    _check_share(stage_config, len(cache), accelerator)
    parameters = stage.trained()
    multipliers = {name: stage.lr_multiplier(name) for name in parameters}
    groups = [
        {
            "params": [value for name, value in parameters.items() if multipliers[name] == multiplier],
            "lr_multiplier": multiplier,
        }
        for multiplier in dict.fromkeys(multipliers.values())
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage_config.learning_rate, weight_decay=stage_config.weight_decay)
    module = accelerator.prepare_model(stage.to(accelerator.device))
    checkpoints = folder / stage_config.name
    settings = stage_config.settings() | {"photos learned from": len(cache), "features": cache.content}
    first, steps = restore_latest(checkpoints, parameters, optimizer, settings), stage_config.steps(len(cache))
    metrics, batch_size = folder / "metrics.jsonl", min(stage_config.batch_size, len(cache))
    saved = time.monotonic()
    validated = {name: photos.seen for name, photos in validation.sets.items()} if validation else {}
    with (
        Log(
            metrics,
            stage_config.name,
            first,
            accelerator.is_main_process,
            batch_size,
            tensorboard,
            stage_config.after,
            validated,
        ) as log,
        _progress(stage_config, first, steps, accelerator) as bar,
    ):
        for step in range(first, steps):
            if validation is not None:
                validation.look(stage, stage_config, len(cache), step, log)
            begin = time.monotonic()
            rows = stage_config.rows(step, len(cache))
            batch = _share(rows, cache, stage_config.chance(step), accelerator)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_multiplier"] * stage_config.rate(step, steps)
            with accelerator.autocast():
                loss, notes = module(batch)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(parameters.values(), stage_config.clip)
            _check_finite(loss, norm, stage_config, step, cache.names(rows), accelerator)
            optimizer.step()
            optimizer.zero_grad()
            value = accelerator.reduce(loss.detach(), "mean").item()
            speed = len(rows) / (time.monotonic() - begin)
            log.write(
                {
                    "step": step,
                    "epoch": step * stage_config.epochs / steps,
                    "loss": value,
                    **notes,
                    "photos_per_s": speed,
                }
            )
            bar.set_postfix(loss=f"{value:.3f}", **{k: f"{v:.2f}" for k, v in notes.items()}, photos_s=f"{speed:.0f}")
            bar.update()
            if step + 1 == steps or time.monotonic() - saved > stage_config.save_every:
                if accelerator.is_main_process:
                    save_checkpoint(checkpoints, step + 1, parameters, optimizer, settings)
                saved = time.monotonic()
        if validation is not None:
            validation.look(stage, stage_config, len(cache), steps, log)
    accelerator.wait_for_everyone()


@contextmanager
def _progress(stage_config: StageConfig, first: int, steps: int, accelerator: Accelerator) -> Iterator[tqdm]:
    bar = tqdm(
        total=steps, initial=first, desc=stage_config.name, unit="step", disable=not accelerator.is_local_main_process
    )
    with bar:
        yield bar


def _share(rows: list[int], cache: TargetCache, chance: float, accelerator: Accelerator) -> Step:
    """This process's part of a global batch, on its device."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    targets = Targets(*(values.to(accelerator.device) for values in cache.targets(mine)))
    return Step(targets, cache.labels(mine).to(accelerator.device), chance)


def _check_share(stage_config: StageConfig, photos: int, accelerator: Accelerator) -> None:
    batch = min(stage_config.batch_size, photos)
    if batch % accelerator.num_processes:
        raise ConfigError(
            f"batch_size must be a multiple of the number of processes, got {batch} for {accelerator.num_processes}"
        )


def _check_finite(
    loss: Tensor, norm: Tensor, stage_config: StageConfig, step: int, names: list[str], accelerator: Accelerator
) -> None:
    fine = torch.stack((loss.detach().isfinite(), norm.isfinite())).all()
    if accelerator.reduce(fine.float(), "mean").item() != 1:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise NumericalError(
            f"{stage_config.name}: the loss or its gradient is not finite at step {step}; the last checkpoint is good, "
            f"a lower learning rate may help. Photos of this step: {shown}"
        )
