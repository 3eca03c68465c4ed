"""One small model, exported once to each format: exporting takes seconds, running what was exported does not."""

from __future__ import annotations

from pathlib import Path

import exported_models
import pytest
from exported_models import Shipped

from patchlife.export import export
from patchlife.runtime import open_engine


def _shipped(folder: Path, kind: str, **options) -> Shipped:
    model = exported_models.small()
    exported = export(model, folder / f"vit.{kind}", kind, images=exported_models.images(9), **options)
    return Shipped(model, exported, open_engine(exported.path, threads=1, trust=kind == "torch"))


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory) -> Shipped:
    return _shipped(tmp_path_factory.mktemp("onnx"), "onnx")


@pytest.fixture(scope="session")
def openvino_file(tmp_path_factory) -> Shipped:
    return _shipped(tmp_path_factory.mktemp("openvino"), "openvino")


@pytest.fixture(scope="session")
def torch_file(tmp_path_factory) -> Shipped:
    return _shipped(tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture(params=["onnx", "openvino", "torch"])
def shipped(request) -> Shipped:
    """The small model in each format."""
    return request.getfixturevalue(f"{request.param}_file")
