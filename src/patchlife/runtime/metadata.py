"""What an exported file says about itself: everything that it takes to use it, without the model it came from."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ExportError
from ..version import __version__

if TYPE_CHECKING:
    from ..data import Preprocess
    from ..data.labels import Labels

__all__ = ["FORMAT", "KEY", "Format", "Metadata", "metadata_in"]

FORMAT = 1
KEY = "patchlife"
"""Under this name, or this name with .json, the description lies inside the file."""

Format = Literal["onnx", "openvino", "torch"]


@dataclass(frozen=True)
class Metadata:
    """A description that travels inside the exported file.

    Attributes:
        kind: which engine runs it: onnx, openvino or torch. precision: fp32, int8-dynamic or int8-static.
        model: the backbone's name.
        image_size: (height, width) in pixels; the graph takes no other. channels: of an image.
        preprocess: how a photo becomes its input (see `Preprocess`); None if it does not take photos.
        labels: names of the classes. label_ids: their WordNet ids, if they are ImageNet's.
        budget: fraction of the dense FLOPs. config: all settings (see `LifeConfig`).
        start: first block at which a patch may be missing. kept: patches that enter each block.
        grid: (rows, cols) of the patches. flops, dense_flops: per image.
        outputs: logits, and life (how many blocks each patch lives) if it was asked for.
        int8_from: the block from which on an int8 file computes in integers.
        integers: the form of an int8 file's integers, and on which processors their products are exact.
        parity: how close the graph came to the model when it was exported: ``images`` compared, ``difference`` (the
            largest between two logits), ``agreement`` (fraction of the images whose likeliest class is the same),
            ``undecided`` (images left out, see `Parity`) and ``generated`` (the images were no photos).
        budgets: in a package of several budgets, all of them; this one is ``budget``.
        versions: of the libraries that made it. patchlife: likewise. format: of this description.
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
    int8_from: int = 0
    integers: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    patchlife: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """The description as text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes | None, where: object) -> Metadata:
        """The inverse of `to_json`. Raises ExportError if ``text`` is no description, or a newer patchlife's."""
        try:
            values = json.loads(text or "")
            found, maker = values["format"], values["patchlife"]
        except (ValueError, KeyError, TypeError):
            raise ExportError(
                f"{where} was not exported by patchlife: it holds no description of itself; make one with "
                "patchlife export"
            ) from None
        if found > FORMAT:
            raise ExportError(
                f"{where} was exported by patchlife {maker} in format {found}; this is {__version__}, which reads "
                f"up to format {FORMAT}: pip install -U patchlife"
            )
        known = {name: _tupled(values[name]) for name in cls.__dataclass_fields__ if name in values}
        try:
            return cls(**known)
        except TypeError as error:
            raise ExportError(f"{where} holds an incomplete description ({error}); export it again") from None

    def read_labels(self) -> Labels:
        """Names of the classes."""
        from ..data.labels import Labels

        return Labels(self.labels, self.label_ids)

    def read_preprocess(self) -> Preprocess:
        """How a photo becomes the graph's input. Raises ExportError if it takes no photos."""
        from ..data import Preprocess

        if self.preprocess is None:
            raise ExportError(f"{self.model} takes images of {self.channels} channels, which photos have not")
        return Preprocess.from_dict(self.preprocess)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def metadata_in(archive: zipfile.ZipFile) -> str:
    """The description inside a zip of ours, or an empty text."""
    names = [name for name in archive.namelist() if name.rpartition("/")[2] == f"{KEY}.json"]
    return archive.read(names[0]).decode() if names else json.dumps(None)
