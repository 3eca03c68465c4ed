"""One small model, exported once per session to each format, because exporting takes seconds."""

from __future__ import annotations

from pathlib import Path

import exported_models
import pytest
from exported_models import ExportedModel

from patchlife.export import export
from patchlife.runtime import open_engine


def _exported(folder: Path, kind: str, **options) -> ExportedModel:
    model = exported_models.small()
    exported = export(model, folder / f"vit.{kind}", kind, images=exported_models.images(9), **options)
    return ExportedModel(model, exported, open_engine(exported.path, threads=1, trust=kind == "torch"))


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory) -> ExportedModel:
    return _exported(tmp_path_factory.mktemp("onnx"), "onnx")


@pytest.fixture(scope="session")
def openvino_file(tmp_path_factory) -> ExportedModel:
    return _exported(tmp_path_factory.mktemp("openvino"), "openvino")


@pytest.fixture(scope="session")
def torch_file(tmp_path_factory) -> ExportedModel:
    return _exported(tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture(params=["onnx", "openvino", "torch"])
def exported_model(request) -> ExportedModel:
    """The small model in each format."""
    return request.getfixturevalue(f"{request.param}_file")
