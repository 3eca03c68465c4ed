"""Convert an adapter of format 2 to format 3. Names change; no tensor does.

python recipes/convert_adapter.py ADAPTER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from patchlife.adapters.format import WITHOUT_GATES, write_adapter
from patchlife.errors import AdapterError
from patchlife.io.folders import check_sums
from patchlife.version import __version__

SETTINGS = {"heirs": "merge", "survivors": "kept", "kin_dim": "embedding_dim"}
TENSORS = {
    "scorer.kinship_skip.": "scorer.similarity_skip.",
    "scorer.kinship.": "scorer.similarity.",
    "change.": "weight_delta.",
}


def main(folder: str) -> None:
    """Convert the adapter in ``folder``, in place."""
    files = check_sums(folder, AdapterError)
    manifest = json.loads(files["adapter.json"].read_text())
    if manifest["format"] != 2:
        raise SystemExit(f"{folder} is in format {manifest['format']}, expected 2; it was not changed")
    tensors = {renamed(name): tensor for name, tensor in load_file(files["adapter.safetensors"]).items()}
    write_adapter(Path(folder), converted(manifest), tensors)
    print(f"{folder}: format {WITHOUT_GATES}")


def converted(manifest: dict[str, Any]) -> dict[str, Any]:
    """``adapter.json`` with the names of format 3."""
    scorer = manifest["scorer"] | {"settings": _renamed_keys(manifest["scorer"]["settings"])}
    config = _renamed_keys(manifest["config"])
    return manifest | {"format": WITHOUT_GATES, "patchlife": __version__, "config": config, "scorer": scorer}


def renamed(name: str) -> str:
    """The name of a tensor in format 3."""
    old = next((prefix for prefix in TENSORS if name.startswith(prefix)), "")
    return TENSORS[old] + name.removeprefix(old) if old else name


def _renamed_keys(values: dict[str, Any]) -> dict[str, Any]:
    return {SETTINGS.get(name, name): value for name, value in values.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
