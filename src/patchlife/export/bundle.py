"""Export one slimmed model at several budgets into a package, proved graph by graph before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ..config.checks import check_budget
from ..data import Preprocess
from ..data.labels import Labels
from ..errors import ConfigError, ExportError
from ..io.files import BUNDLE, replace_folder
from ..runtime.bundle import WEIGHTS, bundle_json, graph_name
from ..runtime.describe import describe
from ..runtime.metadata import Format, Metadata
from ..runtime.tensor_module import tensor_module
from ..slimming import SlimModel
from .exporter import Int8, built, check_request, checked, proved, with_parity
from .int8 import integers_of
from .parity import Parity, sample_images
from .shared_weights import WeightsFile, detached

__all__ = ["ExportedBundle", "export_bundle"]


@dataclass(frozen=True)
class ExportedBundle:
    """A finished package.

    Attributes:
        path: the folder. metadatas: of its graphs, the largest budget first. parities: likewise.
        generated: compared on generated images, as no photos were given.
    """

    path: Path
    metadatas: tuple[Metadata, ...]
    parities: tuple[Parity, ...]
    generated: bool

    @property
    def size(self) -> int:
        """Bytes on disk, all files together."""
        return sum(file.stat().st_size for file in self.path.iterdir())


def export_bundle(
    model: SlimModel,
    out: str | Path,
    budgets: Sequence[float],
    format: Format = "onnx",
    *,
    images: Float[Tensor, "n channels height width"] | None = None,
    calibration: Float[Tensor, "n channels height width"] | None = None,
    labels: Labels | None = None,
    preprocess: Preprocess | None = None,
    lives: bool = True,
    int8: Int8 = "off",
) -> ExportedBundle:
    """Write ``model`` at each of ``budgets`` as one folder that holds the weights once.

    Each graph is compared with the model, as `export` does it, from the very files that are then left there. Arguments
    are `export`'s, but for:

    Args:
        out: the folder; an older package is replaced in one step or stays whole.
        budgets: fractions of the dense FLOPs.
        format: onnx or openvino; a .pt2 holds the weights of its own graph, so torch has no package.

    Raises:
        ConfigError: adaptive mode, torch, a budget out of reach, or a format that has no such int8.
        MissingExtraError: a package for the format is missing; the message is the install line.
        ExportError: a graph does not answer as the model does, or ``out`` is a folder of something else.
    """
    chosen = sorted({check_budget(budget, "budgets") for budget in budgets}, reverse=True)
    if not chosen:
        raise ConfigError("a package holds at least one budget, got none")
    if format == "torch":
        raise ConfigError(
            "a .pt2 file holds the weights of one graph, so torch has no package of several budgets; export one file a "
            "budget, or in Python keep one model for all of them: patchlife.deploy.CompiledBudgets"
        )
    check_request(format, int8, images, calibration)
    path = Path(out)
    if path.exists() and not (path / BUNDLE).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists and is not a patchlife package; it was left alone, choose another --out")
    module = tensor_module(model, lives)
    generated = images is None
    if images is None:
        images = sample_images(8, module.model.backbone.channels, module.model.backbone.image_size)
    precision = "fp32" if int8 == "off" else f"int8-{int8}"
    metadatas, parities = [], []
    with replace_folder(path) as fresh:
        weights = WeightsFile(fresh / WEIGHTS)
        for budget in chosen:
            module.model.set_budget(budget)
            metadata = describe(
                module.model, format, labels, preprocess, lives, precision, integers_of(format, precision)
            )
            metadata = replace(metadata, budgets=tuple(chosen))
            if precision == "fp32":
                content = built(module, metadata, images)
            else:  # which form agrees must be known before its weights are put to the others
                content, metadata, _ = proved(module, metadata, images, images if calibration is None else calibration)
            graph = fresh / graph_name(metadata)
            graph.write_bytes(detached(format, content, weights))
            parities.append(checked(graph.read_bytes(), module, metadata, images, weights.path))
            metadatas.append(with_parity(metadata, parities[-1], generated))
        name, text = bundle_json(metadatas)
        (fresh / name).write_text(text, "utf-8")
    return ExportedBundle(path, tuple(metadatas), tuple(parities), generated)
