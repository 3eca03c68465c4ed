"""Export one slimmed model at several budgets as a bundle. Every graph is compared with the model first."""

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
from ..io.exported_files import BUNDLE
from ..io.folders import replace_folder
from ..runtime.bundle import WEIGHTS, bundle_json, graph_name
from ..runtime.metadata import Format, Metadata
from ..runtime.tensor_module import tensor_module
from ..slimming import SlimModel
from .exporter import (
    Int8,
    build_and_compare,
    build_file,
    check_request,
    compare_with_model,
    export_graph,
    export_metadata,
    with_parity,
)
from .gated_weights import with_shared_bases
from .images import comparison_images, image_size_of
from .parity import Parity
from .shared_weights import WeightsFile, move_weights

__all__ = ["ExportedBundle", "export_bundle"]


@dataclass(frozen=True)
class ExportedBundle:
    """The result of `export_bundle`.

    Attributes:
        path: the folder.
        graphs_metadata: metadata of each graph, largest budget first.
        parities: parity of each graph, in the same order.
        generated: whether the comparison used generated images, because no photos were given.
    """

    path: Path
    graphs_metadata: tuple[Metadata, ...]
    parities: tuple[Parity, ...]
    generated: bool

    @property
    def size(self) -> int:
        """Bytes on disk of all files."""
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
    image_size: tuple[int, int] | None = None,
    lives: bool = True,
    int8: Int8 = "off",
) -> ExportedBundle:
    """Write ``model`` at each of ``budgets`` as one folder that stores the weights once.

    With a gated weight delta the weights differ between budgets. Float graphs store the weights without the delta once,
    and compute the others when they are opened (`gated_weights.py`); int8 graphs store the integers of each budget.

    Each graph is compared with the model as in `export`, from the files that stay in the folder. The arguments are
    those of `export`, except:

    Args:
        out: the folder. An older bundle is replaced in one step after everything succeeded.
        budgets: fractions of the dense FLOPs.
        format: onnx or openvino. torch has no bundles, because each .pt2 file holds its own weights.

    Raises:
        ConfigError: adaptive mode, torch, a budget out of reach, or a format without this int8.
        MissingExtraError: a package for the format is missing; the message is the install line.
        ExportError: the outputs of a graph differ from the model's, or ``out`` is a folder of something else.
    """
    sorted_budgets = sorted({check_budget(budget, "budgets") for budget in budgets}, reverse=True)
    if not sorted_budgets:
        raise ConfigError("a bundle holds at least one budget, got none")
    if format == "torch":
        raise ConfigError(
            "expected format onnx or openvino for a bundle, got torch, whose .pt2 files hold their own weights; export "
            "one file per budget, or in Python use one model for all budgets: patchlife.runtime.CompiledBudgets"
        )
    check_request(format, int8, images, calibration)
    path = Path(out)
    if path.exists() and not (path / BUNDLE).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists and is not a patchlife bundle; it was not changed, choose another --out")
    module = tensor_module(model, lives)
    size = image_size_of(model, image_size, preprocess, images)
    generated = images is None
    images = comparison_images(module, size) if images is None else images
    graphs_metadata, parities = [], []
    with replace_folder(path) as folder:
        weights = WeightsFile(folder / WEIGHTS)
        for budget in sorted_budgets:
            module.model.set_budget(budget)
            metadata = export_metadata(module, format, labels, preprocess, int8, size)
            metadata = replace(metadata, budgets=tuple(sorted_budgets))
            if int8 == "off":
                graph = with_shared_bases(export_graph(module, metadata), module.model)
                content = build_file(module, metadata, images, graph)
            else:  # the first int8 block must be known before the weights are added to the shared file
                content, metadata, _ = build_and_compare(
                    module, metadata, images, images if calibration is None else calibration
                )
            file = folder / graph_name(metadata)
            file.write_bytes(move_weights(format, content, weights))
            parities.append(compare_with_model(file.read_bytes(), module, metadata, images, weights.path))
            graphs_metadata.append(with_parity(metadata, parities[-1], generated))
        name, text = bundle_json(graphs_metadata)
        (folder / name).write_text(text, "utf-8")
    return ExportedBundle(path, tuple(graphs_metadata), tuple(parities), generated)
