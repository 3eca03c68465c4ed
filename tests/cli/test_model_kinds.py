"""The verbs on models of transformers and open_clip, and in other number formats."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from saved_models import ARCH, NAMES, SHAPE, classifier, lively, open_clip_weights, processor, register_open_clip, saved
from small import write_photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A classifier of transformers."""
    return saved(tmp_path_factory.mktemp("models") / "vit-small", classifier())


@pytest.fixture
def data(tmp_path) -> Path:
    """Photos in folders of two classes of the model."""
    for name in NAMES[:2]:
        write_photos(tmp_path / "data" / name, 3)
    return tmp_path / "data"


SLIM = ["--budget", 0.7, "--start", 2, "--device", "cpu"]
CLOSE = 0.05  # of probabilities, between number formats


def test_predictions_are_those_of_the_image_processor_and_model(patchlife, folder, photos):
    result = patchlife("predict", folder, *photos, "--budget", 1, "--device", "cpu", "--top", 1)
    assert result.code == 0, result.err
    of_photos = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    for record, path in zip(result.records, photos, strict=True):
        with Image.open(path) as photo, torch.no_grad():
            expected = model(**of_photos(photo.convert("RGB"), return_tensors="pt")).logits.softmax(-1)[0]
        assert record["top"][0]["label"] == NAMES[expected.argmax()]
        assert record["top"][0]["probability"] == pytest.approx(expected.max().item(), abs=0.01)


def test_a_multi_label_model_gives_sigmoids(patchlife, tmp_path, photos):
    folder = saved(tmp_path / "vit", classifier(problem_type="multi_label_classification"))
    result = patchlife("predict", folder, photos[0], *SLIM, "--top", 10)
    assert result.code == 0, result.err
    assert sum(entry["probability"] for entry in result.records[0]["top"]) != pytest.approx(1, abs=0.01)


def test_info(patchlife, folder):
    description = json.loads(patchlife("info", folder, *SLIM[:4], "--json").out)
    assert description["model"] == "vit-small"
    assert (description["classes"], description["image_size"], description["grid"]) == (10, [48, 48], [6, 6])
    assert description["weights"] == f"hf:{folder}"
    assert description["limits"] == []
    other = json.loads(patchlife("info", folder, *SLIM[:4], "--image-size", 96, "--json").out)
    assert (other["image_size"], other["patches"]) == ([96, 96], 144)
    assert other["flops"]["dense"] > 3 * description["flops"]["dense"]


def test_a_processor_that_changes_the_image_size_is_reported(patchlife, tmp_path, photos):
    saved(tmp_path / "vit", classifier(), processor(size={"height": 64, "width": 64}))
    note = (
        "photos are resized to 64 x 64 pixels, as the model's image processor does; its position embeddings, made for"
    )
    assert f"limit: {note} 48 x 48" in patchlife("info", tmp_path / "vit", *SLIM[:4]).out
    result = patchlife("predict", tmp_path / "vit", photos[0], *SLIM)
    assert note in result.err
    assert result.records[0]["kept"][0] == 64
    assert note not in patchlife("predict", tmp_path / "vit", photos[0], *SLIM, "--image-size", 64).err


def test_an_adapter_is_fitted_and_evaluated(patchlife, folder, data, tmp_path):
    adapter, quick = tmp_path / "adapter", ["--epochs", 1, "--batch-size", 2]
    result = patchlife("fit", folder, data, "--out", adapter, *SLIM, *quick)
    assert result.code == 0, result.err
    result = patchlife("predict", adapter, data, "--labelled", "--device", "cpu")
    assert result.code == 0, result.err
    assert "top-1" in result.err
    for model in (adapter, folder):
        for dtype in ("float32", "bfloat16"):
            out = tmp_path / f"{model.name}-{dtype}.json"
            command = ["eval", model, data, "--budgets", "1.0,0.7", "--device", "cpu", "--dtype", dtype, "--out", out]
            result = patchlife(*command)
            assert result.code == 0, result.err
            content = json.loads(out.read_text())
            assert (content["scores"][0]["agreement"], content["conditions"]["dtype"]) == (1.0, dtype)


def test_a_name_of_the_hub_without_network(patchlife, photos, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    result = patchlife("predict", "hf:some-org/some-vit", photos[0])
    assert (result.code, result.out) == (2, "")
    assert "hf:some-org/some-vit could not be loaded: no route to host; check the network. Without network: copy" in (
        result.err
    )


def test_embeddings_of_an_image_tower_of_open_clip(patchlife, photos, data, tmp_path):
    register_open_clip(tmp_path / "configs", trunk="test_vit")
    whole = lively(open_clip.create_model(ARCH))
    open_clip_weights(tmp_path / "weights.safetensors", whole)
    name, out = f"open_clip:{ARCH}/{tmp_path / 'weights.safetensors'}", tmp_path / "out.npy"
    result = patchlife("embed", name, *photos, "--budget", 1, "--device", "cpu", "--out", out)
    assert result.code == 0, result.err
    import numpy as np

    transform = open_clip.image_transform(160, is_train=False)
    with torch.no_grad():
        expected = whole.encode_image(torch.stack([transform(Image.open(path)) for path in photos]))
    np.testing.assert_allclose(np.load(out), expected, atol=1e-4)
    assert "has no classifier" in patchlife("predict", name, photos[0]).err
    result = patchlife("eval", name, data, "--budgets", 0.8, "--neighbours", 1, "--device", "cpu")
    assert result.code == 0, result.err
    assert "cosine to the dense embedding" in result.out


# ---- number formats


def test_the_dense_model_of_an_adapter_is_rounded_once(patchlife, model, tmp_path, monkeypatch):
    """The weight delta is subtracted in float32: in bfloat16 it would leave a trace in the weights."""
    from patchlife.cli import eval as verb
    from patchlife.cli.main import _parse

    data = tmp_path / "numbered"
    for name in ("0", "1"):
        write_photos(data / name, 4)
    quick = ["--epochs", 1, "--batch-size", 2, "--finetune", "adapter", "--finetune-epochs", 1, "--rank", 2]
    assert patchlife("fit", *model, data, "--out", tmp_path / "adapter", *quick, *SLIM[:2], "--device", "cpu").code == 0
    low = ["--device", "cpu", "--dtype", "bfloat16"]
    _, config = _parse(["eval", str(tmp_path / "adapter"), str(data), *low])
    dense = verb._open_model(config, []).dense.__self__.model
    reference = load_file(model[-1])
    for name, tensor in dense.state_dict().items():
        differing = (tensor != reference[name].bfloat16()).float().mean()
        assert differing < 1e-3, name  # a sum that was rounded in float32 may round to the neighbour


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_predictions_in_another_number_format(patchlife, folder, model, photos, dtype, mode):
    for name in ([folder], model):
        command = ["predict", *name, *photos, "--device", "cpu", "--budget", 0.7, "--mode", mode, "--top", 1]
        reference, result = patchlife(*command), patchlife(*command, "--dtype", dtype)
        assert result.code == 0, result.err
        for record, expected in zip(result.records, reference.records, strict=True):
            got, wanted = record["top"][0], expected["top"][0]
            assert got["class"] == wanted["class"] or abs(got["probability"] - wanted["probability"]) < CLOSE
            assert record["run"] != expected["run"]
        assert result.out != reference.out


def test_a_run_in_another_number_format_is_not_continued(patchlife, model, photos, tmp_path):
    for verb, out in (("predict", tmp_path / "a.jsonl"), ("embed", tmp_path / "b.npy")):
        command = [verb, *model, *photos, "--device", "cpu", "--out", out]
        assert patchlife(*command).code == 0
        result = patchlife(*command, "--resume", "--dtype", "bfloat16")
        assert (result.code, "another model or other settings" in result.err) == (2, True), result.err


def test_other_verbs_in_bfloat16(patchlife, model, folder, photos, data, tmp_path):
    low = ["--device", "cpu", "--dtype", "bfloat16"]
    result = patchlife("embed", *model, *photos, *low, "--out", tmp_path / "out.npy")
    assert result.code == 0, result.err
    result = patchlife("draw", folder, *photos[:2], *low, "--start", 2, "--out", tmp_path / "pictures")
    assert result.code == 0, result.err
    numbered = tmp_path / "numbered"
    for name in ("0", "1"):
        write_photos(numbered / name, 2)
    result = patchlife("eval", *model, numbered, *low, "--budgets", "1.0,0.7", "--modes", "fixed,adaptive")
    assert result.code == 0, result.err
    # budget 1 is the dense model itself
    assert [line.split()[-2:] for line in result.out.splitlines() if " 1.00 " in line] == [["100.0", "0.000"]] * 2
    quick = ["--batch-sizes", "1", "--flops", "0.7", "--rounds", "5", "--methods", "ours-fixed"]
    result = patchlife("bench", *model, *quick, *low, "--out", tmp_path / "bench")
    assert result.code == 0, result.err
    (path,) = (tmp_path / "bench").glob("*.json")
    assert json.loads(path.read_text())["conditions"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["predict", "x", "p", "--engine", "onnx"], "--engine onnx runs in float32, got --dtype bfloat16; remove one"),
        (["eval", "x", "p", "--engine", "compile"], "--engine compile runs in float32, got --dtype bfloat16"),
        (["demo"], "demo runs in float32, got --dtype bfloat16; remove --dtype"),
        (["export", "x"], "unrecognized arguments: --dtype bfloat16"),
        (["fit", "x", "p"], "unrecognized arguments: --dtype bfloat16"),
    ],
)
def test_verbs_that_run_in_float32_only(patchlife, command, message):
    result = patchlife(*command, "--dtype", "bfloat16")
    assert (result.code, message in result.err) == (2, True), result.err


def test_an_exported_file_runs_in_its_own_number_format(patchlife, tmp_path, photos):
    (tmp_path / "file.onnx").write_bytes(b"onnx")
    result = patchlife("predict", tmp_path / "file.onnx", photos[0], "--dtype", "bfloat16")
    assert (result.code, "runs in its own number format; remove --dtype bfloat16" in result.err) == (2, True), (
        result.err
    )


def test_a_headless_model_of_transformers_has_embeddings(patchlife, tmp_path, photos):
    import numpy as np

    model = lively(transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)))
    folder = saved(tmp_path / "dino", model, processor("Bit"))
    command = ["embed", f"hf:{folder}", *photos, "--device", "cpu", "--budget", 1, "--start", 2]
    result = patchlife(*command, "--out", tmp_path / "out.npy")
    assert result.code == 0, result.err
    of_photos = transformers.BitImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        images = [of_photos(Image.open(path), return_tensors="pt")["pixel_values"] for path in photos]
        expected = model(torch.cat(images)).pooler_output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)
    command = ["eval", folder, photos[0].parent, "--device", "cpu", "--budgets", "1.0,0.7", "--dtype", "bfloat16"]
    result = patchlife(*command, "--out", tmp_path / "scores.json")
    assert result.code == 0, result.err
    first, second = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert first["cosine"] == pytest.approx(1, abs=1e-3)
    assert 0.5 < second["cosine"] < 1
