"""The metadata of an exported file: everything that is needed to use the file without the original model."""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from ..data import Preprocess
from ..data.labels import Labels, numbered_labels
from ..errors import ExportError
from ..slimming import SlimModel, flops
from ..version import __version__

__all__ = ["FORMAT", "KEY", "Format", "Metadata", "metadata_in", "metadata_of"]

FORMAT = 3
"""Version of the fields of `Metadata` in new files. Since 3 a file's first output may be an embedding."""

READABLE = (2, FORMAT)
"""Versions that can be read. Files of other versions are refused."""

KEY = "patchlife"
"""Name of the metadata inside an ONNX file. In the zip archives of OpenVINO and torch it is followed by .json."""

Format = Literal["onnx", "openvino", "torch"]

_EXPORTERS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}
"""Packages, besides torch and the library of the model, whose versions can change an exported file."""


@dataclass(frozen=True)
class Metadata:
    """The metadata that is stored inside an exported file.

    Attributes:
        kind: the engine that runs the file: onnx, openvino or torch. precision: fp32, int8-dynamic or int8-static.
        model: name of the backbone.
        image_size: (height, width) in pixels; the graph takes no other. channels: of an image.
        preprocess: how a photo becomes the input (see `Preprocess`); None if the model does not take photos.
        labels: names of the classes. label_ids: their WordNet ids, if the classes are ImageNet's.
        budget: fraction of the dense FLOPs. config: all settings (see `LifeConfig`).
        start: first block at which a patch may be missing. kept: patches that enter each block.
        grid: (rows, cols) of the patches. flops, dense_flops: per image.
        outputs: logits, or embedding for a model without a classifier; then life (number of blocks each patch takes
            part in) unless it was left out.
        multi_label: whether an image can be of several classes (see `Pipeline`).
        int8_from: in an int8 file, the first block that computes in integers.
        integers: in an int8 file, the integer formats, and the processors on which products are exact.
        parity: how close the graph came to the model when it was exported (see `Parity`): ``images`` compared;
            ``difference`` and ``agreement`` of logits, or ``difference`` and ``cosine`` of embeddings; ``undecided``
            (images left out), ``note``, and ``generated`` (the images were no photos).
        budgets: in a bundle, the budgets of all graphs; empty for a single file.
        versions: versions of the libraries that made the file. patchlife: version of patchlife that made it.
        format: version of these fields.
    """

    kind: Format
    precision: str
    model: str
    image_size: tuple[int, int]
    channels: int
    preprocess: dict[str, Any] | None
    labels: tuple[str, ...]
    label_ids: tuple[str, ...]
    budget: float
    config: dict[str, Any]
    start: int
    kept: tuple[int, ...]
    grid: tuple[int, int]
    flops: int
    dense_flops: int
    outputs: tuple[str, ...]
    multi_label: bool = False
    int8_from: int = 0
    integers: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    patchlife: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """The metadata as text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes | None, where: object) -> Metadata:
        """The inverse of `to_json`. Raises ExportError, which names ``where``, for text that is not of this format."""
        try:
            values = json.loads(text or "")
            file_format, exporter_version = values["format"], values["patchlife"]
        except (ValueError, KeyError, TypeError):
            raise ExportError(
                f"{where} was not exported by patchlife: it holds no patchlife metadata; make one with patchlife export"
            ) from None
        if file_format not in READABLE:
            fix = "upgrade: pip install -U patchlife" if file_format > FORMAT else "export it again: patchlife export"
            raise ExportError(
                f"{where} was exported by patchlife {exporter_version} in format {file_format}, but patchlife "
                f"{__version__} reads the formats {', '.join(map(str, READABLE))}; {fix}"
            )
        known = {name: _lists_to_tuples(values[name]) for name in cls.__dataclass_fields__ if name in values}
        try:
            return cls(**known)
        except TypeError as error:
            raise ExportError(f"{where} holds incomplete metadata ({error}); export it again") from None

    def read_labels(self) -> Labels:
        """Names of the classes."""
        return Labels(self.labels, self.label_ids)

    def read_preprocess(self) -> Preprocess:
        """How a photo becomes the input. Raises ExportError if the model does not take photos, or it is not known."""
        if self.preprocess is None and self.channels != 3:
            raise ExportError(f"{self.model} takes images of {self.channels} channels, so photos cannot be its input")
        if self.preprocess is None:
            raise ExportError(
                f"the exported file of {self.model} does not say how a photo becomes its input; export it again with "
                "preprocess=patchlife.data.Preprocess(...), or call open_engine(file) on prepared images"
            )
        return Preprocess.from_dict(self.preprocess)


def metadata_of(
    model: SlimModel,
    kind: Format,
    labels: Labels | None = None,
    preprocess: Preprocess | None = None,
    lives: bool = True,
    precision: str = "fp32",
    integers: str = "",
    image_size: tuple[int, int] | None = None,
) -> Metadata:
    """The metadata of a file exported from ``model``, still without parity.

    Labels, preprocessing and image size are the backbone's own if not given. Classes without a name get numbers.

    Raises ConfigError for an image size that the model does not take.
    """
    backbone = model.backbone
    size = image_size or backbone.image_size
    schedule, cost = model.schedule(size), flops(model, image_size=size)
    if preprocess is None and backbone.channels == 3 and size == backbone.image_size:
        preprocess = backbone.preprocess
    if backbone.num_classes == 0:
        labels = Labels(())
    elif labels is None:
        labels = Labels(backbone.label_names) if backbone.label_names else numbered_labels(backbone.num_classes)
    return Metadata(
        kind=kind,
        precision=precision,
        model=backbone.name or type(backbone.model).__name__,
        image_size=size,
        channels=backbone.channels,
        preprocess=preprocess.to_dict() if preprocess else None,
        labels=labels.names,
        label_ids=labels.ids,
        budget=cost.budget if model.settings.kept else model.settings.budget,
        config=model.settings.to_dict(),
        start=schedule.start,
        kept=tuple(schedule.kept),
        grid=backbone.grid_of(torch.empty(1, backbone.channels, *size, device="meta")),
        flops=cost.slimmed,
        dense_flops=cost.dense,
        outputs=(backbone.output_name, "life") if lives else (backbone.output_name,),
        multi_label=backbone.multi_label,
        integers=integers,
        versions={name: _version(name) for name in ("torch", backbone.library, *_EXPORTERS[kind])},
    )


def metadata_in(archive: zipfile.ZipFile) -> str:
    """The metadata text inside a zip archive; JSON's null if there is none."""
    names = [name for name in archive.namelist() if name.rpartition("/")[2] == f"{KEY}.json"]
    return archive.read(names[0]).decode() if names else json.dumps(None)


def _lists_to_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
