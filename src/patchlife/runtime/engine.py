"""One interface for everything that runs a slimmed model: arrays of images in, logits (or embeddings) and lives out."""

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
from .metadata import Format, Metadata, metadata_of
from .sessions import ModuleSession, Session, open_session
from .tensor_module import TensorModule

__all__ = ["Engine", "Output", "checksum_file", "eager_engine", "open_file_session", "read_verified"]


class Output(NamedTuple):
    """The outputs of an engine for a batch.

    Attributes:
        output: logits of the classes, or the embedding of a model without a classifier; ``metadata.outputs[0]`` says
            which.
        life: how many blocks each patch takes part in; None if the file was exported without lives.
    """

    output: Float[np.ndarray, "batch classes_or_width"]
    life: Float[np.ndarray, "batch patches"] | None

    @property
    def logits(self) -> Float[np.ndarray, "batch classes"]:
        """The output of a model with a classifier."""
        return self.output


class Engine:
    """Runs one slimmed model at one budget.

    Attributes:
        session: runs the graph.
        metadata: describes the model and its input.
    """

    def __init__(self, session: Session, metadata: Metadata) -> None:
        self.session, self.metadata = session, metadata

    def __call__(self, images: Float[np.ndarray, "batch channels height width"]) -> Output:
        """Run a batch of any size. Raises ConfigError for images of another shape or dtype than the graph expects."""
        expected = (self.metadata.channels, *self.metadata.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise ConfigError(
                f"this exported model takes batches of images {expected} (channels, height, width), got shape "
                f"{images.shape}; resize the photos, or export again with --image-size"
            )
        if images.dtype != np.float32:
            raise ConfigError(
                f"images must be float32 and normalised as described by metadata.preprocess, got {images.dtype}"
            )
        outputs = dict(zip(self.metadata.outputs, self.session.run(np.ascontiguousarray(images)), strict=True))
        return Output(outputs[self.metadata.outputs[0]], outputs.get("life"))

    def predict(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(output, lives), as from `SlimModel.predict`. The file holds no scores, so the lives stand in for them.

        Raises ExportError if the file was exported without lives.
        """
        output, life = self(images.float().cpu().numpy())
        if life is None:
            raise ExportError("this file was exported without lives; export it again without --no-lives")
        lives = torch.from_numpy(life)
        kept = torch.tensor(self.metadata.kept).expand(len(lives), -1)
        return torch.from_numpy(output), Lives(lives, kept, lives, self.metadata.grid)


def eager_engine(
    model: SlimModel, compiled: bool = False, lives: bool = True, image_size: tuple[int, int] | None = None
) -> Engine:
    """An engine that runs ``model`` itself, eagerly or with torch.compile (half a minute per batch size).

    It takes images of ``image_size`` (height, width), by default the size that the model is built for.
    """
    metadata = metadata_of(model, "torch", lives=lives, image_size=image_size)
    return Engine(ModuleSession(TensorModule(model, lives), compiled), metadata)


def open_file_session(
    path: Path, kind: Format, content: bytes, threads: int | None, weights: Path | None = None, trust: bool = False
) -> Session:
    """The session for the content of ``path`` (see `open_session`).

    Raises ExportError if the engine cannot read it, and for a .pt2 file without ``trust``.
    """
    if kind == "torch" and not trust:
        raise ExportError(
            f"{path} is a torch.export file (.pt2), which can run any code when it is opened, because torch unpickles "
            "parts of it; if you trust its source, open it with --trust, or open_engine(file, trust=True); files of "
            "the formats onnx and openvino need no trust"
        )
    try:
        return open_session(kind, content, threads, weights)
    except ImportError:
        raise
    except Exception as error:  # each engine raises its own exceptions for a file that it cannot read
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{path} cannot be read by its engine: {reason}; was it exported by patchlife?") from error


def checksum_file(path: Path) -> Path:
    """The path of the checksum of an exported file."""
    return path.with_name(f"{path.name}.sha256")


def read_verified(path: Path) -> bytes:
    """The content of an exported file. Raises ExportError unless its sha256 equals the one in its checksum file."""
    checksum = checksum_file(path)
    if not path.is_file():
        raise ExportError(f"no exported model at {path}; make one with patchlife export")
    if not checksum.is_file():
        raise ExportError(
            f"{path} has no {checksum.name} beside it, so it cannot be checked for damage; copy that file too, or "
            "export again"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum.read_text(errors="replace").partition(" ")[0]:
        raise ExportError(f"{path} is damaged: its sha256 is not the one in {checksum.name}; copy or export it again")
    return content
