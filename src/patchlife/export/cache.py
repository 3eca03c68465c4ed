"""Exports made on the fly, kept by content: whatever changes the answer changes the name."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data import Preprocess
from ..data.labels import Labels
from ..errors import ExportError
from ..io.files import read_consistently, replace_folder
from ..runtime.describe import describe
from ..runtime.engine import Engine, verified
from ..runtime.metadata import Format
from ..runtime.open_file import open_engine
from ..runtime.sessions import Session, open_session
from ..slimming import Scorer, SlimModel
from ..version import __version__
from .exporter import export, write_exported
from .graph import described, openvino_bytes, to_onnx, to_openvino

__all__ = ["cache_folder", "cached_engine", "cached_session"]

T = TypeVar("T")


def cache_folder() -> Path:
    """Where exports are kept: $PATCHLIFE_CACHE, or patchlife/ in the user's cache folder."""
    if chosen := os.environ.get("PATCHLIFE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchlife"


def cached_engine(
    model: SlimModel,
    kind: Format,
    labels: Labels | None = None,
    preprocess: Preprocess | None = None,
    lives: bool = True,
) -> Engine:
    """An engine for ``model``, exported now or by an earlier run. A damaged cache entry is made anew.

    Labels and preprocessing are the backbone's own if not given; ``lives`` asks for the second output.
    """
    described_as = describe(model, kind, labels, preprocess, lives)

    def make(path: Path) -> None:
        export(model, path, kind, labels=labels, preprocess=preprocess, lives=lives)

    return _kept(_key(model, described_as.to_json()), kind, make, open_engine)


def cached_session(module: nn.Module, kind: Format, images: Float[Tensor, "batch channels height width"]) -> Session:
    """A session of any module from images to logits, with static shapes but for the batch; not a `SlimModel`.

    The module's ``extra_repr`` must tell all that its answer follows from beside its weights. Nothing is compared.
    """
    key = {"module": repr(module), "kind": kind, "size": list(images.shape[1:]), "patchlife": __version__}
    key |= {name: metadata.version(name) for name in ("torch", "timm")}

    def make(path: Path) -> None:
        two = images[:1].float().repeat(2, 1, 1, 1)  # of one image the exporter makes a graph for one image
        program = described(to_onnx(module, {"images": two}, ("logits",)), "")
        content = program if kind == "onnx" else openvino_bytes(to_openvino(program), "")
        write_exported(path, content)

    return _kept(_key(module, json.dumps(key)), kind, make, lambda path: open_session(kind, verified(path)))


def _kept(key: str, name: str, make: Callable[[Path], object], read: Callable[[Path], T]) -> T:
    """What ``read`` gets from the file ``name`` in the cache entry ``key``, which ``make`` wrote now or earlier."""
    place = cache_folder() / key
    with suppress(ExportError):
        return read_consistently(place, lambda: read(place / name))
    with replace_folder(place) as fresh:  # nothing is removed before: another process may have made it anew by now
        make(fresh / name)
    return read_consistently(place, lambda: read(place / name))


def _key(model: nn.Module, description: str) -> str:
    """A name that two models share only if they are one: description (settings, versions), code and every weight."""
    digest = hashlib.sha256(description.encode())
    for path, module in model.named_modules():
        digest.update(f"{path}: {_made_of(module)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _made_of(module: nn.Module) -> str:
    """What a module computes with beside its weights: class, plain settings, and the source of a scorer."""
    plain = {name: value for name, value in sorted(vars(module).items()) if isinstance(value, int | float | str)}
    plain.pop("training", None)
    source = ""
    if isinstance(module, Scorer):  # anybody's own, and no version of a package tells when it changes
        with suppress(OSError, TypeError):
            source = inspect.getsource(type(module))
    return f"{type(module).__module__}.{type(module).__qualname__} {plain} {module.extra_repr()} {source}"
