"""One small model, exported once to each format: exporting takes seconds, running what was exported does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import exported_models
import pytest
from exported_models import Shipped

from patchlife.export import export
from patchlife.export.exporter import FORMATS
from patchlife.runtime import open_engine


def _shipped(folder: Path, kind: str, **options) -> Shipped:
    model = exported_models.small()
    exported = export(model, folder / f"vit.{kind}", kind, images=exported_models.images(9), **options)
    return Shipped(model, exported, open_engine(exported.path, threads=1, trust=kind == "torch"))


@pytest.fixture(scope="session")
def shipped_as(tmp_path_factory) -> Callable[[str], Shipped]:
    """The small model in one format, exported when it is first used."""
    return cache(lambda kind: _shipped(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def onnx_file(shipped_as) -> Shipped:
    return shipped_as("onnx")


@pytest.fixture(scope="session")
def openvino_file(shipped_as) -> Shipped:
    return shipped_as("openvino")


@pytest.fixture(scope="session")
def torch_file(shipped_as) -> Shipped:
    return shipped_as("torch")


@pytest.fixture(params=FORMATS)
def shipped(request, shipped_as) -> Shipped:
    """The small model in each format; a new format is tested without a new fixture."""
    return shipped_as(request.param)
