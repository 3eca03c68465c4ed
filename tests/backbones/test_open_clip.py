"""The contracts of slimming on open_clip's VisionTransformer: identity, exactness, counting, independence of images."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from open_clip_models import (
    BUDGET,
    MODELS,
    SMALL,
    START,
    VARIANTS,
    VisionTransformer,
    assert_close,
    built,
    far_apart,
    fresh,
    open_clip,
    outputs_of,
    photos,
    slim,
    slow,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from patchlife import LifeConfig, flops, wrap
from patchlife.errors import ConfigError, UnsupportedModelError
from patchlife.slimming.regressor import LifeRegressor


@pytest.mark.contract("identity", library="open_clip")
@pytest.mark.parametrize("name", MODELS)
def test_budget_one_equals_the_model(name: str) -> None:
    vit, images = built(name), photos(name)
    assert far_apart(vit(images), vit(images.roll(8, dims=-1))), "the model must depend on positions"
    model = slim(name, budget=1.0)
    assert isinstance(model, VisionTransformer)
    assert_close(model(images), vit(images))
    assert_close(model.forward_intermediates(images), vit.forward_intermediates(images))
    pooled = vit(images)[0] if vit.output_tokens else vit(images)
    assert_close(model.output(images), pooled)
    assert_close(model.predict(images)[0], pooled)
    assert_close(model.backbone.output(images), pooled)


@pytest.mark.contract("{variant}", library="open_clip")
@pytest.mark.contract("features", library="open_clip")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_runs_equal_the_slow_reference(name: str, variant: str) -> None:
    vit, images, model = built(name), photos(name), slim(name, variant, drops=(2, 4))
    lives = model.lives(images)
    assert (lives.kept[:, -1] < lives.kept[:, 0]).all()
    assert "fixed" in variant or (lives.kept != lives.kept[:1]).any()
    states = slow(vit, images, lives, model.settings.merge)
    expected = outputs_of(vit, states[-1])
    assert far_apart(vit(images), expected)
    assert_close(model(images), expected)
    pooled = expected[0] if vit.output_tokens else expected
    output, found = model.predict(images)
    assert_close(output, pooled)
    assert torch.equal(found.life, lives.life)
    features = model.forward_intermediates(images, indices=[1, -2, 4], output_fmt="NLC", output_extra_tokens=True)
    assert features.keys() == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert_close(features["image_intermediates"], [states[i][:, 1:] for i in (1, 3, 4)])
    assert_close(features["image_intermediates_prefix"], [states[i][:, :1] for i in (1, 3, 4)])
    assert_close(features["image_features"], pooled)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["plain", "attentional pool", "custom, scales"])
def test_in_float64_the_difference_is_rounding(name: str, variant: str) -> None:
    vit, images = fresh(name).double(), photos(name).double()
    model = slim(name, variant, vit, drops=(2, 4))
    states = slow(vit, images, model.lives(images), model.settings.merge)
    assert_close(model(images), outputs_of(vit, states[-1]), 1e-11)


@pytest.mark.parametrize("arguments", [{"indices": 2}, {"indices": [0, 3], "stop_early": True}, {"output_fmt": "NLC"}])
def test_intermediates_have_the_librarys_arguments_and_shapes(arguments: dict[str, Any]) -> None:
    vit, images, model = built("plain"), photos("plain"), slim("plain")
    expected = vit.forward_intermediates(images, normalize_intermediates=True, **arguments)
    actual = model.forward_intermediates(images, normalize_intermediates=True, **arguments)
    assert actual.keys() == expected.keys()
    assert [x.shape for x in actual["image_intermediates"]] == [x.shape for x in expected["image_intermediates"]]
    assert far_apart(actual, expected)
    first = model.forward_intermediates(images, [1], intermediates_only=True)
    assert_close(first, vit.forward_intermediates(images, [1], intermediates_only=True))  # before the start block


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("how", ["target", "residual"])
def test_the_librarys_intermediates_are_those_of_the_slimmed_run(how: str, variant: str) -> None:
    """tests/slimming/test_restore.py compares such a run with a slow reference."""
    model, images = slim("plain", variant, drops=(2, 4), restore=how), photos("plain")
    taps = dict.fromkeys(range(2, 5), images)
    plan = model._run(images, keep_dropped=True, taps=taps)[1]
    expected = [plan.in_grid_order(taps[block], 1)[:, 1:] for block in (2, 3, 4)]
    features = model.forward_intermediates(images, [2, 3, 4], output_fmt="NLC")["image_intermediates"]
    assert_close(features, expected)
    with model.temporarily(restore="last"):
        last = model.forward_intermediates(images, [2, 3, 4], output_fmt="NLC")["image_intermediates"]
    assert all(far_apart(a, b) for a, b in zip(features, last, strict=True))


def test_features_by_timms_names() -> None:
    images, model = photos("plain"), slim("plain")
    (features,) = model.get_intermediate_layers(images, [3], reshape=True)
    assert_close(features, model.forward_intermediates(images, [3])["image_intermediates"][0])
    last = model.forward_intermediates(images, 1, normalize_intermediates=True, output_fmt="NLC")
    assert_close(model.forward_features(images)[:, 1:], last["image_intermediates"][0])


# ---- counting


def measured(run: Any, images: Tensor) -> int:
    """torch's count with gradients: without them nn.MultiheadAttention is one operation that torch does not count."""

    def fused_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_on_cpu}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run(images)
    return counter.get_total_flops()


@pytest.mark.contract("flops", library="open_clip")
@pytest.mark.parametrize("variant", ["fixed", "fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", MODELS)
def test_stated_flops_equal_torchs_count(name: str, variant: str) -> None:
    images, model = photos(name, 2), slim(name, variant, drops=(2, 4))
    stated = flops(model)
    assert stated.dense == pytest.approx(measured(built(name), images[:1]), rel=0.005)
    assert sum(model.flops_of(model.lives(images))) == pytest.approx(measured(model, images), rel=0.005)
    assert stated.slimmed < 0.9 * stated.dense


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.5])
@pytest.mark.parametrize("arguments", [{}, {"attentional_pool": True}])
def test_the_budget_is_met_at_full_size(budget: float, arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(224, 16, 768, 12, 12, 4.0, **arguments)
    assert 0.97 * budget <= flops(wrap(vit, LifeConfig(budget=budget))).budget <= budget


# ---- images do not depend on each other


@pytest.mark.contract("batch", library="open_clip")
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", MODELS)
def test_an_image_alone_equals_the_image_in_a_batch(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name, 4)
    output, lives = model.predict(images)
    alone, lives_alone = model.predict(images[2:3])
    assert torch.equal(lives_alone.life[0], lives.life[2])
    assert_close(alone[0], output[2])


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_ties_and_nan(variant: str) -> None:
    """Of patches with equal scores the first ones are kept; an image of NaN does not change the others."""
    vit = fresh("plain")
    vit.positional_embedding.zero_()
    model = slim("plain", variant, vit)
    life = model.set_mode("fixed").lives(torch.ones(1, 3, 48, 48)).life[0]
    assert life.tolist() == sorted(life.tolist(), reverse=True)
    model = slim("plain", variant)
    images = photos("plain")
    broken = images.clone()
    broken[1] = torch.nan
    assert_close(model(broken)[[0, 2]], model(images)[[0, 2]])
    assert model(broken)[1].isnan().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 48, 48), r"images must be \(batch, channels, height, width\), got shape \(3, 48, 48\)"),
        ((2, 3, 64, 48), "takes images of 48 x 48 pixels, got 64 x 48; resize them"),
        ((2, 1, 48, 48), r"takes images of 3 channel\(s\), got 1"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slim("plain")(torch.zeros(shape))


# ---- training mode


def step(model: Any, vit: Any, images: Tensor) -> tuple[Any, dict[str, Tensor | None]]:
    """(output, gradients of ``vit``) from one seed."""
    vit.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.enable_grad():
        output = model(images)
        output = output[0] if isinstance(output, tuple) else output
        (output * torch.linspace(-1, 1, output.shape[-1])).square().mean().backward()
    return output.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in vit.named_parameters()}


@pytest.mark.contract("training", library="open_clip")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_at_budget_one_equals_a_step_of_the_model(name: str, checkpointing: bool, trained: bool) -> None:
    """With a trained scorer, open_clip's forward runs with other modules in the places of its blocks."""
    if checkpointing and name.startswith("custom"):
        pytest.skip("open_clip cannot checkpoint these blocks: it calls them with too many arguments")
    vit, images = fresh(name).train(), photos(name)
    if name == "patch dropout":
        assert far_apart(vit(images), vit(images))
    scorer = LifeRegressor(48, 1) if trained else None
    model = wrap(vit, LifeConfig(budget=1.0, start=START), scorer)
    model.set_grad_checkpointing(checkpointing)
    assert vit.transformer.grad_checkpointing == checkpointing
    (output, gradients), (expected, dense) = step(model, vit, images), step(vit, vit, images)
    assert_close(output, expected)
    for name, gradient in dense.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close(gradients[name], gradient)
    if scorer is not None:
        assert all(p.grad is not None for p in scorer.parameters())


def test_a_step_below_budget_one() -> None:
    """The scorer gets gradients, checkpointing changes nothing, and the schedule applies to what dropout leaves."""
    vit, images = fresh("patch dropout").train(), photos("patch dropout")
    torch.manual_seed(0)
    scorer = LifeRegressor(48, 1)
    model = wrap(vit, LifeConfig(budget=BUDGET, start=START), scorer)
    entering: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: entering.append(args[0].shape[1] - 1))
        for block in vit.transformer.resblocks
    ]
    output, gradients = step(model, vit, images)
    assert entering[0] == 18
    assert entering == [n * 18 // 36 for n in model.schedule().kept]
    assert all(p.grad.abs().sum() > 0 for n, p in scorer.named_parameters() if n != "importance.bias")
    for handle in handles:
        handle.remove()
    model.set_grad_checkpointing()
    again, checkpointed = step(model, vit, images)
    assert_close(again, output)
    assert all(torch.allclose(g, checkpointed[n], atol=1e-6) for n, g in gradients.items() if g is not None)


def test_settings_of_the_model_are_settings_of_the_slimmed_model() -> None:
    vit, images = fresh("plain"), photos("plain")
    model = slim("plain", vit=vit)
    pooled = model(images)
    model.output_tokens = True
    assert vit.output_tokens
    both = model(images)
    assert torch.equal(both[0], pooled)
    assert both[1].shape == vit(images)[1].shape == (3, 36, 48)
    with pytest.raises(UnsupportedModelError, match="has no classifier"):
        model.reset_classifier(5)


# ---- precision, copies, compilation


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_open_clip_in_half_precision(dtype: torch.dtype, variant: str) -> None:
    """open_clip keeps norms and positions in float32 and casts the rest."""
    from open_clip.model import convert_weights_to_lp

    vit = VisionTransformer(**SMALL, norm_layer=open_clip.transformer.LayerNormFp32).eval()
    vit.load_state_dict(built("plain").state_dict())
    convert_weights_to_lp(vit, dtype)
    assert {p.dtype for p in vit.parameters()} == {dtype, torch.float32}
    images = photos("plain").to(dtype)
    assert_close(wrap(vit, LifeConfig(budget=1.0))(images), vit(images))
    config = LifeConfig(budget=BUDGET, start=START, drops=(2, 4), **VARIANTS[variant])
    model = wrap(vit, config).calibrate([photos("plain", 8, seed=1).to(dtype)])
    output = model(images)
    assert output.dtype == dtype
    assert_close(output, outputs_of(vit, slow(vit, images, model.lives(images), merge=True)[-1]), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert slim("plain", variant)(photos("plain")).isfinite().all()


def test_copies_and_pickles_are_of_the_same_class() -> None:
    model, images = slim("tokens too"), photos("tokens too")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, VisionTransformer)
        assert other.settings == model.settings
        assert_close(other(images), model(images))
        assert_close(other.forward_intermediates(images, 2), model.forward_intermediates(images, 2))


@pytest.mark.contract("half", library="open_clip")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["fixed", "adaptive"])  # rounding changes which patches are the most similar
@pytest.mark.parametrize("name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "plain")])
def test_all_weights_in_half_precision(name: str, variant: str, dtype: torch.dtype) -> None:
    vit, images = fresh(name).to(dtype), photos(name).to(dtype)
    model = slim(name, variant, vit, drops=(2, 4))
    output, lives = model.predict(images)
    assert output.dtype == dtype
    expected = outputs_of(vit, slow(vit, images, lives, merge=False)[-1])
    assert_close(output, expected[0] if vit.output_tokens else expected, 0.05)


@pytest.mark.slow
@pytest.mark.contract("compile", library="open_clip")
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_gives_the_same(name: str) -> None:
    model, images = slim(name, "fixed, merge"), photos(name)
    expected = model(images)
    assert_close(torch.compile(model, backend="eager")(images), expected)
    graph = torch.compile(model.output, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(graph(images), model.output(images))
    torch.compiler.reset()
