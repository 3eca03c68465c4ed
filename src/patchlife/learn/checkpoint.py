"""Training state that survives `kill -9`: every checkpoint is a whole new folder or not there at all.

No pickles: tensors in safetensors, the rest in JSON, a SHA-256 of each file in the folder's manifest. There is no
random state to keep: every draw of a run follows from its seed and the step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import check_sums, replace_folder

__all__ = ["restore_latest", "save_checkpoint"]

_KEPT = 2


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Path:
    """Write the state after ``step`` steps beside the older ones, then remove all but the latest two.

    Raises CheckpointError when it cannot be written (a full disk, say); older checkpoints are as they were.
    """
    target = folder / f"step-{step:08d}"
    tensors: dict[str, Tensor] = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    try:
        with replace_folder(target) as fresh:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
            (fresh / "state.json").write_text(json.dumps({"step": step}) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {target} ({error.strerror or error}); free some space and "
            "run the same command again: it goes on from the checkpoint before"
        ) from error
    for old in _found(folder)[:-_KEPT]:
        shutil.rmtree(old)
    return target


def restore_latest(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the latest whole checkpoint into ``trained`` and ``optimizer``; the step it stands at, 0 without any."""
    for unfinished in folder.glob(".step-*"):  # killed while it was written
        shutil.rmtree(unfinished, ignore_errors=True)
    for candidate in reversed(_found(folder)):
        try:
            files = check_sums(candidate, CheckpointError)
        except CheckpointError:  # damaged on disk: the one before is as good, only older
            continue
        _load(load_file(files["state.safetensors"]), trained, optimizer, candidate)
        return json.loads(files["state.json"].read_text())["step"]
    return 0


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


@torch.no_grad()
def _load(
    tensors: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    source: Path,
) -> None:
    saved = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if saved != set(trained):
        raise CheckpointError(
            f"{source} is of a run with other settings: it trained {len(saved)} tensors, this one trains "
            f"{len(trained)}; use another --out, or the settings of that run"
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weight.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
