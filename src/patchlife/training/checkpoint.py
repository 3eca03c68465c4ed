"""Training state that survives `kill -9`: every checkpoint is a whole new folder or not there at all.

No pickles: tensors in safetensors, the rest in JSON, a SHA-256 of each file in the folder's manifest. There is no
random state to keep: every draw of a run follows from its seed and the step. A checkpoint says which settings it
follows from, and only a run with the same ones goes on from it.
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
from ..io.files import check_sums, remove_leftovers, replace_folder

__all__ = ["FORMAT", "Settings", "check_settings", "discard", "restore_latest", "save_checkpoint"]

FORMAT = 2
"""Of the files, and of what a step computes: a checkpoint of another format is not continued."""

Settings = Mapping[str, Any]
"""What a run's result follows from, by name, as JSON values."""

_KEPT = 2
_WHAT_TO_DO = (
    "to go on with that run give its settings, else choose another --out, or add --restart to discard its checkpoints "
    "and begin again"
)


def save_checkpoint(
    folder: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
) -> Path:
    """Write the state after ``step`` steps beside the older ones, then remove all but the latest two.

    Raises CheckpointError when it cannot be written (a full disk, say); older checkpoints are as they were.
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
            "run the same command again: it goes on from the checkpoint before"
        ) from error
    for old in _found(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # another process may be doing the same
    return target


def restore_latest(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
) -> int:
    """Load the latest whole checkpoint into ``trained`` and ``optimizer``; the step it stands at, 0 without any.

    Raises CheckpointError, naming each setting that differs, for a checkpoint of a run with other ``settings``; None
    takes any.
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
    """Raise CheckpointError, as `restore_latest` would, if what ``settings`` names differs; reads no weights."""
    latest = _latest(folder)
    if latest is not None:
        _check_format(latest[1], folder)
        _check_same({name: latest[1]["settings"].get(name) for name in settings}, settings, folder)


def discard(folder: Path) -> None:
    """Remove the checkpoints in ``folder``."""
    for checkpoint in _found(folder):
        shutil.rmtree(checkpoint)


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _latest(folder: Path) -> tuple[dict[str, Path], dict[str, Any]] | None:
    """(files, state) of the latest checkpoint that is whole."""
    for candidate in reversed(_found(folder)):
        try:
            files = check_sums(candidate, CheckpointError)
        except CheckpointError:  # damaged on disk: the one before is as good, only older
            continue
        return files, json.loads(files["state.json"].read_text())
    return None


def _check_format(state: dict[str, Any], folder: Path) -> None:
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoints in {folder} are of format {state.get('format', 1)}, this patchlife writes and continues "
            f"format {FORMAT}; choose another --out, or add --restart to discard them and begin again"
        )


def _check_same(was: Settings, now: Settings, folder: Path) -> None:
    """Raise CheckpointError if a setting differs; one that only one side has is None on the other."""
    now = json.loads(json.dumps(dict(now)))
    differ = [
        f"{name} was {was.get(name)}, now {now.get(name)}" for name in {**now, **was} if was.get(name) != now.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{folder} holds checkpoints of a run with other settings: {'; '.join(differ)}. They were not used; "
            + _WHAT_TO_DO
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
            f"{source} is of a run with other settings: it trained {len(saved)} tensors, this one trains "
            f"{len(wanted)}, and {shortened(differ)} differ; {_WHAT_TO_DO}"
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weight.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
