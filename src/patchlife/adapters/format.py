"""The files of an adapter: a folder with ``adapter.json``, ``adapter.safetensors`` and ``SHA256SUMS``.

``adapter.json`` holds the settings and describes the backbone and the scorer; ``adapter.safetensors`` holds the tensors
of scorer, calibration and weight delta. The checksums are verified before anything is opened, because safetensors
loads a file with flipped bits without an error.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import AdapterError
from ..io.folders import SUMS, check_sums, read_consistently, recover, replace_folder
from ..version import __version__

__all__ = [
    "FILES",
    "FORMAT",
    "WITHOUT_GATES",
    "WITHOUT_SHAPES",
    "calibration_name",
    "calibration_of_name",
    "check_free",
    "read_adapter",
    "under",
    "write_adapter",
]

FORMAT = 5
WITHOUT_SHAPES = 4
"""Format of adapters with one start block and drop points for all budgets: older versions read them too."""
WITHOUT_GATES = 3
"""Format of such adapters without a gated weight delta: still older versions read them too."""

_JSON, _TENSORS = "adapter.json", "adapter.safetensors"
FILES = (_JSON, _TENSORS, SUMS)
"""Names of the files of an adapter."""


def write_adapter(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the files; an existing adapter is replaced in one step, or not at all."""
    with replace_folder(folder) as fresh:
        (fresh / _JSON).write_text(_text(manifest))
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}  # tied tensors are saved twice
        (fresh / _TENSORS).write_bytes(to_bytes(own))


def check_free(folder: Path) -> None:
    """Raise AdapterError unless an adapter may be written to ``folder``: an adapter, an empty folder, or nothing."""
    recover(folder)
    if folder.exists() and not (folder / _JSON).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AdapterError(
            f"{folder} exists and is not a patchlife adapter; nothing was written, choose another folder"
        )


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the content of ``adapter.json``, tensors), after the checksums were verified.

    Raises AdapterError when the folder is not an adapter, is damaged, or is of another format.
    """
    return read_consistently(folder, lambda: _read(Path(folder)))


def calibration_name(patches: int, start: int | None) -> str:
    """The name of a calibration for this number of patches; with the start block if budgets have several of them."""
    return str(patches) if start is None else f"{patches}@{start}"


def calibration_of_name(name: str) -> tuple[int, int | None]:
    """The inverse of `calibration_name`."""
    patches, _, start = name.partition("@")
    return int(patches), int(start) if start else None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / _JSON).is_file():
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no {_JSON}")
    files = check_sums(folder, AdapterError)
    if not {_JSON, _TENSORS} <= files.keys():
        raise AdapterError(f"{folder}'s checksums do not cover {_JSON} and {_TENSORS}; save or download it again")
    manifest = json.loads(files[_JSON].read_text())
    if manifest["format"] > FORMAT:
        raise AdapterError(
            f"{folder} was written by patchlife {manifest['patchlife']} in format {manifest['format']}; this is "
            f"{__version__}, which reads format {FORMAT}: pip install -U patchlife"
        )
    if manifest["format"] < WITHOUT_GATES:
        convert = "convert it with recipes/convert_adapter.py of patchlife's repository, or "
        raise AdapterError(
            f"{folder} is in format {manifest['format']}; patchlife {__version__} reads format {FORMAT}: "
            f"{convert if manifest['format'] == 2 else ''}fit it again"
        )
    return manifest, load_file(files[_TENSORS])


def _text(manifest: dict[str, Any]) -> str:
    """Readable JSON: one line for each weight of the backbone."""
    weights, place = manifest["backbone"]["weights"], f"weights {uuid.uuid4()}"
    lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(found)}" for name, found in weights.items())
    rest = manifest | {"backbone": manifest["backbone"] | {"weights": place}}
    return json.dumps(rest, indent=2).replace(json.dumps(place), f"{{\n{lines}\n    }}") + "\n"
