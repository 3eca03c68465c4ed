"""Exports made on the fly, kept by content: whatever changes the answer changes the name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..errors import ExportError
from ..images import Preprocess
from ..labels import Labels
from ..life import SlimModel
from .about import About, Format
from .describe import describe
from .engines import Engine, open_engine
from .exporting import export

__all__ = ["cache_folder", "cached_engine"]


def cache_folder() -> Path:
    """Where exports are kept: $PATCHLIFE_CACHE, or patchlife/ in the user's cache folder."""
    if chosen := os.environ.get("PATCHLIFE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchlife"


def cached_engine(model: SlimModel, kind: Format, labels: Labels, preprocess: Preprocess) -> Engine:
    """An engine for ``model``, exported now or by an earlier run. A damaged cache entry is made anew."""
    about = describe(model, kind, labels, preprocess)
    place = cache_folder() / _key(model, about)
    try:
        return open_engine(place / kind)
    except ExportError:
        shutil.rmtree(place, ignore_errors=True)
    cache_folder().mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache_folder(), prefix=".new-"))
    try:
        export(model, fresh / kind, kind, labels=labels, preprocess=preprocess)
        os.rename(fresh, place)
    except OSError:
        if not (place / kind).is_file():
            raise  # else another process was first, with the same
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return open_engine(place / kind)


def _key(model: SlimModel, about: About) -> str:
    """A name that two models share only if they are one: description (settings, versions) and every weight."""
    digest = hashlib.sha256(about.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
