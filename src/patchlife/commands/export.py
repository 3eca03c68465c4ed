"""``patchlife export``: a slimmed model as one file, and what it took to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ExportConfig, RunConfig
from ..errors import ConfigError
from ..images import list_photos, load_batches
from .common import open_classifier, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..deploy import Exported
    from ..models import ReadyModel

__all__ = ["prepared_photos", "run"]

_SUFFIX = {"onnx": "onnx", "openvino": "openvino.zip", "torch": "pt2"}


def run(config: ExportConfig) -> int:
    """Write the file; returns the exit code."""
    from ..deploy import export

    ready = open_classifier(config.model, RunConfig(device="cpu"))
    photos, images = _photos(config, ready)
    exported = export(
        ready.model,
        config.out or _named(config, ready),
        config.format,
        images=images,
        labels=ready.labels,
        preprocess=ready.preprocess,
        lives=config.lives,
        int8=config.int8,
    )
    _report(exported)
    if config.labelled and images is not None:
        _report_accuracy(exported, ready, photos, images)
    return 0


def prepared_photos(ready: ReadyModel, photos: Sequence[Path], limit: int) -> tuple[list[Path], Tensor]:
    """(photos that could be read, one image for each), at most ``limit``, evenly spread.

    Raises ConfigError when none can be read.
    """
    import torch

    count = min(limit, len(photos))
    spread = [photos[i * len(photos) // count] for i in range(count)]
    batches = list(load_batches(spread, ready.preprocess, 16))
    good = [spread[i] for batch in batches for i in batch.indices]
    if not good:
        raise ConfigError(f"none of the {count} photos could be read: {batches[0].failures[0][1]}")
    return good, torch.cat([batch.images for batch in batches if batch.indices])


def _photos(config: ExportConfig, ready: ReadyModel) -> tuple[list[Path], Tensor | None]:
    if not config.photos:
        return [], None
    return prepared_photos(ready, list_photos([str(path) for path in config.photos]), config.limit)


def _named(config: ExportConfig, ready: ReadyModel) -> Path:
    int8 = "" if config.int8 == "off" else "-int8"
    return Path(f"{ready.name}-{ready.model.config.budget:g}{int8}.{_SUFFIX[config.format]}")


def _report(exported: Exported) -> None:
    about = exported.about
    size = exported.path.stat().st_size / 1e6
    print(f"{exported.path}: {about.kind}, {about.precision}, {size:.1f} MB")
    print(f"budget {about.budget:g}: {about.flops / about.dense_flops:.3f} of the dense FLOPs, any batch size")
    print(f"compared with the model: {exported.parity}")
    if exported.generated:
        say("compared on generated images; --photos PATH compares on yours")


def _report_accuracy(exported: Exported, ready: ReadyModel, photos: list[Path], images: Tensor) -> None:
    import torch

    from ..deploy import open_engine

    truth = torch.tensor(ready.labels.classes_of(photos))
    engine = open_engine(exported.path)
    with torch.inference_mode():
        before = torch.cat([ready.model(batch).argmax(1) for batch in images.split(16)])
    after = torch.cat([torch.from_numpy(engine(batch.numpy()).logits).argmax(1) for batch in images.split(16)])
    a, b = (100 * float((found == truth).float().mean()) for found in (before, after))
    print(f"top-1 on {len(photos)} photos: {a:.2f} % before, {b:.2f} % in the file ({b - a:+.2f} points)")
