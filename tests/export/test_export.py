"""Exported files have the outputs of the model and its metadata, and are written completely or not at all."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import exported_models
import numpy as np
import pytest
import timm
import torch
from families import liven

import patchlife
from patchlife.errors import ConfigError, ExportError, MissingExtraError
from patchlife.export import Parity, export, exporter
from patchlife.export.parity import check_decision, check_outputs, sample_images
from patchlife.io.files import sha256_of
from patchlife.runtime import eager_engine, open_engine
from patchlife.runtime.engine import checksum_file
from patchlife.runtime.metadata import FORMAT
from patchlife.runtime.sessions import ModuleSession
from patchlife.runtime.tensor_module import DecisionModule, TensorModule, tensor_module


@pytest.mark.parametrize("batch", [1, 2, 5, 17])
def test_a_file_has_the_outputs_of_the_model(exported_model, batch):
    images = exported_models.images(batch, seed=batch)
    logits, lives = exported_model.model.predict(images)
    output = exported_model.engine(images.numpy())
    np.testing.assert_allclose(output.logits, logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(output.life, lives.life.numpy())
    predicted = exported_model.engine.predict(images)[1]
    assert torch.equal(predicted.kept, lives.kept)
    assert predicted.grid == lives.grid == (6, 6)
    assert lives.life.unique().numel() > 1


def test_parity_is_returned(exported_model):
    parity = exported_model.exported.parity
    assert parity.difference <= 1e-4
    assert parity.agreement == 1
    assert parity.images >= 9
    assert not exported_model.exported.generated
    assert "images" in str(parity)


def test_metadata_describes_the_model(exported_model):
    metadata, model = exported_model.engine.metadata, exported_model.model
    assert metadata == exported_model.exported.metadata
    assert metadata.image_size == (48, 48)
    assert metadata.kept == model.schedule().kept
    assert metadata.start == 1
    assert metadata.budget == 0.7
    assert metadata.flops / metadata.dense_flops <= 0.7
    assert metadata.patchlife == patchlife.__version__
    assert metadata.read_preprocess().size == (48, 48)
    assert metadata.versions["torch"] == torch.__version__
    assert metadata.outputs == ("logits", "life")
    assert metadata.integers == ""


def test_metadata_holds_the_parity(exported_model):
    parity, stored = exported_model.exported.parity, exported_model.engine.metadata.parity
    assert stored.pop("generated") is False
    assert Parity(**stored) == parity


def test_no_path_of_the_exporting_machine_is_inside(onnx_file, openvino_file, torch_file):
    for exported_model in (onnx_file, openvino_file, torch_file):
        content = exported_model.exported.path.read_bytes()
        assert b"site-packages" not in content
        assert str(exporter.__file__).encode() not in content


def test_the_model_is_not_changed(onnx_file):
    assert next(onnx_file.model.parameters()).requires_grad
    assert onnx_file.model.settings == exported_models.small().settings


def test_the_checksum_is_beside_the_file(exported_model):
    path = exported_model.exported.path
    assert checksum_file(path).read_text() == f"{sha256_of(path)}  {path.name}\n"


def test_openvino_keeps_the_order_of_ties(openvino_file):
    with zipfile.ZipFile(openvino_file.exported.path) as archive:
        xml = archive.read("model.xml").decode()
    assert 'stable="true"' in xml
    assert 'stable="false"' not in xml


def test_budget_one_and_no_lives(tmp_path):
    model = exported_models.small(budget=1.0)
    exported = export(model, tmp_path / "dense.pt2", "torch", lives=False)
    assert exported.generated
    engine = open_engine(exported.path, trust=True)
    output = engine(exported_models.images(3).numpy())
    np.testing.assert_allclose(output.logits, model.backbone.model(exported_models.images(3)).numpy(), atol=1e-5)
    assert output.life is None
    with pytest.raises(ExportError, match="exported without lives"):
        engine.predict(exported_models.images(2))


@pytest.mark.parametrize("kind", ["onnx", "torch", pytest.param("openvino", marks=pytest.mark.slow)])
def test_restored_patches_are_exported(tmp_path, kind):
    """For a model that pools patches; the comparison of `export` runs, too."""
    vit = timm.create_model("vit_tiny_patch16_224", **exported_models.SMALL, global_pool="avg")
    settings = {"budget": 0.7, "start": 1, "drops": (1, 2)}
    model = patchlife.wrap(liven(vit).eval(), patchlife.LifeConfig(**settings, restore="residual"))
    images = exported_models.images(3)
    exported = export(model, tmp_path / f"gap.{kind}", kind, images=exported_models.images(9))
    logits = open_engine(exported.path, trust=kind == "torch")(images.numpy()).logits
    np.testing.assert_allclose(logits, model(images).numpy(), atol=1e-4)
    with model.temporarily(restore="last"):
        assert np.abs(logits - model(images).numpy()).max() > 1e-3
    assert exported.metadata.config["restore"] == "residual"


# ---- what cannot be exported


def test_adaptive_mode_is_refused(tmp_path):
    model = exported_models.small().calibrate([exported_models.images(8)]).set_mode("adaptive")
    with pytest.raises(ConfigError, match="needs fixed mode, got adaptive"):
        export(model, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of onnx, openvino, torch, got 'tflite'"),
        ({"format": "torch", "int8": "static"}, "int8 for torch must be off, got 'static'"),
        ({"format": "openvino", "int8": "static"}, "calibrated on photos, got none"),
        ({"format": "onnx", "int8": "static"}, "got 'static'.*--int8 dynamic, or --format openvino"),
    ],
)
def test_requests_that_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(exported_models.small(), tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "format", "extra"),
    [("onnxscript", "onnx", "onnx"), ("onnxruntime", "onnx", "onnx"), ("openvino", "openvino", "onnx,openvino")],
)
def test_a_missing_extra_names_its_install_line(tmp_path, monkeypatch, missing, format, extra):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing}, .*pip install 'patchlife\[{extra}\]'"):
        export(exported_models.small(), tmp_path / "a", format)


# ---- files with wrong outputs are refused


class Wrong(torch.nn.Module):
    """A module with one error in its outputs, made by ``spoil``."""

    def __init__(self, module, spoil):
        super().__init__()
        self.module, self.spoil = module, spoil

    def forward(self, images):
        logits, life = self.module(images)
        return self.spoil(logits.clone(), life.clone())


def _shift_logit(logits, life):
    logits[-1, 3] += 0.01
    return logits, life


def _swap_lives(logits, life):
    life[0, 0] = 3 - life[0, 0]
    return logits, life


def _hide_nan(logits, life):
    return logits.nan_to_num(), life


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shift_logit, r"its logits differ: image 0 of a batch of 1, logit 3 is"),
        (_swap_lives, r"first differs at block \d of 3: image 0 of a batch of 1, the life of patch 0"),
        (_hide_nan, "image of NaN gives finite logits"),
    ],
)
def test_a_graph_with_wrong_outputs_leaves_no_file(tmp_path, monkeypatch, spoil, message):
    model = exported_models.small()
    wrong = ModuleSession(Wrong(tensor_module(model), spoil))
    monkeypatch.setattr(exporter, "build_file", lambda *_: b"")
    monkeypatch.setattr(exporter, "open_session", lambda *_: wrong)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "a.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_an_engine_with_another_order_of_ties_is_refused(monkeypatch):
    model = exported_models.small()

    class LastFirst(DecisionModule):
        def forward(self, scores):
            flipped = super().forward(scores.flip(1))
            return flipped[0].flip(1), scores.shape[1] - 1 - flipped[1], flipped[2]

    session = ModuleSession(LastFirst(model.schedule(), (6, 6)))
    with pytest.raises(ExportError, match="differs from torch's if scores are tied"):
        check_decision(session, model.schedule(), (6, 6))


class NearlyTied(TensorModule):
    """A model whose logits depend on the sign of the mean pixel, which rounding noise changes if it is near zero."""

    def forward(self, images):
        logits, life = super().forward(images)
        positive = (images.mean(dim=(1, 2, 3)) > 0).float()[:, None]
        return logits + positive, life


def test_images_whose_prediction_changes_under_rounding_noise_are_left_out():
    plain = tensor_module(exported_models.small())
    module = NearlyTied(plain.model, lives=True)
    images = exported_models.images(20) + 0.5
    images[7] -= images[7].mean()
    session = ModuleSession(Wrong(plain, lambda logits, life: (logits + 1, life)))  # as if every mean were positive
    images[7] -= 1e-7
    parity = check_outputs(session, module, images, 1e-4)
    assert parity.undecided >= 1
    assert parity.images >= 20


# ---- files that cannot be opened


@pytest.fixture
def copied(exported_model, tmp_path):
    """A copy of an exported file and its checksum."""
    path = tmp_path / exported_model.exported.path.name
    for original in (exported_model.exported.path, checksum_file(exported_model.exported.path)):
        shutil.copy(original, tmp_path)
    return path


def test_a_flipped_bit_is_detected(copied):
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 1
    copied.write_bytes(content)
    with pytest.raises(ExportError, match="is damaged: its sha256 is not the one in"):
        open_engine(copied)


def test_a_file_without_checksum(copied):
    checksum_file(copied).unlink()
    with pytest.raises(ExportError, match=r"has no .*\.sha256 beside it"):
        open_engine(copied)


def test_no_file(tmp_path):
    with pytest.raises(ExportError, match="no exported model at"):
        open_engine(tmp_path / "none.onnx")


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"not a model")
    checksum_file(path).write_text(f"{sha256_of(path)}  a.onnx\n")
    with pytest.raises(ExportError, match="cannot be read by its engine"):
        open_engine(path)


def _of_format(path: Path, exported_model, format: int) -> Path:
    """A copy of an OpenVINO file whose metadata has another format."""
    with zipfile.ZipFile(exported_model.exported.path) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "patchlife.json":
                content = json.dumps(json.loads(content) | {"format": format, "patchlife": "9.0"})
            new.writestr(name, content)
    checksum_file(path).write_text(f"{sha256_of(path)}  {path.name}\n")
    return path


@pytest.mark.parametrize(
    ("format", "fix"), [(FORMAT + 1, "pip install -U patchlife"), (1, "export it again: patchlife export")]
)
def test_a_file_of_another_format(openvino_file, tmp_path, format, fix):
    assert FORMAT == 3
    path = _of_format(tmp_path / "other", openvino_file, format)
    with pytest.raises(ExportError, match=rf"patchlife 9\.0 in format {format}, .*reads the formats 2, 3; .*{fix}"):
        open_engine(path)


def test_a_file_of_the_previous_format_is_read(openvino_file, tmp_path):
    path = _of_format(tmp_path / "previous", openvino_file, 2)
    images = exported_models.images(2).numpy()
    np.testing.assert_array_equal(open_engine(path)(images).logits, openvino_file.engine(images).logits)


def test_a_model_that_patchlife_did_not_export(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    path = tmp_path / "plain.onnx"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "plain", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    checksum_file(path).write_text(f"{sha256_of(path)}  plain.onnx\n")
    with pytest.raises(ExportError, match="was not exported by patchlife"):
        open_engine(path)


# ---- input that does not fit


def test_a_photo_of_another_size(exported_model):
    with pytest.raises(ConfigError, match=r"takes batches of images \(3, 48, 48\).*got shape \(1, 3, 32, 32\)"):
        exported_model.engine(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(ConfigError, match="must be float32"):
        exported_model.engine(np.zeros((1, 3, 48, 48)))


def test_another_budget_than_the_file_has(onnx_file):
    with pytest.raises(ConfigError, match=r"exported at budget 0\.7, got 0\.5"):
        open_engine(onnx_file.exported.path, budget=0.5)


# ---- the rest


def test_an_eager_engine_has_the_outputs_of_the_model():
    model = exported_models.small()
    engine = eager_engine(model)
    logits, lives = engine.predict(exported_models.images(4))
    assert torch.equal(logits, model(exported_models.images(4)))
    assert torch.equal(lives.life, model.lives(exported_models.images(4)).life)


def test_generated_images_differ_and_are_normalised():
    images = sample_images(4, 3, (32, 48))
    assert images.shape == (4, 3, 32, 48)
    assert abs(float(images.std()) - 1) < 0.01
    assert (images[0] - images[1]).abs().max() > 0.5
