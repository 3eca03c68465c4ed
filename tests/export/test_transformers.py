"""Exported files of transformers' models: transformers' own outputs, embeddings too, in every format."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.config import ModelConfig
from patchlife.data import Preprocess
from patchlife.data.labels import Labels
from patchlife.errors import ConfigError, ExportError
from patchlife.export import Exported, Parity, export, export_bundle
from patchlife.export.cache import _key
from patchlife.export.exporter import COSINE, FORMATS, build_file, export_graph
from patchlife.export.images import image_size_of
from patchlife.export.on_the_fly import with_engine
from patchlife.export.parity import check_int8, check_outputs
from patchlife.runtime import Bundle, Engine, open_engine
from patchlife.runtime.exported import open_exported
from patchlife.runtime.metadata import metadata_of
from patchlife.runtime.pipeline import Pipeline
from patchlife.runtime.sessions import ModuleSession, open_session
from patchlife.runtime.tensor_module import tensor_module

transformers: Any = pytest.importorskip("transformers", reason="needs the extra patchlife[transformers]")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "image_size": 48,
    "patch_size": 8,
}
CLASSES = {"num_labels": 7, "id2label": {i: f"class {i}" for i in range(7)}}
DINOV3 = {"num_register_tokens": 4}
EAGER = {"attn_implementation": "eager"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # names of transformers_families
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", CLASSES),
    "deit-classifier": ("DeiTForImageClassification", "DeiTConfig", CLASSES),
    "deit": ("DeiTModel", "DeiTConfig", EAGER),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", CLASSES),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True} | EAGER),
    "dinov2-classifier": ("Dinov2ForImageClassification", "Dinov2Config", CLASSES),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"use_swiglu_ffn": True}),
    "registers-classifier": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        CLASSES | EAGER,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", DINOV3),
    "dinov3-gated": ("DINOv3ViTModel", "DINOv3ViTConfig", DINOV3 | {"use_gated_mlp": True} | EAGER),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "clip-projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {"projection_dim": 24, "hidden_act": "gelu"} | EAGER,
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}),
}
PREPROCESS = Preprocess(size=(48, 48), mean=(0.1, 0.2, 0.3))
FAST = [("vit-classifier", "onnx"), ("siglip", "onnx"), ("dinov3", "torch")]
SLOW = [(name, kind) for name in MODELS for kind in FORMATS if (name, kind) not in FAST]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def built(name: str, **settings: Any) -> nn.Module:
    """A small model with random weights that have an effect."""
    kind, config, own = MODELS[name]
    model = families.liven(getattr(transformers, kind)(getattr(transformers, config)(**SIZES, **own, **settings)))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("lambda1"):  # LayerScale
            parameter.copy_(0.5 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def wrapped(name: str, budget: float = 0.7, **settings: Any) -> SlimModel:
    return patchlife.wrap(built(name, **settings), LifeConfig(budget=budget, start=1, drops=(1, 2)))


def images(count: int, size: tuple[int, int] = (48, 48)) -> Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, *size, generator=draw) * torch.linspace(0.3, 1.5, count)[:, None, None, None]


def own_output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits or embedding from the model's own forward pass."""
    arguments: dict[str, Any] = {}
    if x.shape[-2:] != (48, 48) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        arguments["interpolate_pos_encoding"] = True
    if isinstance(model, transformers.ViTMAEModel):  # which shuffles patches at random
        arguments["noise"] = torch.arange(x.shape[-1] * x.shape[-2] / 64).expand(len(x), -1)
    outputs = model(x, **arguments)
    fields = ("logits", "image_embeds", "pooler_output")
    found = [outputs[field] for field in fields if outputs.get(field) is not None]
    return found[0] if found else outputs.last_hidden_state[:, 0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """From the name of a model and a format to (slimmed model, result of the export); each is exported once."""

    @cache
    def make(name: str, kind: str) -> tuple[SlimModel, Exported]:
        model = wrapped(name)
        preprocess = PREPROCESS if name == "dinov3" else None
        return model, export(model, tmp_path_factory.mktemp(name) / f"{name}.{kind}", kind, preprocess=preprocess)

    return make


def opened(result: Exported) -> Engine:
    return open_engine(result.path, threads=1, trust=True)


@pytest.mark.contract("{kind}", library="transformers")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_file_has_the_outputs_of_transformers_at_every_batch_size(exported, name, kind):
    model, result = exported(name, kind)
    engine = opened(result)
    for batch in (1, 3, 6):
        output, lives = engine.predict(images(batch))
        expected = own_output(model, images(batch))
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(lives.life, model.predict(images(batch))[1].life)
    assert lives.life.unique().numel() > 1


@pytest.mark.parametrize(
    "name", ["vit-classifier", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "vit-classifier")]
)
def test_at_budget_one_a_file_has_the_outputs_of_the_dense_model(tmp_path, name):
    dense = built(name)
    result = export(patchlife.wrap(dense, LifeConfig(budget=1.0)), tmp_path / "dense.pt2", "torch", lives=False)
    engine = opened(result)
    assert engine.metadata.outputs == (("logits",) if "lassif" in name or "teacher" in name else ("embedding",))
    for batch in (1, 4):
        output, life = engine(images(batch).numpy())
        assert life is None
        np.testing.assert_allclose(output, own_output(dense, images(batch)).numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["torch", *(pytest.param(k, marks=pytest.mark.slow) for k in ("onnx", "openvino"))])
@pytest.mark.parametrize(
    "name", ["mae", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit", "dinov2", "dinov3", "siglip", "clip"))]
)
def test_positions_are_interpolated_for_another_image_size(tmp_path, name, kind):
    model = wrapped(name)
    result = export(model, tmp_path / "file", kind, image_size=(40, 64))
    metadata = result.metadata
    assert (metadata.image_size, metadata.grid) == ((40, 64), (5, 8))
    assert metadata.kept == tuple(model.schedule((40, 64)).kept)
    x = images(3, (40, 64))
    torch.testing.assert_close(opened(result).predict(x)[0], own_output(model, x), atol=1e-4, rtol=1e-5)


def test_the_image_size_is_that_of_preprocess_and_images_which_must_agree(tmp_path):
    model = wrapped("vit")
    preprocess = Preprocess(size=(56, 56))
    assert image_size_of(model, None, preprocess, images(2, (56, 56))) == (56, 56)
    assert image_size_of(model, None, None, None) == (48, 48)
    with pytest.raises(ConfigError, match=r"got the size of preprocess 56 x 56, the size of images 40 x 40; make them"):
        export(model, tmp_path / "b.pt2", "torch", preprocess=preprocess, images=images(2, (40, 40)))
    with pytest.raises(ConfigError, match="4 x 4 pixels are smaller than a patch"):
        export(model, tmp_path / "b.pt2", "torch", image_size=(4, 4))
    vit = patchlife.wrap(families.built("vit"), LifeConfig(start=2))
    with pytest.raises(ConfigError, match="56"):
        export(vit, tmp_path / "b.pt2", "torch", image_size=(56, 56))
    assert not (tmp_path / "b.pt2").exists()


# ---- metadata


def test_metadata_of_a_classifier(exported):
    _, result = exported("vit-classifier", "onnx")
    metadata = opened(result).metadata
    assert metadata.outputs == ("logits", "life")
    assert metadata.labels == tuple(f"class {i}" for i in range(7))
    assert metadata.versions["transformers"] == transformers.__version__
    assert "timm" not in metadata.versions
    assert metadata.parity["agreement"] == 1
    assert "cosine" not in metadata.parity
    assert metadata.model == "ViTForImageClassification"


def test_metadata_of_a_model_that_embeds(exported):
    _, result = exported("siglip", "onnx")
    metadata = opened(result).metadata
    assert metadata.outputs == ("embedding", "life")
    assert metadata.labels == ()
    stored = dict(metadata.parity)
    assert stored.pop("generated") is True
    assert "agreement" not in stored
    assert stored["cosine"] == pytest.approx(1, abs=1e-6)
    assert stored["difference"] < 1e-5
    assert Parity(**stored) == result.parity
    assert "mean cosine 1.000000" in str(result.parity)


def test_a_file_knows_that_its_model_is_a_multi_label_one(tmp_path):
    model = wrapped("vit-classifier", problem_type="multi_label_classification")
    path = export(model, tmp_path / "vit.pt2", "torch", preprocess=PREPROCESS, lives=False).path
    assert open_exported(ModelConfig(str(path)), trust=True).multi_label
    other = export(wrapped("vit-classifier"), tmp_path / "o.pt2", "torch", preprocess=PREPROCESS, lives=False).path
    assert not open_exported(ModelConfig(str(other)), trust=True).multi_label


def test_classes_without_names_get_numbers():
    metadata = metadata_of(patchlife.wrap(transformers_classifier_without_names(), LifeConfig(start=1)), "onnx")
    assert metadata.labels == ("0", "1", "2", "3", "4")


def transformers_classifier_without_names() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).eval()


def test_an_embedding_file_is_opened_with_its_preprocessing(exported):
    _, without = exported("siglip", "onnx")
    with pytest.raises(ExportError, match=r"does not say how a photo becomes its input.*with preprocess="):
        open_exported(ModelConfig(str(without.path)))
    model, result = exported("dinov3", "torch")
    pipeline = open_exported(ModelConfig(str(result.path)), trust=True)
    assert pipeline.preprocess == PREPROCESS
    assert pipeline.labels.names == ()
    output, lives = pipeline.model.predict(images(2))
    torch.testing.assert_close(output, own_output(model, images(2)), atol=1e-5, rtol=1e-5)
    assert lives.grid == (6, 6)


def test_a_file_is_opened_without_transformers(exported):
    files = {exported(*case)[1].path: case for case in FAST[1:]}
    script = (
        "import sys, json, numpy as np\n"
        "sys.modules['transformers'] = sys.modules['open_clip'] = None\n"
        "from patchlife.runtime import open_engine\n"
        "x = np.load(sys.argv[1])\n"
        "print(json.dumps([open_engine(f, trust=True)(x).output.tolist() for f in sys.argv[2:]]))\n"
    )
    batch = next(iter(files)).parent / "images.npy"
    np.save(batch, images(2).numpy())
    command = [sys.executable, "-c", script, str(batch), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for output, case in zip(json.loads(run.stdout), files.values(), strict=True):
        np.testing.assert_allclose(output, own_output(exported(*case)[0], images(2)).numpy(), atol=1e-4)


# ---- parity of embeddings


class Scaled(nn.Module):
    """Adds ``shift`` to one component of the embeddings."""

    def __init__(self, module: nn.Module, shift: float) -> None:
        super().__init__()
        self.module, self.shift = module, shift

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, life = self.module(x)
        output = output.clone()
        output[:, 3] += self.shift
        return output, life


def test_a_difference_of_an_embedding_is_relative_to_its_largest_component():
    model = wrapped("dinov2")
    model.wrapped.layernorm.weight.mul_(1e-3)
    model.wrapped.layernorm.bias.mul_(1e-3)
    module = tensor_module(model)
    largest = float(model(images(3)).pooler_output.abs().max())
    assert largest < 0.01
    shift = 0.01 * largest  # below 1e-4, the largest difference of logits
    with pytest.raises(ExportError, match=r"its embeddings differ: image 0 of a batch of 1, component 3 is"):
        check_outputs(ModuleSession(Scaled(module, shift)), module, images(3), 1e-4)
    parity = check_outputs(ModuleSession(Scaled(module, 1e-6 * largest)), module, images(3), 1e-4)
    assert 1e-7 < parity.difference < 1e-5
    assert parity.agreement is None


def test_int8_embeddings_need_a_high_mean_cosine():
    module = tensor_module(wrapped("dinov2"))
    parity = check_int8(ModuleSession(Scaled(module, 0.1)), module, images(8), COSINE)
    assert COSINE < parity.cosine < 0.9999999
    with pytest.raises(
        ExportError, match=r"mean cosine of int8 and float32 embeddings of 8 images is 0\.\d+, expected"
    ):
        check_int8(ModuleSession(Scaled(module, 10)), module, images(8), COSINE)


def test_agreement_of_a_model_with_a_class_for_each_token_is_a_fraction():
    vit = families.built("unpooled")
    module = tensor_module(patchlife.wrap(vit, LifeConfig(budget=0.7, start=2)))
    assert check_outputs(ModuleSession(module), module, families.photos("unpooled", 8), 1e-4).agreement == 1


# ---- int8, bundles, engines


def _integer_layers(content: bytes) -> int:
    import onnx

    return sum(node.op_type == "MatMulIntegerToFloat" for node in onnx.load_from_string(content).graph.node)


def test_int8_rounds_every_linear_layer_of_the_blocks_and_of_the_pooling_head():
    model = wrapped("siglip", 0.75)
    module, x = tensor_module(model), images(8)
    metadata = metadata_of(model, "onnx", precision="int8-dynamic")
    graph = export_graph(module, metadata)
    for first in (0, 1):
        content = build_file(module, replace(metadata, int8_from=first), x, graph)
        # q, k, v, output and two of the MLP in each layer; in the head q, k and v together, two of its MLP
        assert _integer_layers(content) == 6 * (3 - first) + 4
        parity = check_int8(open_session("onnx", content), module, x, 0.9)
        assert parity.cosine < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["vit-classifier", "siglip", "dinov3", "clip-projection"])
def test_int8_of_openvino(name):
    pytest.importorskip("nncf", reason="int8 for OpenVINO needs nncf (extra int8)")
    model = wrapped(name, 0.75)
    module, x = tensor_module(model), images(8)
    metadata = metadata_of(model, "openvino", precision="int8-dynamic")
    content = build_file(module, metadata, x)
    assert check_int8(open_session("openvino", content), module, x, 0.5).closeness > 0.9


@pytest.mark.slow
def test_a_bundle_of_embeddings(tmp_path):
    model = wrapped("clip-projection")
    export_bundle(model, tmp_path / "bundle", (1.0, 0.7))
    bundle = Bundle(tmp_path / "bundle", threads=1)
    for budget in (1.0, 0.7):
        output, _ = bundle.engine(budget).predict(images(3))
        expected = model.set_budget(budget)(images(3)).image_embeds
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    assert bundle.graphs_metadata[0.7].outputs == ("embedding", "life")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "bundle/weights.bin").stat().st_size < 1.5 * weights


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_an_engine_of_the_cache_takes_the_image_size_of_the_preprocessing(cache_folder):
    x = images(2, (40, 56))
    for model in (wrapped("dinov3"), wrapped("dinov3")):  # the second engine is the first one's file
        pipeline = Pipeline("dinov3", model, Preprocess(size=(40, 56)), Labels(()))
        output, lives = with_engine(pipeline, "onnx", "cpu").model.predict(x)
        torch.testing.assert_close(output, own_output(model, x), atol=1e-4, rtol=1e-5)
        assert lives.grid == (5, 7)
    assert len(list(cache_folder.iterdir())) == 1


def test_a_compiled_engine_takes_the_image_size_of_the_preprocessing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, x = wrapped("dinov3"), images(2, (40, 56))
    pipeline = Pipeline("dinov3", model, Preprocess(size=(40, 56)), Labels(()))
    torch.testing.assert_close(with_engine(pipeline, "compile", "cpu").model.predict(x)[0], own_output(model, x))


def test_what_changes_the_outputs_changes_the_key_of_the_cache():
    models = [
        wrapped("vit"),
        wrapped("vit", hidden_act="relu"),
        wrapped("vit", layer_norm_eps=1e-3),
        wrapped("vit", budget=0.8),
        wrapped("dinov3"),
        wrapped("dinov3", rope_theta=50.0),
    ]
    keys = [_key(model, metadata_of(model, "onnx").to_json()) for model in models]
    assert len({*keys}) == len(models)
    again = copy.deepcopy(models[0])
    assert _key(again, metadata_of(again, "onnx").to_json()) == keys[0]
