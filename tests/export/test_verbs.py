"""`patchlife export`, and `patchlife predict` on exported files or with --engine."""

from __future__ import annotations

import json

import exported_models
import pytest
import small as photos_and_weights
import timm
import torch
from safetensors.torch import save_file

from patchlife.cli.export import _default_path
from patchlife.cli.main import main
from patchlife.config import ExportConfig, ModelConfig
from patchlife.data import Preprocess
from patchlife.data.labels import numbered_labels
from patchlife.errors import ExportError
from patchlife.export import Parity
from patchlife.runtime import open_engine
from patchlife.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a checkpoint, and photos in folders of their class."""
    folder = tmp_path_factory.mktemp("desk")
    photos_and_weights.checkpoint(folder / "vit.safetensors")
    photos_and_weights.write_photos(folder / "photos" / "3", 2)
    photos_and_weights.write_photos(folder / "photos" / "5", 2, first=2)
    return folder


def _model(desk):
    return [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")]


@pytest.fixture(scope="module")
def file(desk):
    """A .pt2 file, the fastest format to write, from `patchlife export`."""
    out = desk / "vit.pt2"
    options = [
        "--budget",
        "0.7",
        "--format",
        "torch",
        "--out",
        str(out),
        "--photos",
        str(desk / "photos"),
        "--labelled",
    ]
    assert main(["export", *_model(desk), *options]) == 0
    return out


def _lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_has_the_predictions_of_the_model(desk, file, capsys):
    photos = [str(desk / "photos")]
    assert main(["predict", str(file), *photos, "--trust"]) == 0
    from_file = _lines(capsys)
    assert main(["predict", *_model(desk), *photos, "--budget", "0.7"]) == 0
    from_model = _lines(capsys)
    assert len(from_file) == 4
    for a, b in zip(from_file, from_model, strict=True):
        assert a["run"] != b["run"], "a file and a model may differ in the last digits"
        assert [t["label"] for t in a["top"]] == [t["label"] for t in b["top"]]
        assert a["kept"] == b["kept"]
        assert a["flops"] == b["flops"]
        assert a["fraction_of_dense"] == b["fraction_of_dense"]


def test_a_file_runs_on_the_given_number_of_threads(desk, file, capsys):
    assert torch.get_num_threads() == 1
    assert main(["predict", str(file), str(desk / "photos"), "--trust", "--threads", "2"]) == 0
    assert len(_lines(capsys)) == 4
    assert torch.get_num_threads() == 2


def test_export_reports_its_result(desk, capsys, monkeypatch):
    from patchlife.export import exporter

    monkeypatch.chdir(desk)
    monkeypatch.setattr(exporter, "build_file", lambda *_: b"")  # the export itself is tested above
    monkeypatch.setattr(exporter, "with_metadata", lambda *_: b"")
    monkeypatch.setattr(exporter, "compare_with_model", lambda *_: Parity(3, 0.0, 1.0))
    options = ["--budget", "0.7", "--format", "torch"]
    assert main(["export", *_model(desk), *options]) == 0
    printed = capsys.readouterr()
    assert f"{photos_and_weights.NAME}-0.7.pt2: torch, fp32, 0.0 MB" in printed.out
    assert "of the dense FLOPs, any batch size" in printed.out
    assert "compared with the model: 3 images, largest difference of a logit 0.0e+00" in printed.out
    assert "integers" not in printed.out
    assert "on generated images; give --photos PATH" in printed.err


def test_export_reports_the_first_int8_block(desk, capsys, monkeypatch):
    from patchlife.export import exporter

    monkeypatch.setattr(exporter, "build_file", lambda *_: b"")
    monkeypatch.setattr(exporter, "with_metadata", lambda *_: b"")
    results = [ExportError("too little agreement"), Parity(4, 0.0, 1.0)]

    def compare_with_model(*_):
        result = results.pop(0)
        if isinstance(result, ExportError):
            raise result
        return result

    monkeypatch.setattr(exporter, "compare_with_model", compare_with_model)
    options = ["--budget", "0.7", "--int8", "dynamic", "--out", str(desk / "late.onnx")]
    assert main(["export", *_model(desk), *options]) == 0
    printed = capsys.readouterr().out
    assert "late.onnx: onnx, int8-dynamic from block " in printed
    assert "integers: weights of 8 bits, two neighbours at most 128 together" in printed
    assert "products are exact on every x86 and ARM processor" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "adaptive"], "--mode was fixed at export; remove it"),
        (["--pretrained"], "--pretrained was fixed at export"),
        (["--budget", "0.5"], "was exported at budget 0.7, got 0.5"),
        (["--engine", "onnx"], "drop --engine"),
    ],
)
def test_options_that_are_refused_for_an_exported_file(desk, file, capsys, options, message):
    assert main(["predict", str(file), str(desk / "photos"), "--trust", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_predicts_at_the_given_budget(desk, capsys):
    bundle, photos = desk / "bundle", [str(desk / "photos")]
    options = ["--budgets", "0.7,1.0", "--out", str(bundle), "--photos", *photos, "--labelled"]
    assert main(["export", *_model(desk), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{bundle}: onnx, fp32, 2 budgets, " in printed
    assert "budget 1: 1.000 of the dense FLOPs; " in printed
    assert "budget 0.7, top-1 on 4 photos: " in printed
    runs = set()
    for budget in ("1", "0.7"):
        assert main(["predict", str(bundle), *photos, "--budget", budget]) == 0
        from_bundle = _lines(capsys)
        assert main(["predict", *_model(desk), *photos, "--budget", budget]) == 0
        for a, b in zip(from_bundle, _lines(capsys), strict=True):
            assert a["top"][0]["label"] == b["top"][0]["label"]
            assert (a["kept"], a["flops"]) == (b["kept"], b["flops"])
        runs.add(from_bundle[0]["run"])
    assert len(runs) == 2
    assert main(["predict", str(bundle), *photos, "--budget", "0.5"]) == 2
    assert "holds the budgets 1, 0.7, got 0.5" in capsys.readouterr().err
    assert main(["predict", str(bundle), *photos]) == 2
    assert "choose one with --budget" in capsys.readouterr().err


def test_budget_and_budgets_do_not_go_together(desk, capsys):
    assert main(["export", *_model(desk), "--budgets", "1.0,0.6", "--speedup", "2"]) == 2
    assert "got --speedup as well" in capsys.readouterr().err


def test_labels_can_be_replaced(desk, file, capsys):
    (desk / "labels.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    assert main(["predict", str(file), str(desk / "photos"), "--trust", "--labels", str(desk / "labels.txt")]) == 0
    assert _lines(capsys)[0]["top"][0]["label"].startswith("name ")


def test_a_damaged_file(desk, file, tmp_path, capsys):
    copy = tmp_path / "vit.pt2"
    copy.write_bytes(file.read_bytes()[:-7])
    (tmp_path / "vit.pt2.sha256").write_text(file.with_name("vit.pt2.sha256").read_text())
    assert main(["predict", str(copy), str(desk / "photos"), "--trust"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_labelled_needs_photos(desk, capsys):
    assert main(["export", *_model(desk), "--labelled"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("labelled", "got none", "--photos"))


def test_engines_run_fixed_mode_only(desk, capsys):
    assert main(["predict", *_model(desk), str(desk / "photos"), "--engine", "onnx", "--mode", "adaptive"]) == 2
    assert "runs fixed mode only" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino", "compile"])
def test_predict_on_an_engine(desk, tmp_path, monkeypatch, capsys, engine):
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path))
    assert main(["predict", *_model(desk), str(desk / "photos"), "--budget", "0.7"]) == 0
    eager = _lines(capsys)
    for _ in range(2):  # the second run finds the first one's file
        assert main(["predict", *_model(desk), str(desk / "photos"), "--budget", "0.7", "--engine", engine]) == 0
        for a, b in zip(_lines(capsys), eager, strict=True):
            assert a["kept"] == b["kept"]
            assert a["top"][0]["label"] == b["top"][0]["label"]
            assert a["top"][0]["probability"] == pytest.approx(b["top"][0]["probability"], abs=1e-4)


def test_a_model_without_a_classifier_is_exported_too(tmp_path, desk, capsys):
    vit = timm.create_model(photos_and_weights.NAME, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "headless.safetensors")
    model = [photos_and_weights.NAME, "--checkpoint", str(tmp_path / "headless.safetensors")]
    model += ["--model-args", "num_classes=0", "--budget", "0.7", "--format", "torch"]
    photos = ["--photos", str(desk / "photos"), "--out", str(tmp_path / "headless.pt2")]
    assert main(["export", *model, *photos, "--labelled"]) == 2
    assert "has no classifier, so --labelled has no accuracy to report" in capsys.readouterr().err
    assert main(["export", *model, *photos]) == 0
    assert "mean cosine 1.000000" in capsys.readouterr().out
    assert open_engine(tmp_path / "headless.pt2", trust=True).metadata.outputs == ("embedding", "life")


def test_the_default_file_of_a_model_of_the_hub_is_in_the_current_folder():
    pipeline = Pipeline("facebook/dinov2-small", exported_models.small(), Preprocess(size=(48, 48)), numbered_labels(7))
    for config, name in (({}, "dinov2-small-0.7.onnx"), ({"budgets": (1.0, 0.6)}, "dinov2-small-onnx")):
        assert str(_default_path(ExportConfig(ModelConfig("hf:facebook/dinov2-small"), **config), pipeline)) == name
