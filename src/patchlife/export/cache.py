"""Cache of exports made on first use. The name of an entry is a hash of everything that can change the outputs."""

from __future__ import annotations

import hashlib
import importlib.metadata
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
from ..io.folders import read_consistently, replace_folder
from ..runtime.engine import Engine, read_verified
from ..runtime.metadata import Format, metadata_of
from ..runtime.open_file import open_engine
from ..runtime.sessions import Session, open_session
from ..slimming import Scorer, SlimModel
from ..version import __version__
from .exporter import export, write_exported
from .graph import onnx_bytes, openvino_bytes, to_onnx, to_openvino
from .images import image_size_of

__all__ = ["cache_folder", "cached_engine", "cached_session"]

T = TypeVar("T")


def cache_folder() -> Path:
    """The folder of cached exports: $PATCHLIFE_CACHE, or patchlife/ in the user's cache folder."""
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
    """An engine for ``model``, exported now or by an earlier run. A damaged cache entry is exported again.

    Labels and preprocessing are the backbone's own if not given; ``lives`` adds the second output.
    """
    size = image_size_of(model, None, preprocess, None)
    metadata = metadata_of(model, kind, labels, preprocess, lives, image_size=size)

    def write(path: Path) -> None:
        export(model, path, kind, labels=labels, preprocess=preprocess, lives=lives)

    return _read_or_write(_key(model, metadata.to_json()), kind, write, open_engine)


def cached_session(module: nn.Module, kind: Format, images: Float[Tensor, "batch channels height width"]) -> Session:
    """A session for any module from images to logits (not a `SlimModel`), with static shapes except for the batch.

    The module's ``extra_repr`` must name everything besides its weights that changes its outputs. The exported graph is
    not compared with the module.
    """
    key = {"module": repr(module), "kind": kind, "size": list(images.shape[1:]), "patchlife": __version__}
    key |= {name: importlib.metadata.version(name) for name in ("torch", "timm")}

    def write(path: Path) -> None:
        two = images[:1].float().repeat(2, 1, 1, 1)  # from one image the exporter would make a graph for batch 1 only
        onnx_file = onnx_bytes(to_onnx(module, {"images": two}, ("logits",)), "")
        content = onnx_file if kind == "onnx" else openvino_bytes(to_openvino(onnx_file), "")
        write_exported(path, content)

    return _read_or_write(
        _key(module, json.dumps(key)), kind, write, lambda path: open_session(kind, read_verified(path))
    )


def _read_or_write(key: str, name: str, write: Callable[[Path], object], read: Callable[[Path], T]) -> T:
    """The result of ``read`` for the file ``name`` in cache entry ``key``, which ``write`` creates if needed."""
    entry = cache_folder() / key
    with suppress(ExportError):
        return read_consistently(entry, lambda: read(entry / name))
    # the damaged entry is not removed first: another process may have replaced it in the meantime
    with replace_folder(entry) as folder:
        write(folder / name)
    return read_consistently(entry, lambda: read(entry / name))


def _key(model: nn.Module, description: str) -> str:
    """A hash of ``description`` (settings and versions), the kind and settings of every module, and every weight."""
    digest = hashlib.sha256(description.encode())
    for path, module in model.named_modules():
        digest.update(f"{path}: {_identity(module)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _identity(module: nn.Module) -> str:
    """What determines a module's outputs besides its weights: class, plain settings, and a scorer's source code."""
    plain = {name: value for name, value in sorted(vars(module).items()) if isinstance(value, int | float | str)}
    plain.pop("training", None)
    source = ""
    if isinstance(module, Scorer):  # it may be the user's own, whose changes no package version shows
        with suppress(OSError, TypeError):
            source = inspect.getsource(type(module))
    return f"{type(module).__module__}.{type(module).__qualname__} {plain} {module.extra_repr()} {source}"
