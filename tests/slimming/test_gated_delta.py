"""A gated weight delta: exactly nothing at budget 1.0, merged in place for other budgets, safe under other code."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import built, fresh, photos
from gated_deltas import GATES, WALK, delta_of, gated_model, student_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.backbones import adapt
from patchlife.backbones.gates import Ramp, channel_gates, gate_values
from patchlife.errors import AdapterError, ConfigError
from patchlife.slimming import variant

FEW = ("vit", "deit3", "dinov3", "eva02", "gap-registers", "qk-norm")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def changed(model: SlimModel, original: nn.Module) -> set[str]:
    own = dict(original.named_parameters())
    return {name for name, p in model.unwrap().named_parameters() if not torch.equal(p, own[name])}


def walk(model: SlimModel) -> None:
    for budget in WALK:
        model.set_budget(budget)


# ---- gates


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_gates_open_one_after_the_other_as_the_budget_falls(one: float, other: float) -> None:
    low, high = sorted((one, other))
    at_low, at_high = gate_values(low, GATES), gate_values(high, GATES)
    assert all(0 <= b <= a <= 1 for a, b in zip(at_low, at_high, strict=True))
    assert all(a >= b for a, b in pairwise(at_low)), "the first gate opens first"


def test_gates_along_their_ramps() -> None:
    ramps = (Ramp(0.0, 0.4, 1.0), Ramp(0.2, 0.6, 2.0))
    assert gate_values(1.0, ramps) == (0, 0)
    assert gate_values(0.9, ramps) == pytest.approx((0.25, 0))
    assert gate_values(0.6, ramps) == pytest.approx((1, 0.25))
    assert gate_values(0.3, ramps) == (1, 1)
    assert channel_gates((1.0, 2.0), 5) == [1, 1, 1, 2, 2]


# ---- identity


def test_a_backbone_whose_weights_follow_a_budget_is_not_wrapped_again() -> None:
    model = gated_model(built("vit"))
    with pytest.raises(ConfigError, match=r"set its budget to 1\.0"):
        patchlife.wrap(model.unwrap())
    again = patchlife.wrap(model.set_budget(1.0).unwrap())
    torch.testing.assert_close(again.set_budget(1.0)(photos("vit")), built("vit")(photos("vit")), rtol=0, atol=1e-5)
    model.set_budget(0.7).use_delta(None)
    patchlife.wrap(model.unwrap())


@pytest.mark.parametrize("name", FEW)
def test_at_budget_1_weights_and_outputs_are_those_of_the_backbone(name: str) -> None:
    original, images = built(name), photos(name)
    model = gated_model(original)
    assert changed(model, original), "the delta has no effect, so this test shows nothing"
    walk(model)
    assert changed(model, original)
    model.set_budget(1.0)
    assert_same_weights(model.unwrap(), weights(original))
    torch.testing.assert_close(model(images), original(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [0.99, 0.8, 0.62])
def test_every_matrix_and_vector_from_the_start_block_on_changes_and_no_other(budget: float) -> None:
    model = gated_model(built("vit"), budget=budget)
    late = {n for n, _ in built("vit").named_parameters() if n.startswith(("blocks.2", "blocks.3", "blocks.4", "norm"))}
    assert changed(model, built("vit")) == late


def test_in_training_mode_too() -> None:
    arguments = {"proj_drop_rate": 0.3, "drop_path_rate": 0.3}
    import timm
    from families import SMALL, liven

    original = liven(timm.create_model("vit_tiny_patch16_224", **SMALL, **arguments)).train()
    model = gated_model(original).train()
    walk(model)
    outputs = []
    for called in (model.set_budget(1.0), original):
        torch.manual_seed(0)
        outputs.append(called(photos("vit")))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_an_explicit_schedule_counts_what_it_spends() -> None:
    model = gated_model(built("vit"))
    kept = model.schedule().kept
    spent = model.cost().total(kept) / model.dense_flops
    with model.temporarily(kept=kept):
        assert model.backbone.gated.values == gate_values(spent, GATES)
    with model.temporarily(kept=(kept[0],) * len(kept)):
        assert_same_weights(model.unwrap(), weights(built("vit")))
    assert model.backbone.gated.values == gate_values(0.7, GATES)


def test_the_mode_does_not_change_the_gates() -> None:
    model = gated_model(built("vit")).calibrate([photos("vit")])
    merged = weights(model.unwrap())
    assert_same_weights(model.set_mode("adaptive").unwrap(), merged)
    model.set_budget(1.0)
    assert_same_weights(model.unwrap(), weights(built("vit")))


# ---- the merged model is the trained one


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_the_merged_model_equals_the_parametrised_student(name: str, rank: int) -> None:
    original, images = built(name), photos(name)
    config = LifeConfig(budget=0.7, start=2, drops=(2, 3))
    model = patchlife.wrap(fresh(name), config).use_delta(delta_of(original, 2, rank))
    student = SlimModel(student_of(original, 2, rank), config, model.scorer).eval()
    dense = SlimModel(adapt(original), config, model.scorer)
    for budget in (1.0, 0.95, 0.8, 0.62):
        expected = student.set_budget(budget)(images)
        torch.testing.assert_close(model.set_budget(budget)(images), expected, rtol=1e-4, atol=1e-4)
        if budget < 1:
            assert (expected - dense.set_budget(budget)(images)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["vit", "eva02", "dinov3"])
def test_a_student_is_a_model_of_its_family(name: str) -> None:
    """Blocks of EVA and DINOv3 have vectors of their own, and torch gives a parametrised module another class."""
    assert adapt(student_of(built(name), 2).model).family == adapt(built(name)).family


# ---- copies, conversions, files


COPIES: dict[str, Callable[[SlimModel], SlimModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "double and back": lambda model: model.to(torch.float64).to(torch.float32),
    "empty and loaded": lambda model: _emptied(model),
}


def _emptied(model: SlimModel) -> SlimModel:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", COPIES)
def test_copies_and_conversions_keep_both_states(kind: str) -> None:
    original, images = built("vit"), photos("vit")
    model = gated_model(original)
    merged, logits = weights(model.unwrap()), model(images)
    copied = COPIES[kind](model)
    assert_same_weights(copied.unwrap(), merged)
    torch.testing.assert_close(copied(images), logits)
    walk(copied)
    assert_same_weights(copied.set_budget(1.0).unwrap(), weights(original))
    assert_same_weights(copied.set_budget(0.7).unwrap(), merged)


def test_a_copy_does_not_change_with_its_original() -> None:
    model = gated_model(built("vit"))
    copied, merged = copy.deepcopy(model), weights(model.unwrap())
    model.set_budget(1.0)
    assert_same_weights(copied.unwrap(), merged)


def test_half_precision_is_that_of_the_weights_without_the_delta() -> None:
    model = gated_model(built("vit")).half()
    assert_same_weights(model.set_budget(1.0).unwrap(), weights(fresh("vit").half()))


def test_a_conversion_of_the_wrapped_backbone_is_exact_too() -> None:
    model = gated_model(built("vit"))
    model.unwrap().to(torch.float64)
    model.set_budget(1.0)
    assert_same_weights(model.unwrap(), weights(fresh("vit").double()))


def test_a_state_dict_holds_the_weights_of_the_backbone_and_the_delta() -> None:
    model = gated_model(built("vit"))
    state = model.state_dict()
    assert [name for name, value in built("vit").state_dict().items() if not torch.equal(state[name], value)] == []
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = patchlife.wrap(fresh("vit"), LifeConfig(start=2), copy.deepcopy(model.scorer)).eval()
    other.load_state_dict(torch.load(file))
    assert other.settings.budget == 0.7
    assert other.delta.gates == GATES
    assert_same_weights(other.unwrap(), weights(model.unwrap()))
    walk(other)
    assert_same_weights(other.set_budget(1.0).unwrap(), weights(built("vit")))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_over_a_merged_delta(assign: bool) -> None:
    model = gated_model(built("vit"))
    state, merged = {k: v.clone() for k, v in model.state_dict().items()}, weights(model.unwrap())
    model.set_budget(0.62).load_state_dict(state, assign=assign)
    assert_same_weights(model.unwrap(), merged)
    assert_same_weights(model.set_budget(1.0).unwrap(), weights(built("vit")))


def test_a_state_dict_of_the_backbone_alone_ends_the_delta() -> None:
    model = gated_model(built("vit"))
    model.load_state_dict(built("vit").state_dict())
    assert model.delta is None
    assert_same_weights(model.set_budget(0.62).unwrap(), weights(built("vit")))


# ---- other code changes weights


def test_what_an_optimizer_trained_stays() -> None:
    model = gated_model(built("vit"))
    weight = model.unwrap().blocks[3].mlp.fc1.weight
    step = torch.randn_like(weight)
    weight.add_(step)
    model.set_budget(1.0)
    expected = built("vit").blocks[3].mlp.fc1.weight + step
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    own = weight.clone()
    model.set_budget(0.62).set_budget(1.0)
    assert torch.equal(weight, own)
    assert changed(model, built("vit")) == {"blocks.3.mlp.fc1.weight"}


def test_a_write_through_data_is_found_too() -> None:
    model = gated_model(built("vit"))
    model.unwrap().blocks[3].mlp.fc1.weight.data += 1
    model.set_budget(1.0)
    expected = built("vit").blocks[3].mlp.fc1.weight + 1
    torch.testing.assert_close(model.unwrap().blocks[3].mlp.fc1.weight, expected, rtol=0, atol=1e-6)


def test_lora_attached_to_the_wrapped_model_changes_nothing_at_budget_1() -> None:
    peft = pytest.importorskip("peft")
    model, images = gated_model(built("vit")), photos("vit")
    own = fresh("vit")
    for wrapped in (model.unwrap(), own):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, wrapped)
    walk(model)
    torch.testing.assert_close(model.set_budget(1.0)(images), own(images), rtol=0, atol=1e-5)
    for layer in (side.blocks[3].mlp.fc1 for side in (model.set_budget(0.7).unwrap(), own)):
        layer.merge()  # writes through .data
    torch.testing.assert_close(model.set_budget(1.0)(images), own(images), rtol=0, atol=1e-4)


def quantised(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().clone())  # as a quantiser: another parameter object


BROKEN: dict[str, Callable[[SlimModel], object]] = {
    "replaced weight": lambda model: quantised(model.unwrap().blocks[3].mlp.fc1),
    "replaced layer": lambda model: setattr(model.unwrap().blocks[3].mlp, "fc1", nn.Linear(48, 192)),
    "parametrised": lambda model: parametrize.register_parametrization(
        model.unwrap().blocks[3].mlp.fc1, "weight", nn.Identity()
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_change_of_budget_that_cannot_be_merged_is_refused_and_changes_nothing(kind: str) -> None:
    model = gated_model(built("vit"))
    BROKEN[kind](model)
    before, logits = weights(model.unwrap()), model(photos("vit"))
    for change in (lambda: model.set_budget(1.0), lambda: model.temporarily(budget=0.62).__enter__()):
        with pytest.raises(ConfigError, match=r"blocks\.3\.mlp\.fc1\.weight .*set the budget before"):
            change()
    assert model.settings.budget == 0.7
    assert_same_weights(model.unwrap(), before)
    torch.testing.assert_close(model(photos("vit")), logits)
    model.set_mode("fixed").to(torch.float64)


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_the_delta_cannot_be_separated_from_are_not_saved(kind: str, tmp_path: Path) -> None:
    model = gated_model(built("vit"))
    BROKEN[kind](model)
    for write in (model.state_dict, lambda: patchlife.save(model, tmp_path / "adapter")):
        with pytest.raises(ConfigError, match=r"blocks\.3\.mlp\.fc1\.weight .*save at budget 1\.0"):
            write()
    assert not (tmp_path / "adapter").exists()


def test_weights_replaced_at_budget_1_are_saved_without_the_delta(tmp_path: Path) -> None:
    model = gated_model(built("vit")).set_budget(1.0)
    BROKEN["replaced weight"](model)
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), fresh("vit")).eval()
    assert torch.equal(loaded(photos("vit")), model(photos("vit")))


def test_offloading_that_loses_a_merged_delta_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, images = gated_model(built("vit")), photos("vit")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="offloading loses the delta"):
        model(images)
    dense = gated_model(built("vit")).set_budget(1.0)
    accelerate.cpu_offload(dense, execution_device=torch.device("cpu"))
    torch.testing.assert_close(dense(images), built("vit")(images), rtol=0, atol=1e-5)


def test_a_refused_budget_leaves_the_weights() -> None:
    model = gated_model(built("vit"))
    merged = weights(model.unwrap())
    with pytest.raises(ConfigError, match="out of reach"):
        model.set_budget(0.05)
    assert_same_weights(model.unwrap(), merged)


def test_two_models_of_one_backbone_each_run_with_their_own_weights() -> None:
    model, images = gated_model(built("vit")), photos("vit")
    expected = model(images)
    dense = SlimModel(model.backbone, model.settings.replace(budget=1.0), model.scorer).eval()
    torch.testing.assert_close(dense(images), built("vit")(images), rtol=0, atol=1e-5)
    assert torch.equal(model(images), expected)


def test_a_variant_has_weights_of_its_own() -> None:
    model = gated_model(built("vit"))
    merged = weights(model.unwrap())
    other = variant(model, model.settings.replace(budget=1.0)).eval()
    assert_same_weights(other.unwrap(), weights(built("vit")))
    assert_same_weights(model.unwrap(), merged)


def test_the_dense_backbone_is_the_original() -> None:
    model = gated_model(built("vit"))
    merged = weights(model.unwrap())
    assert_same_weights(model.dense_backbone().model, weights(built("vit")))
    assert_same_weights(model.unwrap(), merged)


def test_a_delta_of_another_model_is_refused() -> None:
    model = patchlife.wrap(fresh("vit"), LifeConfig(start=2))
    with pytest.raises(AdapterError, match="does not fit this backbone"):
        model.use_delta(delta_of(built("eva02"), 2))
    assert model.delta is None
    assert_same_weights(model.set_budget(0.7).unwrap(), weights(built("vit")))
