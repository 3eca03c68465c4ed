"""Checkpoints of the training state: each is a new folder, which is complete or absent, also after `kill -9`.

Tensors are saved in safetensors, all else in JSON, with a SHA-256 of each file; there are no pickles. No random state
is saved: every random draw of a run follows from its seed and the step. A checkpoint records the settings of its run,
and only a run with the same settings resumes from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, shortened
from ..io.folders import check_sums, remove_leftovers, replace_folder

__all__ = ["FORMAT", "Settings", "check_settings", "discard", "restore_latest", "save_checkpoint"]

FORMAT = 4
"""Version of the files, of the settings' names and of what a step computes; other versions are refused."""

Settings = Mapping[str, Any]
"""The settings that determine the result of a run, by name, as JSON values."""

_CHECKPOINTS_KEPT = 2
_FIX = (
    "to resume that run, give its settings; otherwise choose another --out, or add --restart to discard its "
    "checkpoints and start again"
)


def save_checkpoint(
    folder: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
) -> Path:
    """Write the state after ``step`` steps to a new folder, then remove all checkpoints but the latest two.

    Raises CheckpointError if it cannot be written, for example on a full disk; older checkpoints are not changed.
    """
    target = folder / f"step-{step:08d}"
    tensors: dict[str, Tensor] = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    state = {"format": FORMAT, "step": step, "settings": dict(settings or {})}
    try:
        with replace_folder(target) as fresh:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
            (fresh / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {target} ({error.strerror or error}); free some space and "
            "run the same command again: it resumes from the checkpoint before"
        ) from error
    for old in _checkpoints_in(folder)[:-_CHECKPOINTS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # another process may be doing the same
    return target


def restore_latest(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
) -> int:
    """Load the latest complete checkpoint into ``trained`` and ``optimizer``.

    Returns the number of steps that it has completed, 0 if there is no checkpoint.

    Raises CheckpointError, naming each setting that differs, for a checkpoint of a run with other ``settings``; None
    accepts any settings.
    """
    remove_leftovers(folder)
    latest = _latest(folder)
    if latest is None:
        return 0
    files, state = latest
    _check_format(state, folder)
    if settings is not None:
        _check_same(state["settings"], settings, folder)
    _load(load_file(files["state.safetensors"]), trained, optimizer, folder)
    return state["step"]


def check_settings(folder: Path, settings: Settings) -> None:
    """Raise CheckpointError, as `restore_latest`, if one of ``settings`` differs; no weights are read."""
    latest = _latest(folder)
    if latest is not None:
        _check_format(latest[1], folder)
        _check_same({name: latest[1]["settings"].get(name) for name in settings}, settings, folder)


def discard(folder: Path) -> None:
    """Remove the checkpoints in ``folder``."""
    for checkpoint in _checkpoints_in(folder):
        shutil.rmtree(checkpoint)


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _latest(folder: Path) -> tuple[dict[str, Path], dict[str, Any]] | None:
    """(files, state) of the latest complete checkpoint."""
    for candidate in reversed(_checkpoints_in(folder)):
        try:
            files = check_sums(candidate, CheckpointError)
        except CheckpointError:  # damaged on disk: use the checkpoint before
            continue
        return files, json.loads(files["state.json"].read_text())
    return None


def _check_format(state: dict[str, Any], folder: Path) -> None:
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoints in {folder} have format {state.get('format', 1)}, this patchlife resumes format {FORMAT} "
            "only; choose another --out, or add --restart to discard them and start again"
        )


def _check_same(saved: Settings, current: Settings, folder: Path) -> None:
    """Raise CheckpointError if a setting differs; a setting that is missing on one side counts as None there."""
    current = json.loads(json.dumps(dict(current)))
    differ = [
        f"{name} was {saved.get(name)}, now {current.get(name)}"
        for name in {**current, **saved}
        if saved.get(name) != current.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{folder} has checkpoints of a run with other settings: {'; '.join(differ)}. They were not used; " + _FIX
        )


@torch.no_grad()
def _load(
    tensors: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    source: Path,
) -> None:
    saved = {name.removeprefix("weight."): value.shape for name, value in tensors.items() if name.startswith("weight.")}
    wanted = {name: parameter.shape for name, parameter in trained.items()}
    if saved != wanted:
        differ = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
        raise CheckpointError(
            f"{source} has checkpoints of a run with other settings: that run trained {len(saved)} tensors, this run "
            f"trains {len(wanted)}, and {shortened(differ)} differ; {_FIX}"
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weight.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
