"""A fit with ``finetune="adapter"``: its delta follows the budget, and at budget 1.0 the model is the user's own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, QUICK, small_model, some_photos

import patchlife
from patchlife.backbones.gates import channel_gates, gate_values, ramps_down_to
from patchlife.cli import info
from patchlife.config import TrainingConfig
from patchlife.errors import CheckpointError, ConfigError
from patchlife.training.fit import accelerator_for, fit, student_of, work_folder
from patchlife.training.initial_model import initial_model

STAGE2 = TrainingConfig(**{**QUICK.__dict__, "finetune": "adapter", "finetune_epochs": 2, "rank": 5})

GATES = ramps_down_to(STAGE2.lowest_budget)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[patchlife.SlimModel, Path]:
    folder = tmp_path_factory.mktemp("fit")
    photos = some_photos(folder / "photos", 24)
    return fit(small_model(), photos, PREPROCESS, folder / "out", STAGE2, accelerator_for("cpu")).model, folder / "out"


def test_the_fitted_model_is_the_backbone_at_budget_1(fitted) -> None:
    model, folder = fitted
    assert model.delta.gates == GATES
    original, images = small_model().backbone.model, torch.randn(3, 3, 48, 48)
    for one in (model, patchlife.load(folder, original)):
        with one.temporarily(budget=0.65, mode="fixed"):
            own = dict(original.named_parameters())
            changed = [n for n, p in one.unwrap().named_parameters() if not torch.equal(p, own[n])]
            assert len(changed) > 20
        with one.temporarily(budget=1.0, mode="fixed"), torch.no_grad():
            assert [n for n, p in one.unwrap().named_parameters() if not torch.equal(p, own[n])] == []
            torch.testing.assert_close(one(images), original(images), rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(fitted, tmp_path: Path) -> None:
    """Blocks run a second time in the backward pass, and need the gates of the step."""
    model = small_model()
    vit = copy.deepcopy(model.unwrap())
    vit.set_grad_checkpointing(True)
    photos = some_photos(tmp_path / "photos", 24)
    own = patchlife.wrap(vit, model.settings)
    checkpointed = fit(own, photos, PREPROCESS, tmp_path / "out", STAGE2, accelerator_for("cpu")).model
    for name, value in fitted[0].delta.tensors.items():
        torch.testing.assert_close(checkpointed.delta.tensors[name], value, rtol=1e-2, atol=1e-4)


def test_every_matrix_and_vector_of_the_late_blocks_was_trained(fitted) -> None:
    model, _ = fitted
    tensors = model.delta.tensors
    assert all(value.any() for value in tensors.values())
    trained = {key.rpartition(".")[0] for key in tensors}
    own = {n for n, _ in small_model().unwrap().named_parameters()}
    late = tuple(f"blocks.{index}." for index in range(model.start, model.backbone.depth))
    assert trained == {name for name in own if name.startswith((*late, "norm."))}


def test_the_student_has_the_gates_of_its_budget_and_gradients_only_through_open_ones() -> None:
    model = small_model()
    from patchlife.slimming.regressor import LifeRegressor

    model.scorer = LifeRegressor(model.backbone.dim, model.backbone.prefix)
    student = student_of(model, STAGE2)
    student.set_budget(0.9)
    assert student.backbone.gated.values == gate_values(0.9, GATES)
    student(torch.randn(2, 3, 48, 48)).square().sum().backward()
    up = student.unwrap().get_submodule(f"blocks.{student.start}.attn.qkv.parametrizations.weight.0").up
    first = channel_gates((1.0, 0.0), 5).count(1.0)
    assert up.grad[:, :first].any(), "channels of the first gate"
    assert not up.grad[:, first:].any(), "channels of the closed gates"


def test_a_student_begins_with_the_delta_of_an_earlier_fit(fitted, tmp_path: Path) -> None:
    """At every budget the student computes what the adapter computes, and its teacher is the user's own model."""
    earlier, images = fitted[0], torch.randn(3, 3, 48, 48)
    model, config = initial_model(earlier, TrainingConfig(finetune="adapter", epochs=0), PREPROCESS)
    assert (config.rank, config.lowest_budget) == (STAGE2.rank, STAGE2.lowest_budget)
    original = small_model().backbone.model
    assert all(map(torch.equal, model.unwrap().parameters(), original.parameters()))
    student = student_of(model, config)
    for budget in (1.0, 0.85, 0.65):
        with earlier.temporarily(budget=budget, mode="fixed"), torch.no_grad():
            expected = earlier(images)
            torch.testing.assert_close(student.set_budget(budget)(images), expected, rtol=0, atol=1e-5)
    assert (expected - original(images)).abs().max() > 1e-3


def budgets_drawn(out: Path) -> list[float]:
    """The budget of each step of stage 2."""
    lines = map(json.loads, (work_folder(out) / "metrics.jsonl").read_text().splitlines())
    drawn = [line["budget"] for line in lines if line["stage"] == "slimming-adapter" and "budget" in line]
    assert len(drawn) == 10
    return drawn


def test_a_second_fit_trains_the_delta_further(fitted, tmp_path: Path) -> None:
    earlier, photos = fitted[0], some_photos(tmp_path / "photos", 24)
    settings = replace(STAGE2, epochs=0, lowest_budget=None, rank=24)
    with earlier.temporarily(budget=0.65):  # the delta is merged: the teacher must be without it
        again = fit(earlier, photos, PREPROCESS, tmp_path / "out", settings, accelerator_for("cpu")).model
    assert again.delta.gates == earlier.delta.gates
    assert again.delta.tensors.keys() == earlier.delta.tensors.keys()
    moved = [(again.delta.tensors[name] - value).abs().max() for name, value in earlier.delta.tensors.items()]
    assert all(moved)
    assert max(moved) < 0.1
    own = dict(small_model().unwrap().named_parameters())
    with again.temporarily(budget=1.0, mode="fixed"):
        assert all(torch.equal(p, own[n]) for n, p in again.unwrap().named_parameters())
    loaded = patchlife.load(tmp_path / "out", small_model().unwrap())
    images = torch.randn(3, 3, 48, 48)
    with loaded.temporarily(budget=0.7), again.temporarily(budget=0.7), torch.no_grad():
        torch.testing.assert_close(loaded(images), again(images), rtol=0, atol=1e-5)
    assert budgets_drawn(fitted[1]) != budgets_drawn(tmp_path / "out"), "new views and budgets"
    with pytest.raises(CheckpointError, match="initial delta"):  # the work folder belongs to this beginning
        fit(again, photos, PREPROCESS, tmp_path / "out", settings, accelerator_for("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": "full"}, "cannot be the dense teacher"),
        ({"finetune": "none"}, "cannot be the dense teacher"),
        ({"lowest_budget": 0.5}, "was trained down to budget 0.6, got lowest_budget 0.5"),
    ],
)
def test_other_fits_from_a_gated_adapter_are_refused(fitted, changes, message: str, tmp_path: Path) -> None:
    settings = replace(STAGE2, **changes)
    with pytest.raises(ConfigError, match=message):
        fit(fitted[0], [], PREPROCESS, tmp_path / "out", settings, accelerator_for("cpu"))


def test_info_shows_size_and_gates(fitted) -> None:
    delta = info._delta(fitted[0])
    assert delta == json.loads(json.dumps(delta))
    text = info._delta_text(delta)
    assert "none at budget 1, gates at 0 to 0.4, 0.171429 to 0.4 of removed FLOPs" in text
