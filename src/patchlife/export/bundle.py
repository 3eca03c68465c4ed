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
from ..io.files import PACKAGE, replace_folder
from ..runtime.bundle import WEIGHTS, graph_name, package_json
from ..runtime.describe import describe
from ..runtime.metadata import About, Format
from ..runtime.tensor_module import exportable
from ..slimming import SlimModel
from .exporter import Int8, built, check_request, checked, proved, with_parity
from .int8 import integers_of
from .parity import Parity, sample_images
from .shared_weights import WeightsFile, detached

__all__ = ["ExportedPackage", "export_package"]


@dataclass(frozen=True)
class ExportedPackage:
    """A finished package.

    Attributes:
        path: the folder. abouts: of its graphs, the largest budget first. parities: likewise.
        generated: compared on generated images, as no photos were given.
    """

    path: Path
    abouts: tuple[About, ...]
    parities: tuple[Parity, ...]
    generated: bool

    @property
    def size(self) -> int:
        """Bytes on disk, all files together."""
        return sum(file.stat().st_size for file in self.path.iterdir())


def export_package(
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
) -> ExportedPackage:
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
    if path.exists() and not (path / PACKAGE).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists and is not a patchlife package; it was left alone, choose another --out")
    module = exportable(model, lives)
    generated = images is None
    if images is None:
        images = sample_images(8, module.model.backbone.channels, module.model.backbone.image_size)
    precision = "fp32" if int8 == "off" else f"int8-{int8}"
    abouts, parities = [], []
    with replace_folder(path) as fresh:
        weights = WeightsFile(fresh / WEIGHTS)
        for budget in chosen:
            module.model.set_budget(budget)
            about = describe(module.model, format, labels, preprocess, lives, precision, integers_of(format, precision))
            about = replace(about, budgets=tuple(chosen))
            if precision == "fp32":
                content = built(module, about, images)
            else:  # which form agrees must be known before its weights are put to the others
                content, about, _ = proved(module, about, images, images if calibration is None else calibration)
            graph = fresh / graph_name(about)
            graph.write_bytes(detached(format, content, weights))
            parities.append(checked(graph.read_bytes(), module, about, images, weights.path))
            abouts.append(with_parity(about, parities[-1], generated))
        name, text = package_json(abouts)
        (fresh / name).write_text(text, "utf-8")
    return ExportedPackage(path, tuple(abouts), tuple(parities), generated)
