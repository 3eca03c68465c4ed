"""Opening models of transformers: folders, hub names, their image processors and labels; what is refused, and why."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from saved_models import NAMES, SHAPE, TEXT, classifier, edited, lively, processor, saved

import patchlife
from patchlife.backbones import Origin, build, rebuild, transformers_files
from patchlife.config import LifeConfig, ModelConfig
from patchlife.errors import CheckpointError, ConfigError, MissingExtraError, PatchLifeError, UnsupportedModelError
from patchlife.flop_counter import counted
from patchlife.io.files import sha256_of
from patchlife.runtime.opening import open_pipeline

DENSE = {"budget": 1.0, "start": 2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a classifier; tests do not change it."""
    return saved(tmp_path_factory.mktemp("kept") / "vit-small", classifier())


@pytest.fixture
def folder(kept, tmp_path) -> Path:
    """A copy of the folder, which tests may damage."""
    return Path(shutil.copytree(kept, tmp_path / "vit-small"))


def images(size: int = 48, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---- what is opened


@pytest.mark.parametrize("name", ["{}", "hf:{}", "HF:{}"])
def test_a_folder_gives_model_labels_and_preprocessing(kept, name):
    pipeline = open_pipeline(ModelConfig(name.format(kept), life=DENSE))
    reference = transformers.AutoModelForImageClassification.from_pretrained(kept)
    assert torch.equal(pipeline.model.output(images()), reference(images()).logits)
    assert isinstance(pipeline.model, transformers.ViTForImageClassification)
    assert pipeline.name == "vit-small"
    assert pipeline.labels.names == NAMES
    assert not pipeline.multi_label
    assert pipeline.preprocess.to_dict() == {
        "size": [48, 48],
        "crop_fraction": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_offset": "floor",
    }
    expected = Origin(f"hf:{kept}", sha256=sha256_of(kept / "model.safetensors"), pretrained=True)
    assert pipeline.model.origin == expected


def test_a_relative_path(kept, monkeypatch):
    monkeypatch.chdir(kept.parent)
    for name in ("vit-small", "./vit-small", "hf:vit-small"):
        assert open_pipeline(ModelConfig(name)).model.origin.model == f"hf:{kept}"


def test_no_file_of_another_format_and_no_code_of_the_repository_is_used(kept, monkeypatch):
    given = {}
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def recorded(cls, *args, **kwargs):
        given.update(kwargs)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(recorded))
    build(str(kept))
    assert given["use_safetensors"] is True
    assert given["trust_remote_code"] is False
    assert given["attn_implementation"] == "sdpa"


@pytest.mark.parametrize(
    ("kind", "config", "built", "features"),
    [
        ("CLIPModel", "CLIPConfig", "CLIPVisionModelWithProjection", "image_embeds"),
        ("SiglipModel", "SiglipConfig", "SiglipVisionModel", "pooler_output"),
    ],
)
def test_a_model_of_images_and_text_gives_its_image_tower(kind, config, built, features, tmp_path):
    settings = {"projection_dim": 24} if kind == "CLIPModel" else {}
    text = TEXT if kind == "CLIPModel" else TEXT | {"hidden_size": 48}
    whole = lively(
        getattr(transformers, kind)(getattr(transformers, config)(vision_config=SHAPE, text_config=text, **settings))
    )
    saved(tmp_path / "both", whole, processor("CLIP"))
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "both"), life=DENSE))
    assert isinstance(pipeline.model, getattr(transformers, built))
    got = pipeline.model.output(images())
    found = whole.get_image_features(pixel_values=images())
    expected = found if isinstance(found, torch.Tensor) else found.pooler_output
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pipeline.model(images())[features], expected, rtol=0, atol=1e-6)
    assert pipeline.labels.names == ()
    assert pipeline.preprocess.crop_mode == "center"


def test_an_autoencoder_gives_its_encoder_without_masking(tmp_path):
    decoder = {f"decoder_{name}": SHAPE[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    config = transformers.ViTMAEConfig(**SHAPE, **decoder, decoder_num_hidden_layers=1)
    whole = lively(transformers.ViTMAEForPreTraining(config))
    saved(tmp_path / "mae", whole)
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "mae"), life=DENSE))
    whole.config.mask_ratio = whole.vit.config.mask_ratio = 0.0
    noise = torch.arange(36.0)[None].expand(2, -1)
    expected = whole.vit(images(), noise=noise).last_hidden_state[:, 0]
    torch.testing.assert_close(pipeline.model.output(images()), expected, rtol=0, atol=1e-6)


def test_a_model_that_was_saved_without_its_pooler(tmp_path):
    """transformers would draw the pooler at random; the embedding is the class token."""
    model = lively(transformers.ViTModel(transformers.ViTConfig(**SHAPE), add_pooling_layer=False))
    saved(tmp_path / "vit", model)
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "vit"), life=DENSE))
    expected = model(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(pipeline.model.output(images()), expected, rtol=0, atol=1e-6)


def test_a_multi_label_model(tmp_path):
    saved(tmp_path / "vit", classifier(problem_type="multi_label_classification"))
    assert open_pipeline(ModelConfig(str(tmp_path / "vit"))).multi_label


def test_names_of_classes_from_a_file(kept, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij"))
    pipeline = open_pipeline(ModelConfig(str(kept), labels=tmp_path / "labels.txt"))
    assert pipeline.labels.names == tuple("abcdefghij")


def test_classes_without_names(tmp_path):
    saved(tmp_path / "vit", classifier(id2label=None, label2id=None, num_labels=10))
    assert open_pipeline(ModelConfig(str(tmp_path / "vit"))).labels.names == tuple("0123456789")


def test_weights_in_several_files(tmp_path):
    model = classifier()
    saved(tmp_path / "vit", model, max_shard_size="40KB")
    shards = sorted((tmp_path / "vit").glob("model-*.safetensors"))
    assert len(shards) > 1
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "vit"), life=DENSE))
    assert torch.equal(pipeline.model.output(images()), model(images()).logits)
    first = pipeline.model.origin.sha256
    weights = load_file(shards[-1])
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, shards[-1], {"format": "pt"})
    assert open_pipeline(ModelConfig(str(tmp_path / "vit"))).model.origin.sha256 != first
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=f"index.json names {shards[-1].name}, which is not there; copy it"):
        build(str(tmp_path / "vit"))


def test_weights_in_half_precision_are_loaded_as_float32(tmp_path):
    model = classifier().half()
    saved(tmp_path / "vit", model)
    assert json.loads((tmp_path / "vit/config.json").read_text())["dtype"] == "float16"
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "vit")))
    assert {p.dtype for p in pipeline.model.parameters()} == {torch.float32}
    assert torch.equal(pipeline.model.classifier.weight, model.classifier.weight.float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_number_format(kept, dtype):
    pipeline = open_pipeline(ModelConfig(str(kept), life={"budget": 0.6, "start": 2}), dtype=dtype)
    assert pipeline.dtype == getattr(torch, dtype)
    logits, _ = pipeline.model.predict(images().to(pipeline.dtype))
    assert logits.dtype == pipeline.dtype
    reference = open_pipeline(ModelConfig(str(kept), life={"budget": 0.6, "start": 2}))
    expected = reference.model.predict(images())[0]
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


# ---- image sizes


def test_another_image_size(kept):
    """Schedule, FLOPs and the forward pass agree, and positions are interpolated as transformers does."""
    pipeline = open_pipeline(ModelConfig(str(kept), image_size=64, life={"budget": 0.6, "start": 2}))
    model, reference = pipeline.model, transformers.ViTForImageClassification.from_pretrained(kept)
    assert pipeline.preprocess.size == model.backbone.image_size == (64, 64)
    assert model.backbone.grid == (8, 8)
    assert model.origin.image_size == 64
    _, lives = model.predict(images(64))
    assert lives.kept[0].tolist() == list(model.schedule().kept)
    assert model.flops_of(lives) == model.flops_of(lives, (64, 64))
    executed, _ = counted(lambda x: reference(x, interpolate_pos_encoding=True).logits, images(64, 1))
    assert model.dense_flops == pytest.approx(executed, rel=0.005)
    expected = reference(images(64), interpolate_pos_encoding=True).logits
    torch.testing.assert_close(model.set_budget(1.0).output(images(64)), expected, rtol=0, atol=1e-5)
    assert torch.equal(
        rebuild(model.origin).vit.embeddings.position_embeddings, reference.vit.embeddings.position_embeddings
    )
    assert patchlife.wrap(rebuild(model.origin)).backbone.image_size == (64, 64)


def test_a_processor_with_another_size_than_the_positions(tmp_path):
    """As DINOv2 has it: positions for 518 pixels, photos of 224."""
    model = lively(transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)))
    crop = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    saved(tmp_path / "dino", model, processor("Bit", **crop))
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "dino"), life=DENSE))
    backbone = pipeline.model.backbone
    assert (pipeline.preprocess.size, backbone.image_size, backbone.trained_size) == ((64, 64), (64, 64), (48, 48))
    assert pipeline.model.schedule().kept[0] == 64
    expected = model(images(64)).pooler_output
    torch.testing.assert_close(pipeline.model.output(images(64)), expected, rtol=0, atol=1e-5)
    assert pipeline.model.origin.image_size is None
    own = open_pipeline(ModelConfig(str(tmp_path / "dino"), image_size=48))
    assert own.preprocess.size == own.model.backbone.image_size == (48, 48)
    assert own.preprocess.crop_fraction == pipeline.preprocess.crop_fraction


def test_a_size_that_cannot_be_cut_into_patches(kept, tmp_path):
    with pytest.raises(ConfigError, match=r"image_size must be a multiple of the patches' 8 x 8 pixels, got 50 x 50$"):
        open_pipeline(ModelConfig(str(kept), image_size=50))
    saved(tmp_path / "vit", classifier(), processor(size={"height": 50, "width": 48}))
    with pytest.raises(ConfigError, match=r"its image processor's size must be .*, got 50 x 48; give --image-size"):
        open_pipeline(ModelConfig(str(tmp_path / "vit")))
    assert open_pipeline(ModelConfig(str(tmp_path / "vit"), image_size=48)).preprocess.size == (48, 48)


def test_positions_that_cannot_be_interpolated(tmp_path):
    model = classifier(image_size=[48, 64])
    saved(tmp_path / "vit", model, processor(size={"height": 48, "width": 64}))
    pipeline = open_pipeline(ModelConfig(str(tmp_path / "vit"), life=DENSE))
    assert pipeline.preprocess.size == (48, 64)
    x = torch.randn(2, 3, 48, 64)
    assert torch.equal(pipeline.model.output(x), model(x).logits)
    with pytest.raises(ConfigError, match=r"image_size must be 48 x 64, because .* square tables .*, got 64 x 64"):
        open_pipeline(ModelConfig(str(tmp_path / "vit"), image_size=64))
    processor().save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"its image processor's size must be 48 x 64, because .*, got 48 x 48"):
        open_pipeline(ModelConfig(str(tmp_path / "vit")))


# ---- adapters


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    pipeline = open_pipeline(ModelConfig(str(folder), image_size=64, life={"budget": 0.7, "start": 2}))
    pipeline.model.calibrate([images(64, 8)])
    return patchlife.save(pipeline.model, tmp_path / "adapter")


def test_an_adapter_opens_its_model(adapter, folder):
    pipeline = open_pipeline(ModelConfig(str(adapter)))
    assert pipeline.model.origin.model == f"hf:{folder}"
    assert pipeline.model.settings.budget == 0.7
    assert pipeline.model.calibration is not None
    assert pipeline.preprocess.size == (64, 64)
    assert pipeline.labels.names == NAMES
    direct = open_pipeline(ModelConfig(str(folder), image_size=64, life={"budget": 0.7, "start": 2}))
    assert torch.equal(pipeline.model.output(images(64)), direct.model.output(images(64)))
    assert patchlife.load(adapter).backbone.image_size == (64, 64)


def test_an_adapter_whose_model_was_moved(adapter, folder):
    moved = folder.rename(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"the folder {folder}, which is not there; .* --checkpoint FOLDER"):
        open_pipeline(ModelConfig(str(adapter)))
    pipeline = open_pipeline(ModelConfig(str(adapter), checkpoint=moved))
    assert pipeline.model.origin.model == f"hf:{moved}"


@pytest.mark.parametrize("origin", [None, Origin("vit_tiny_patch16_224", checkpoint="/a/vit.safetensors", sha256="ab")])
def test_an_adapter_on_a_folder_with_the_same_weights(origin, folder, tmp_path):
    """An adapter that was learned on timm, or whose backbone is not known; the weights are compared, not the origin."""
    pipeline = open_pipeline(ModelConfig(str(folder), life={"budget": 0.7, "start": 2}))
    pipeline.model.origin = origin
    patchlife.save(pipeline.model, tmp_path / "adapter")
    opened = open_pipeline(ModelConfig(str(tmp_path / "adapter"), checkpoint=folder))
    assert torch.equal(opened.model.output(images()), pipeline.model.output(images()))
    assert opened.model.origin.model == f"hf:{folder}"


def test_an_adapter_whose_model_has_other_weights(adapter, folder):
    saved(folder, classifier(hidden_dropout_prob=0.1), False)
    weights = load_file(folder / "model.safetensors")
    save_file({n: t + 0.01 for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    for opened in (lambda: open_pipeline(ModelConfig(str(adapter))), lambda: patchlife.load(adapter)):
        with pytest.raises(CheckpointError, match="has other weights than the backbone of the adapter"):
            opened()


def test_an_adapter_learned_on_timm_names_no_folder(tmp_path):
    """Manifests of earlier versions have the same fields."""
    old = {
        "model": "vit_tiny_patch16_224",
        "options": {"num_classes": 5, "img_size": [96, 96]},
        "checkpoint": "/a/vit.safetensors",
        "sha256": "ab",
        "pretrained": False,
        "image_size": None,
    }
    assert Origin(**old).options == {"num_classes": 5, "img_size": (96, 96)}
    assert set(old) == set(Origin("x").to_dict())


# ---- what is refused


def test_a_checkpoint_file_or_arguments_beside_the_folder(kept):
    with pytest.raises(ConfigError, match=r"brings its weights, which --checkpoint .*\.safetensors would replace"):
        open_pipeline(ModelConfig(str(kept), checkpoint=kept / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"--model-args are arguments of timm's models; hf:.* takes none"):
        open_pipeline(ModelConfig(str(kept), model_args={"num_classes": 3}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, r"has no model.safetensors, no weights\. "),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            CheckpointError,
            r"has no model.safetensors, only pytorch_model.bin\. Pickles .* not opened, .* convert it once: AutoModel",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
            CheckpointError,
            r"the weights of hf:.* are not readable \(.*\); is the download complete",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"nonsense"),
            CheckpointError,
            "are not readable",
        ),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "got other content in config.json"),
        (lambda f: edited(f, architectures=None), CheckpointError, "does not name the class of the model"),
        (
            lambda f: edited(f, architectures=["OwnViT"], auto_map={"AutoModel": "own.OwnViT"}),
            UnsupportedModelError,
            "has no class OwnViT: the model needs code of its own repository, which is never run",
        ),
        (lambda f: edited(f, architectures=["ViTOfTomorrow"]), UnsupportedModelError, "needs another version"),
        (
            lambda f: edited(f, architectures=None, architecture="vit_tiny_patch16_224"),
            UnsupportedModelError,
            "is a model of timm, not of transformers; give local-dir:",
        ),
        (  # the class is called with the file's settings, so it must be a class of models
            lambda f: edited(f, architectures=["Trainer"]),
            UnsupportedModelError,
            "has no class Trainer",
        ),
        (  # transformers would apply it only where peft is installed
            lambda f: (f / "adapter_config.json").write_text("{}"),
            UnsupportedModelError,
            "holds an adapter of peft .*merge_and_unload",
        ),
        (
            lambda f: edited(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            UnsupportedModelError,
            "has quantised weights",
        ),
        (lambda f: (f / "preprocessor_config.json").unlink(), CheckpointError, "has no preprocessor_config.json, so"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), CheckpointError, "image processor of .* cannot"),
    ],
)
def test_a_folder_with_missing_or_damaged_files(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        open_pipeline(ModelConfig(f"hf:{folder}"))


def test_a_classifier_that_the_file_does_not_hold(folder):
    """transformers would draw it at random."""
    weights = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    expected = r"do not fit ViTForImageClassification: missing: classifier.bias, classifier.weight\. A classifier that"
    with pytest.raises(CheckpointError, match=expected):
        build(str(folder))


def test_weights_that_are_not_of_the_model(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"vit.extra.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not of this model: vit\.extra\.weight"):
        build(str(folder))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edited(folder, id2label={str(i): str(i) for i in range(4)}, label2id=None)
    with pytest.raises(CheckpointError, match=r"of another shape: classifier\S* \(10.*\) for \(4"):
        build(str(folder))


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite weights in classifier\.bias"):
        build(str(folder))


def test_models_that_are_no_supported_vision_transformer(tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(**(TEXT | {"bos_token_id": None, "eos_token_id": None})))
    beit = transformers.BeitModel(transformers.BeitConfig(**SHAPE))
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**SHAPE),
            text_config=transformers.LlamaConfig(**(TEXT | {"pad_token_id": 0}), num_key_value_heads=2),
        )
    )
    cases = {
        "bert": (bert, r"is a BertModel \(bert\), which takes no images; give a Vision Transformer"),
        "beit": (beit, "is a BeitModel .* patches of this model cannot be dropped: its relative position bias"),
        "llava": (llava, r"is a LlavaForConditionalGeneration \(llava\), a model of images and text. Its vision tower"),
    }
    for name, (model, message) in cases.items():
        saved(tmp_path / name, model)
        with pytest.raises(UnsupportedModelError, match=message):
            build(str(tmp_path / name))


def test_transformers_is_not_installed(kept, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"hf:.* needs transformers, .*: pip install 'patchlife\[transformers\]'"
    ):
        open_pipeline(ModelConfig(str(kept)))


# ---- the hub


@pytest.fixture
def hub(monkeypatch, kept):
    """A function that replaces the hub: by a folder, or by an error."""
    requested = []

    def replaced(answer: Path | Exception = kept):
        def snapshot_download(repository, revision=None, allow_patterns=None):
            requested.append((repository, revision, allow_patterns))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        transformers_files._downloaded.cache_clear()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return requested

    yield replaced
    transformers_files._downloaded.cache_clear()


def test_a_model_of_the_hub(hub):
    requested = hub()
    pipeline = open_pipeline(ModelConfig("hf:some-org/vit-small@v1.0"))
    assert [entry[:2] for entry in requested] == [("some-org/vit-small", "v1.0")]
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in requested[0][2])
    assert pipeline.model.origin == Origin("hf:some-org/vit-small@v1.0", pretrained=True)
    assert (pipeline.name, pipeline.labels.names) == ("vit-small", NAMES)


def test_an_adapter_of_the_hub(hub, adapter, folder):
    requested = hub(adapter)
    pipeline = open_pipeline(ModelConfig("hf:some-org/adapter", life={"budget": 0.8}))
    assert "adapter.json" in requested[0][2]
    assert pipeline.model.origin.model == f"hf:{folder}"
    assert pipeline.model.settings.budget == 0.8
    assert open_pipeline(ModelConfig(f"hf:{adapter}")).model.settings.budget == 0.7


def raised(kind: type[Exception]) -> Exception:
    """An error of the hub client, without the response of a server that its constructor wants."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (raised(errors.GatedRepoError), "access is restricted: accept the terms on"),
        (raised(errors.RepositoryNotFoundError), "no public model of this name; check"),
        (raised(errors.RevisionNotFoundError), "it has no revision v2"),
        (errors.LocalEntryNotFoundError("offline"), "offline; check the network. Without network: copy the"),
        (OSError("disk full"), "disk full; check the network"),
    ],
)
def test_a_model_that_the_hub_does_not_give(hub, error, message):
    hub(error)
    with pytest.raises(CheckpointError, match=rf"hf:some-org/vit@v2 could not be loaded: .*{message}"):
        open_pipeline(ModelConfig("hf:some-org/vit@v2"))


def test_a_name_that_is_no_folder_and_no_hub_name():
    with pytest.raises(CheckpointError, match="hf:/no/where: expected a folder, or ORG/NAME of the Hugging Face hub"):
        open_pipeline(ModelConfig("hf:/no/where"))
    with pytest.raises(PatchLifeError, match=r"give hf-hub:some-org/vit \(timm\) or hf:some-org/vit \(transformers\)"):
        open_pipeline(ModelConfig("some-org/vit"))


def test_a_timm_name_wins_over_a_folder_of_the_same_name(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept, "vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224 would have random weights"):
        open_pipeline(ModelConfig("vit_tiny_patch16_224"))
    assert open_pipeline(ModelConfig("./vit_tiny_patch16_224")).labels.names == NAMES


def test_settings_of_slimming_are_those_of_the_config(kept):
    pipeline = open_pipeline(ModelConfig(str(kept), life={"budget": 0.7, "start": 2, "mode": "adaptive"}))
    assert pipeline.model.settings == LifeConfig(budget=0.7, start=2, mode="adaptive")
