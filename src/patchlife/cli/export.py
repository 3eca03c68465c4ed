"""``patchlife export``: write a slimmed model as one file, or as a bundle of several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ExportConfig
from ..data import evenly_spaced, load_batches
from ..errors import ConfigError
from ..extras import require_export
from .common import classes_of, find_photos, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..export import Exported, ExportedBundle
    from ..runtime import Metadata
    from ..runtime.pipeline import Pipeline

__all__ = ["prepared_photos", "run"]

_SUFFIX = {"onnx": "onnx", "openvino": "openvino.zip", "torch": "pt2"}


def run(config: ExportConfig) -> int:
    """Write the file or the bundle; returns the exit code."""
    require_export(config.format, config.int8 != "off")
    from ..export import export, export_bundle
    from ..export.exporter import check_request
    from ..runtime.opening import open_pipeline

    check_request(config.format, config.int8, config.photos)  # before a model is built or a photo is read
    listed = find_photos(config.photos) if config.photos else []
    pipeline = open_pipeline(config.model)
    if pipeline.model.settings.mode != "fixed":
        raise ConfigError("an exported graph keeps the same number of patches for every image; give --mode fixed")
    class_of = _true_classes(config, pipeline, listed)
    photos, images = prepared_photos(pipeline, listed, config.max_photos) if listed else ([], None)
    options: dict[str, Any] = {"images": images, "labels": pipeline.labels, "preprocess": pipeline.preprocess}
    options |= {"lives": config.lives, "int8": config.int8}
    out = config.out or _default_path(config, pipeline)
    if config.budgets:
        bundle = export_bundle(pipeline.model, out, config.budgets, config.format, **options)
        _report_bundle(bundle)
        budgets = [metadata.budget for metadata in bundle.graphs_metadata]
    else:
        exported = export(pipeline.model, out, config.format, **options)
        _report(exported)
        budgets = [exported.metadata.budget]
    if images is None:
        say("compared with the model on generated images; give --photos PATH to compare on photos")
    elif config.labelled:
        for budget in budgets:
            _report_accuracy(out, budget, pipeline, [class_of[photo] for photo in photos], images)
    return 0


def prepared_photos(pipeline: Pipeline, photos: Sequence[Path], limit: int) -> tuple[list[Path], Tensor]:
    """(paths, images) of at most ``limit`` evenly spaced photos, without those that cannot be read.

    Raises ConfigError if none can be read.
    """
    import torch

    chosen = evenly_spaced(photos, limit)
    batches = list(load_batches(chosen, pipeline.preprocess, 16))
    good = [chosen[i] for batch in batches for i in batch.indices]
    if not good:
        raise ConfigError(f"none of the {len(chosen)} photos could be read: {batches[0].failures[0][1]}")
    return good, torch.cat([batch.images for batch in batches if batch.indices])


def _true_classes(config: ExportConfig, pipeline: Pipeline, photos: Sequence[Path]) -> dict[Path, int]:
    """The class index of each photo; empty without --labelled."""
    if not config.labelled:
        return {}
    if not pipeline.labels.names:
        raise ConfigError(f"{pipeline.name} has no classifier, so --labelled has no accuracy to report; remove it")
    return dict(zip(photos, classes_of(pipeline.labels, photos, config.model.class_order), strict=True))


def _default_path(config: ExportConfig, pipeline: Pipeline) -> Path:
    name, int8 = Path(pipeline.name).name, "" if config.int8 == "off" else "-int8"
    if config.budgets:
        return Path(f"{name}{int8}-{config.format}")
    return Path(f"{name}-{pipeline.model.settings.budget:g}{int8}.{_SUFFIX[config.format]}")


def _report(exported: Exported) -> None:
    metadata = exported.metadata
    size = exported.path.stat().st_size / 1e6
    print(f"{exported.path}: {metadata.kind}, {metadata.precision}{_int8_start(metadata)}, {size:.1f} MB")
    print(f"budget {metadata.budget:g}: {metadata.flops / metadata.dense_flops:.3f} of the dense FLOPs, any batch size")
    _report_integers(metadata)
    print(f"compared with the model: {exported.parity}")


def _int8_start(metadata: Metadata) -> str:
    """The first block in int8, as text; empty if all blocks are."""
    return f" from block {metadata.int8_from} on" if metadata.int8_from else ""


def _report_integers(metadata: Metadata) -> None:
    if metadata.integers:
        print(f"integers: {metadata.integers}")


def _report_bundle(bundle: ExportedBundle) -> None:
    metadata = bundle.graphs_metadata[0]
    contents = f"{metadata.kind}, {metadata.precision}, {len(bundle.graphs_metadata)} budgets"
    print(f"{bundle.path}: {contents}, {bundle.size / 1e6:.1f} MB in total")
    _report_integers(metadata)
    for metadata, parity in zip(bundle.graphs_metadata, bundle.parities, strict=True):
        int8 = f", int8{_int8_start(metadata)}" if metadata.int8_from else ""
        fraction = metadata.flops / metadata.dense_flops
        print(f"budget {metadata.budget:g}: {fraction:.3f} of the dense FLOPs{int8}; {parity}")


def _report_accuracy(out: Path, budget: float, pipeline: Pipeline, classes: list[int], images: Tensor) -> None:
    import torch

    from ..runtime import open_engine

    truth = torch.tensor(classes)
    engine = open_engine(out, budget=budget, trust=True)  # this process wrote the file
    settings = {"budget": budget} if engine.metadata.budgets else {}
    with torch.inference_mode(), pipeline.model.temporarily(**settings):
        before = torch.cat([pipeline.model.output(batch).argmax(1) for batch in images.split(16)])
    after = torch.cat([torch.from_numpy(engine(batch.numpy()).logits).argmax(1) for batch in images.split(16)])
    a, b = (100 * float((predicted == truth).float().mean()) for predicted in (before, after))
    prefix = f"budget {budget:g}, " if engine.metadata.budgets else ""
    print(f"{prefix}top-1 on {len(classes)} photos: {a:.2f} % before, {b:.2f} % in the file ({b - a:+.2f} points)")
