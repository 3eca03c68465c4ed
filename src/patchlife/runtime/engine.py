"""One small interface over everything that runs a slimmed model: photos' numbers in, logits and lives out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, ExportError
from ..slimming import Lives, SlimModel
from .describe import describe
from .metadata import Format, Metadata
from .sessions import ModuleSession, Session, open_session
from .tensor_module import TensorModule

__all__ = ["Engine", "Output", "eager_engine", "opened", "sum_file", "verified"]


class Output(NamedTuple):
    """What an engine says about a batch.

    Attributes:
        logits: of the classes.
        life: how many blocks each patch lives; None if the file was exported without lives.
    """

    logits: Float[np.ndarray, "batch classes"]
    life: Float[np.ndarray, "batch patches"] | None


class Engine:
    """Runs one slimmed model at one budget.

    Attributes:
        metadata: what it is.
    """

    def __init__(self, session: Session, metadata: Metadata) -> None:
        self.session, self.metadata = session, metadata

    def __call__(self, images: Float[np.ndarray, "batch channels height width"]) -> Output:
        """Run a batch of any length.

        Raises ConfigError when the images are not of the size or kind that the graph takes.
        """
        wanted = (self.metadata.channels, *self.metadata.image_size)
        if images.ndim != 4 or images.shape[1:] != wanted or not len(images):
            raise ConfigError(
                f"this exported model takes batches of images {wanted} (channels, height, width), got shape "
                f"{images.shape}; resize the photos, or export again with --image-size"
            )
        if images.dtype != np.float32:
            raise ConfigError(f"images must be float32, normalised as metadata.preprocess says, got {images.dtype}")
        outputs = dict(zip(self.metadata.outputs, self.session.run(np.ascontiguousarray(images)), strict=True))
        return Output(outputs["logits"], outputs.get("life"))

    def predict(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(logits, lives), as `SlimModel.predict` gives them; a life serves as its own score.

        Raises ExportError when the file was exported without lives.
        """
        logits, life = self(images.float().cpu().numpy())
        if life is None:
            raise ExportError("this file was exported without lives; export it again without --no-lives")
        known = torch.from_numpy(life)
        kept = torch.tensor(self.metadata.kept).expand(len(known), -1)
        return torch.from_numpy(logits), Lives(known, kept, known, self.metadata.grid)


def eager_engine(model: SlimModel, compiled: bool = False, lives: bool = True) -> Engine:
    """``model`` itself behind the same interface: as it is, or through torch.compile (half a minute a batch size)."""
    return Engine(ModuleSession(TensorModule(model, lives), compiled), describe(model, "torch", lives=lives))


def opened(
    path: Path, kind: Format, content: bytes, threads: int | None, weights: Path | None = None, trust: bool = False
) -> Session:
    """The session of a file's content (see `open_session`).

    Raises ExportError when its engine cannot read it, and for torch's own format unless it is to be trusted.
    """
    if kind == "torch" and not trust:
        raise ExportError(
            f"{path} is a torch.export file (.pt2), which can run any code when it is opened, because torch unpickles "
            "parts of it; if you trust where it came from, open it with --trust, or open_engine(file, trust=True); "
            "files of the formats onnx and openvino need no trust"
        )
    try:
        return open_session(kind, content, threads, weights)
    except ImportError:
        raise
    except Exception as error:  # whatever the three engines raise on a file that they cannot read
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{path} cannot be read by its engine: {reason}; was it exported by patchlife?") from error


def sum_file(path: Path) -> Path:
    """Where the checksum of an exported file lies."""
    return path.with_name(f"{path.name}.sha256")


def verified(path: Path) -> bytes:
    """A file's content, read once. Raises ExportError unless its sha256 is the one beside it."""
    beside = sum_file(path)
    if not path.is_file():
        raise ExportError(f"no exported model at {path}; make one with patchlife export")
    if not beside.is_file():
        raise ExportError(
            f"{path} has no {beside.name} beside it, so nobody can tell whether it is whole; copy that file "
            "along, or export again"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != beside.read_text(errors="replace").partition(" ")[0]:
        raise ExportError(f"{path} is damaged: its sha256 is not the one in {beside.name}; copy or export it again")
    return content
