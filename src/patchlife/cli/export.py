"""``patchlife export``: a slimmed model as one file, or at several budgets as one package, proved first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ExportConfig, RunConfig
from ..data import evenly_spaced, load_batches
from ..errors import ConfigError
from ..extras import require_export
from .common import classes_of, find_photos, open_classifier, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..export import Exported, ExportedPackage
    from ..runtime import About
    from ..runtime.opening import ReadyModel

__all__ = ["prepared_photos", "run"]

_SUFFIX = {"onnx": "onnx", "openvino": "openvino.zip", "torch": "pt2"}


def run(config: ExportConfig) -> int:
    """Write the file or the package; returns the exit code."""
    require_export(config.format, config.int8 != "off")
    from ..export import export, export_package
    from ..export.exporter import check_request

    check_request(config.format, config.int8, config.photos)  # before a model is built or a photo is read
    listed = find_photos(config.photos) if config.photos else []
    ready = open_classifier(config.model, RunConfig(device="cpu"))
    if ready.model.config.mode != "fixed":
        raise ConfigError("an exported graph keeps the same number of patches of every image; give --mode fixed")
    truth = _truth(config, ready, listed)
    photos, images = prepared_photos(ready, listed, config.limit) if listed else ([], None)
    how: dict[str, Any] = {"images": images, "labels": ready.labels, "preprocess": ready.preprocess}
    how |= {"lives": config.lives, "int8": config.int8}
    out = config.out or _named(config, ready)
    if config.budgets:
        package = export_package(ready.model, out, config.budgets, config.format, **how)
        _report_package(package)
        budgets = [about.budget for about in package.abouts]
    else:
        exported = export(ready.model, out, config.format, **how)
        _report(exported)
        budgets = [exported.about.budget]
    if images is None:
        say("compared on generated images; --photos PATH compares on yours")
    elif config.labelled:
        for budget in budgets:
            _report_accuracy(out, budget, ready, [truth[photo] for photo in photos], images)
    return 0


def prepared_photos(ready: ReadyModel, photos: Sequence[Path], limit: int) -> tuple[list[Path], Tensor]:
    """(photos that could be read, one image for each), at most ``limit``, evenly spread.

    Raises ConfigError when none can be read.
    """
    import torch

    chosen = evenly_spaced(photos, limit)
    batches = list(load_batches(chosen, ready.preprocess, 16))
    good = [chosen[i] for batch in batches for i in batch.indices]
    if not good:
        raise ConfigError(f"none of the {len(chosen)} photos could be read: {batches[0].failures[0][1]}")
    return good, torch.cat([batch.images for batch in batches if batch.indices])


def _truth(config: ExportConfig, ready: ReadyModel, photos: Sequence[Path]) -> dict[Path, int]:
    """The class of each photo; empty if it is not asked for."""
    if not config.labelled:
        return {}
    return dict(zip(photos, classes_of(ready.labels, photos, config.model.class_order), strict=True))


def _named(config: ExportConfig, ready: ReadyModel) -> Path:
    int8 = "" if config.int8 == "off" else "-int8"
    if config.budgets:
        return Path(f"{ready.name}{int8}-{config.format}")
    return Path(f"{ready.name}-{ready.model.config.budget:g}{int8}.{_SUFFIX[config.format]}")


def _report(exported: Exported) -> None:
    about = exported.about
    size = exported.path.stat().st_size / 1e6
    print(f"{exported.path}: {about.kind}, {about.precision}{_late(about)}, {size:.1f} MB")
    print(f"budget {about.budget:g}: {about.flops / about.dense_flops:.3f} of the dense FLOPs, any batch size")
    _report_integers(about)
    print(f"compared with the model: {exported.parity}")


def _late(about: About) -> str:
    """Where int8 begins, if that is not at the first block."""
    return f" from block {about.int8_from} on" if about.int8_from else ""


def _report_integers(about: About) -> None:
    if about.integers:
        print(f"integers: {about.integers}")


def _report_package(package: ExportedPackage) -> None:
    about = package.abouts[0]
    made = f"{about.kind}, {about.precision}, {len(package.abouts)} budgets"
    print(f"{package.path}: {made}, {package.size / 1e6:.1f} MB together")
    _report_integers(about)
    for about, parity in zip(package.abouts, package.parities, strict=True):
        late = f", int8{_late(about)}" if about.int8_from else ""
        print(f"budget {about.budget:g}: {about.flops / about.dense_flops:.3f} of the dense FLOPs{late}; {parity}")


def _report_accuracy(out: Path, budget: float, ready: ReadyModel, classes: list[int], images: Tensor) -> None:
    import torch

    from ..runtime import open_engine

    truth = torch.tensor(classes)
    engine = open_engine(out, budget=budget, trust=True)  # written just now, by us
    settings = {"budget": budget} if engine.about.budgets else {}
    with torch.inference_mode(), ready.model.temporarily(**settings):
        before = torch.cat([ready.model(batch).argmax(1) for batch in images.split(16)])
    after = torch.cat([torch.from_numpy(engine(batch.numpy()).logits).argmax(1) for batch in images.split(16)])
    a, b = (100 * float((found == truth).float().mean()) for found in (before, after))
    where = f"budget {budget:g}, " if engine.about.budgets else ""
    print(f"{where}top-1 on {len(classes)} photos: {a:.2f} % before, {b:.2f} % in the file ({b - a:+.2f} points)")
