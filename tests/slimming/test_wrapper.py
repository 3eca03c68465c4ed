"""Other code handles a wrapped model as the backbone: timm's helpers, checkpoints, wrappers of other libraries."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, FEW, fresh, photos
from reference import assert_close, masked
from slim_models import VARIANTS, far_apart, slim
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor

SHARED = (
    "num_classes",
    "num_features",
    "head_hidden_size",
    "embed_dim",
    "num_prefix_tokens",
    "feature_info",
    "pretrained_cfg",
    "default_cfg",
    "global_pool",
    "patch_embed",
    "blocks",
    "norm",
    "head",
)


def with_scorer(name: str, **settings: Any) -> SlimModel:
    """A family's small model with an untrained life regressor."""
    vit = fresh(name)
    torch.manual_seed(0)
    scorer = LifeRegressor(vit.embed_dim, vit.num_prefix_tokens)
    return wrap(vit, LifeConfig(**{"budget": 0.65, "start": 2, **settings}), scorer)


# ---- attributes and helpers


@pytest.mark.parametrize("name", FEW)
def test_attributes_are_those_of_the_backbone(name: str) -> None:
    model = slim(name)
    for attribute in SHARED:
        assert getattr(model, attribute) is getattr(model.wrapped, attribute)
    assert set(dir(model.wrapped)) <= set(dir(model))
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_attributes_that_the_backbone_lacks_are_not_invented() -> None:
    model = wrap(timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3))
    assert not hasattr(model, "pretrained_cfg")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch16_dinov3"])
def test_the_data_config_is_that_of_the_backbone(name: str) -> None:
    vit = timm.create_model(name, depth=4, embed_dim=48, num_heads=3)
    assert resolve_model_data_config(wrap(vit)) == resolve_model_data_config(vit)


@pytest.mark.parametrize("options", [{"weight_decay": 0.05}, {"weight_decay": 0.05, "layer_decay": 0.7}])
@pytest.mark.parametrize("name", FEW)
def test_optimizer_groups_are_those_of_the_backbone(name: str, options: dict[str, float]) -> None:
    def groups(model: nn.Module) -> list[tuple]:
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, **options)
        names = {id(p): n for n, p in model.named_parameters()}
        return [
            ([names[id(p)] for p in g["params"]], g["weight_decay"], g.get("lr_scale")) for g in optimizer.param_groups
        ]

    model = slim(name, vit=fresh(name))
    assert groups(model) == groups(model.wrapped)


@pytest.mark.parametrize("name", FEW)
def test_parameter_and_module_names_are_those_of_the_backbone(name: str) -> None:
    model = with_scorer(name)
    names = [n for n, _ in model.named_parameters() if not n.startswith("scorer.")]
    assert names == [n for n, _ in model.wrapped.named_parameters()]
    assert dict(model.named_modules())[""] is model
    assert dict(model.named_modules())["blocks.1"] is model.wrapped.blocks[1]
    assert {n for n, _ in model.named_parameters()} - set(names) == {
        f"scorer.{n}" for n, _ in model.scorer.named_parameters()
    }
    outer = nn.ModuleDict({"tower": model})
    assert {n for n, _ in outer.named_parameters()} == {f"tower.{n}" for n, _ in model.named_parameters()}


def test_freezing_by_name_trains_the_classifier_only() -> None:
    model = slim("vit", "fixed, merge", fresh("vit").train())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    with torch.enable_grad():
        model(photos("vit")).square().sum().backward()
    assert [n for n, p in model.wrapped.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_a_layer_replaced_in_model_or_backbone_is_replaced_in_both() -> None:
    model, images = slim("vit", "fixed, merge", fresh("vit")), photos("vit")
    model.head = nn.Linear(48, 7)
    assert model.wrapped.head is model.head
    assert model(images).shape == (3, 7)
    model.wrapped.norm = nn.Identity()
    assert isinstance(model.norm, nn.Identity)
    model.wrapped.reset_classifier(4, "avg")
    assert model.num_classes == 4
    assert_close(model(images), wrap(model.wrapped, model.settings)(images))
    assert_close(model(images), model.forward_head(model.forward_features(images)))
    model.reset_classifier(5, "token")
    assert model(images).shape == (3, 5)
    assert model.get_classifier() is model.wrapped.head


def test_pre_logits() -> None:
    model, images = slim("vit", "fixed, merge"), photos("vit")
    features = model.forward_features(images)
    assert torch.equal(
        model.forward_head(features, pre_logits=True), model.wrapped.forward_head(features, pre_logits=True)
    )


def test_attributes_of_the_backbone_are_set_on_the_backbone() -> None:
    model = slim("vit", vit=fresh("vit"))
    model.set_grad_checkpointing(True)
    assert model.wrapped.grad_checkpointing
    model.grad_checkpointing = False
    assert not model.wrapped.grad_checkpointing
    assert "grad_checkpointing" not in vars(model)
    model.remark = "mine"
    assert not hasattr(model.wrapped, "remark")


def test_another_input_size() -> None:
    model = slim("vit", "fixed, merge", fresh("vit"))
    model.set_input_size((64, 64))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert model.schedule().kept[0] == 64
    explicit = slim("vit", vit=fresh("vit"), kept=(36, 36, 20, 20, 20))
    with pytest.raises(ConfigError, match="explicit schedule for 36 patches; call set_budget"):
        explicit.set_input_size((64, 64))


def test_train_and_eval_apply_to_model_and_backbone() -> None:
    model = slim("vit", vit=fresh("vit"))
    for training in (True, False):
        model.train(training)
        assert {m.training for m in (*model.modules(), *model.wrapped.modules())} == {training}


def test_unwrap_returns_the_unchanged_backbone() -> None:
    vit, images = fresh("vit"), photos("vit")
    expected = vit(images)
    unwrapped = slim("vit", "fixed, merge", vit).unwrap()
    assert unwrapped is vit
    assert torch.equal(unwrapped(images), expected)


def test_copies_pickles_casts_and_functional_calls_of_a_wrapped_model() -> None:
    model, images = slim("vit", "adaptive, merge", fresh("vit")), photos("vit")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images), model(images))
        copied.head.weight.zero_()
        assert copied.wrapped.head.weight.abs().sum() == 0
    assert model.wrapped.head.weight.abs().sum() > 0
    double = copy.deepcopy(model).double()
    assert double.wrapped.pos_embed.dtype == torch.float64
    assert_close(double(images.double()).float(), model(images))
    assert_close(
        torch.func.functional_call(model, {n: p + 0 for n, p in model.named_parameters()}, (images,)), model(images)
    )
    assert far_apart(torch.func.functional_call(model, {"pos_embed": model.pos_embed * 0}, (images,)), model(images))


def test_a_new_scorer_removes_the_thresholds_of_the_old_one() -> None:
    model = slim("vit", "adaptive", fresh("vit"))
    model.scorer = LifeRegressor(48, 1)
    assert model.calibration is None
    assert not model.scorer.training
    with pytest.raises(ConfigError, match="no thresholds"):
        model(photos("vit"))


# ---- state dicts


def saved(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, saved to a file and loaded with ``weights_only``."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", FEW)
def test_a_state_dict_restores_weights_settings_and_calibration(name: str) -> None:
    images, model = photos(name), with_scorer(name, mode="adaptive", budget=0.7)
    model.calibrate([photos(name, 8, seed=1)])
    state = saved(model)
    assert [k for k in state if not k.startswith(("scorer.", "_extra"))] == list(model.wrapped.state_dict())
    assert all(isinstance(value, Tensor) for value in state.values())
    other = wrap(
        fresh(name).float(), LifeConfig(budget=0.9, start=2), LifeRegressor(model.embed_dim, model.num_prefix_tokens)
    )
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.settings == model.settings
    assert torch.equal(other(images), model(images))


def test_a_checkpoint_of_the_backbone_can_be_loaded() -> None:
    model, images = with_scorer("vit", budget=1.0), photos("vit")
    other = fresh("vit")
    other.blocks[2].mlp.fc1.weight.add_(0.1)
    before = {k: v.clone() for k, v in model.scorer.state_dict().items()}
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(model(images), other(images))
    assert all(torch.equal(v, before[k]) for k, v in model.scorer.state_dict().items())
    nested = nn.ModuleDict({"tower": model})
    nested.load_state_dict({f"tower.{k}": v for k, v in fresh("vit").state_dict().items()})
    assert torch.equal(model(images), fresh("vit")(images))


def test_missing_and_unexpected_keys_are_named() -> None:
    model, state = with_scorer("vit"), with_scorer("vit").state_dict()
    del state["norm.weight"], state["scorer.patch.bias"]
    keys = model.load_state_dict({**state, "blocks.9.norm1.weight": torch.zeros(1)}, strict=False)
    assert sorted(keys.missing_keys) == ["norm.weight", "scorer.patch.bias"]
    assert keys.unexpected_keys == ["blocks.9.norm1.weight"]
    with pytest.raises(RuntimeError, match="patch"):
        model.load_state_dict({**with_scorer("vit").state_dict(), "scorer.patch.bias": torch.zeros(3)})


def test_timms_moving_averages_of_weights() -> None:
    model, images = slim("vit", "adaptive", fresh("vit")), photos("vit")
    for kind in (ModelEmaV2, ModelEmaV3):
        average = kind(model)
        average.update(model)
        assert_close(average.module(images), model(images))


# ---- features


@pytest.mark.contract("features")
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (name, variant)
        for name in FAMILIES
        for variant in VARIANTS
        if name in FEW or variant in ("fixed", "adaptive, merge")
    ],
)
def test_intermediates_equal_those_of_the_reference(name: str, variant: str) -> None:
    """After all blocks, in grid order: a hook on each block of timm's own masked run gives the same tokens."""
    images = photos(name)
    model = slim(name, variant, fresh(name), drops=(2, 4))
    plan, tokens, handles = model.plan(images), {}, []
    final, intermediates = model.forward_intermediates(
        images, output_fmt="NLC", return_prefix_tokens=bool(model.backbone.prefix)
    )
    for index, block in enumerate(model.wrapped.blocks):
        handles.append(block.register_forward_hook(lambda m, a, out, index=index: tokens.__setitem__(index, out)))
    features = masked(model, images, plan.lives(), plan)[1]
    for handle in handles:
        handle.remove()
    prefix = model.backbone.prefix
    intermediates = [torch.cat((pair[1], pair[0]), dim=1) if prefix else pair for pair in intermediates]
    assert len(intermediates) == 5
    for index, actual in enumerate(intermediates):
        present = torch.cat((torch.ones(len(images), prefix, dtype=torch.bool), plan.lives().present(index)), dim=1)
        assert_close(actual[present], tokens[index][present])
    assert_close(final, features)


@pytest.mark.parametrize("name", [*FEW, "dynamic", "dynamic-dinov3", "not-square"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": (1, -1)},
        {"indices": [3, 0], "norm": True, "output_fmt": "NLC"},
        {"return_prefix_tokens": True, "norm": True},
        {"intermediates_only": True, "stop_early": True, "indices": [2]},
    ],
)
def test_intermediates_at_budget_one_equal_those_of_the_backbone(name: str, options: dict[str, Any]) -> None:
    model, images = slim(name, budget=1.0), photos(name)
    if not model.backbone.prefix:
        options = {key: value for key, value in options.items() if key != "return_prefix_tokens"}
    actual = tree_leaves(model.forward_intermediates(images, **options))
    expected = tree_leaves(model.wrapped.forward_intermediates(images, **options))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_intermediate_equals_the_features(variant: str) -> None:
    model, images = slim("dinov2-registers", variant), photos("dinov2-registers")
    final, ((patches, prefix),) = model.forward_intermediates(images, [-1], True, True, output_fmt="NLC")
    assert_close(torch.cat((prefix, patches), 1), final)
    assert_close(final, model.forward_features(images))
    (grid,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    assert_close(grid.flatten(2).transpose(1, 2), patches)
    (layer,) = model.get_intermediate_layers(images, 1, norm=True)
    assert_close(layer, patches)
    (layer,) = model.get_intermediate_layers(images, [4], reshape=True, norm=True)
    assert_close(layer, grid)


def test_intermediates_as_a_dict() -> None:
    model, images = slim("vit", budget=1.0), photos("vit")
    actual = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    expected = model.wrapped.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert actual.keys() == expected.keys()
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("indices", [0, 6, [5], [-6]])
def test_invalid_blocks_or_formats_are_refused(indices: Any) -> None:
    with pytest.raises(ConfigError, match=f"indices .* got {re.escape(str(indices))}"):
        slim("vit").forward_intermediates(photos("vit"), indices)
    with pytest.raises(ConfigError, match=r"output_fmt .* got 'NHWC'"):
        slim("vit").forward_intermediates(photos("vit"), output_fmt="NHWC")


def test_timms_feature_extractor() -> None:
    getter = pytest.importorskip("timm.models._features").FeatureGetterNet
    model, images = slim("vit", "fixed, merge", fresh("vit")), photos("vit")
    features = getter(model, out_indices=(1, 3))(images)
    for a, b in zip(features, model.forward_intermediates(images, [1, 3], intermediates_only=True), strict=True):
        assert torch.equal(a, b)
    assert len(model.wrapped.blocks) == 5


# ---- inside models of other libraries


def test_inside_transformers_timm_wrapper() -> None:
    transformers = pytest.importorskip("transformers")
    arguments = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=10, model_args=arguments)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    for kind in (transformers.TimmWrapperForImageClassification, transformers.TimmWrapperModel):
        model = kind(config).eval()
        more = {"labels": labels} if kind is transformers.TimmWrapperForImageClassification else {}
        expected = model(images, output_hidden_states=True, **more)
        model.timm_model = wrap(model.timm_model, LifeConfig(budget=1.0))
        actual = model(images, output_hidden_states=True, **more)
        assert actual.keys() == expected.keys()
        for a, b in zip(tree_leaves(dict(actual)), tree_leaves(dict(expected)), strict=True):
            assert_close(a, b)
        model.timm_model.set_budget(0.7)
        slimmed = model(images, output_hidden_states=True, **more)
        assert len(slimmed.hidden_states) == len(expected.hidden_states)
        assert all(a.shape == b.shape for a, b in zip(slimmed.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # open_clip imports timm by an old path
def test_as_the_trunk_of_an_open_clip_model() -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.timm_model import TimmModel

    assert open_clip.__version__
    visual = TimmModel("vit_base_patch16_siglip_224", 32, image_size=64, pool="map", proj="none", pretrained=False)
    visual.trunk = timm.create_model(
        "vit_base_patch16_siglip_224", depth=4, embed_dim=48, num_heads=3, img_size=64, num_classes=0
    )
    visual.eval()
    images = torch.randn(2, 3, 64, 64)
    expected = visual(images)
    visual.trunk = wrap(visual.trunk, LifeConfig(budget=1.0))
    assert_close(visual(images), expected)
    visual.trunk.set_budget(0.7)
    assert visual(images).shape == expected.shape
    visual.set_grad_checkpointing(True)
    visual.lock(unlocked_groups=1)
    assert 0 < sum(p.requires_grad for p in visual.parameters()) < len(list(visual.parameters()))
