"""`patchlife export`, and `patchlife predict` on what it wrote or with --engine."""

from __future__ import annotations

import json

import pytest
import small as photos_and_weights

from patchlife.cli.main import main
from patchlife.errors import ExportError
from patchlife.export import Parity


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A checkpoint, photos in folders of their class, and the checkpoint's export as .pt2 (the quickest to make)."""
    folder = tmp_path_factory.mktemp("desk")
    photos_and_weights.checkpoint(folder / "vit.safetensors")
    photos_and_weights.write_photos(folder / "photos" / "3", 2)
    photos_and_weights.write_photos(folder / "photos" / "5", 2, first=2)
    return folder


def _model(desk):
    return [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")]


@pytest.fixture(scope="module")
def file(desk):
    """What `patchlife export` wrote."""
    out = desk / "vit.pt2"
    said = ["--budget", "0.7", "--format", "torch", "--out", str(out), "--photos", str(desk / "photos"), "--labelled"]
    assert main(["export", *_model(desk), *said]) == 0
    return out


def _lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_predicts_as_the_model(desk, file, capsys):
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


def test_export_says_what_it_did(desk, capsys, monkeypatch):
    from patchlife.export import exporter

    monkeypatch.chdir(desk)
    monkeypatch.setattr(exporter, "built", lambda *_: b"")  # the export itself is tested above
    monkeypatch.setattr(exporter, "restated", lambda *_: b"")
    monkeypatch.setattr(exporter, "checked", lambda *_: Parity(3, 0.0, 1.0))
    said = ["--budget", "0.7", "--format", "torch"]
    assert main(["export", *_model(desk), *said]) == 0
    printed = capsys.readouterr()
    assert f"{photos_and_weights.NAME}-0.7.pt2: torch, fp32, 0.0 MB" in printed.out
    assert "of the dense FLOPs, any batch size" in printed.out
    assert "compared with the model: 3 images, largest difference of a logit 0.0e+00" in printed.out
    assert "integers" not in printed.out
    assert "on generated images; give --photos PATH" in printed.err


def test_export_says_where_int8_begins(desk, capsys, monkeypatch):
    from patchlife.export import exporter

    monkeypatch.setattr(exporter, "built", lambda *_: b"")
    monkeypatch.setattr(exporter, "restated", lambda *_: b"")
    answers = [ExportError("int8 names the same class too rarely"), Parity(4, 0.0, 1.0)]

    def checked(*_):
        answer = answers.pop(0)
        if isinstance(answer, ExportError):
            raise answer
        return answer

    monkeypatch.setattr(exporter, "checked", checked)
    said = ["--budget", "0.7", "--int8", "dynamic", "--out", str(desk / "late.onnx")]
    assert main(["export", *_model(desk), *said]) == 0
    printed = capsys.readouterr().out
    assert "late.onnx: onnx, int8-dynamic from block " in printed
    assert "integers: weights of 8 bits, two neighbours at most 128 together" in printed
    assert "products are exact on every x86 and ARM processor" in printed


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["--mode", "adaptive"], "--mode was settled by patchlife export; drop it"),
        (["--pretrained"], "--pretrained was settled by patchlife export"),
        (["--budget", "0.5"], "holds one budget, 0.7, got 0.5"),
        (["--engine", "onnx"], "drop --engine"),
    ],
)
def test_what_an_exported_file_cannot_be_told(desk, file, capsys, said, message):
    assert main(["predict", str(file), str(desk / "photos"), "--trust", *said]) == 2
    assert message in capsys.readouterr().err


def test_a_package_predicts_at_the_budget_that_is_asked_for(desk, capsys):
    package, photos = desk / "package", [str(desk / "photos")]
    said = ["--budgets", "0.7,1.0", "--out", str(package), "--photos", *photos, "--labelled"]
    assert main(["export", *_model(desk), *said]) == 0
    printed = capsys.readouterr().out
    assert f"{package}: onnx, fp32, 2 budgets, " in printed
    assert "budget 1: 1.000 of the dense FLOPs; " in printed
    assert "budget 0.7, top-1 on 4 photos: " in printed
    runs = set()
    for budget in ("1", "0.7"):
        assert main(["predict", str(package), *photos, "--budget", budget]) == 0
        from_package = _lines(capsys)
        assert main(["predict", *_model(desk), *photos, "--budget", budget]) == 0
        for a, b in zip(from_package, _lines(capsys), strict=True):
            assert a["top"][0]["label"] == b["top"][0]["label"]
            assert (a["kept"], a["flops"]) == (b["kept"], b["flops"])
        runs.add(from_package[0]["run"])
    assert len(runs) == 2
    assert main(["predict", str(package), *photos, "--budget", "0.5"]) == 2
    assert "holds the budgets 1, 0.7, got 0.5" in capsys.readouterr().err
    assert main(["predict", str(package), *photos]) == 2
    assert "say which one with --budget" in capsys.readouterr().err


def test_budget_and_budgets_do_not_go_together(desk, capsys):
    assert main(["export", *_model(desk), "--budgets", "1.0,0.6", "--speedup", "2"]) == 2
    assert "got --speedup as well; give one of both" in capsys.readouterr().err


def test_labels_may_be_given_anew(desk, file, capsys):
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
    assert "labelled is about photos, got none" in capsys.readouterr().err


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
