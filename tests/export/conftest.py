"""One small model, exported once per session to each format, because exporting takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import exported_models
import pytest
from exported_models import ExportedModel

from patchlife.export import export
from patchlife.export.exporter import FORMATS
from patchlife.runtime import open_engine


def _exported(folder: Path, kind: str, **options) -> ExportedModel:
    model = exported_models.small()
    exported = export(model, folder / f"vit.{kind}", kind, images=exported_models.images(9), **options)
    return ExportedModel(model, exported, open_engine(exported.path, threads=1, trust=kind == "torch"))


@pytest.fixture(scope="session")
def export_as(tmp_path_factory) -> Callable[[str], ExportedModel]:
    """From a format to the small model in it, which is exported on first use."""
    return cache(lambda kind: _exported(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def onnx_file(export_as) -> ExportedModel:
    return export_as("onnx")


@pytest.fixture(scope="session")
def openvino_file(export_as) -> ExportedModel:
    return export_as("openvino")


@pytest.fixture(scope="session")
def torch_file(export_as) -> ExportedModel:
    return export_as("torch")


@pytest.fixture(params=FORMATS)
def exported_model(request, export_as) -> ExportedModel:
    """The small model in each format; a new format needs no new fixture."""
    return export_as(request.param)
