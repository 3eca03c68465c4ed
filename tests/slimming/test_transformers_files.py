"""Files, copies, state dicts and moves of a slimmed model of transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import liven
from slim_models import far_apart
from transformers_families import FAMILIES, arguments, fresh, photos, slim
from transformers_reference import assert_same_outputs

import patchlife


def test_save_pretrained_writes_what_the_backbone_writes(tmp_path: Path) -> None:
    backbone = fresh("vit-classifier")
    model = slim("vit-classifier", model=backbone)
    backbone.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "slimmed")
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    for file in (tmp_path / "backbone").iterdir():
        for other in ("slimmed", "state"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes(), (other, file.name)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov3-gated", "siglip", "clip-projection"])
def test_an_adapter_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, images = slim(name, "adaptive, merge"), photos(name)
    patchlife.save(model, tmp_path / "adapter")
    loaded = patchlife.load(tmp_path / "adapter", fresh(name))
    assert_same_outputs(loaded(**arguments(name, images)), model(**arguments(name, images)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
def test_copies_and_pickles_are_independent(duplicate: Any, variant: str) -> None:
    backbone = liven(FAMILIES["vit-classifier"].build()).eval()  # not used before: transformers' hooks have no pickle
    model, images = slim("vit-classifier", variant, backbone), photos("vit-classifier")
    expected = model(images, output_hidden_states=True)
    other = duplicate(model)
    assert_same_outputs(other(images, output_hidden_states=True), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.set_budget(0.8)
    assert_same_outputs(model(images, output_hidden_states=True), expected)
    assert other.unwrap() is other.backbone.model
    assert other.vit is other.unwrap().vit


def test_a_state_dict_round_trip() -> None:
    model, images = slim("vit-classifier", "adaptive", fresh("vit-classifier")), photos("vit-classifier")
    other = slim("vit-classifier", model=liven(fresh("vit-classifier"), seed=5), budget=0.8)
    assert far_apart(other(images).logits, model(images).logits)
    other.load_state_dict(model.state_dict())
    assert_same_outputs(other(images), model(images))
    other.load_state_dict(fresh("vit-classifier").state_dict())


def test_moving_casting_and_switching_modes_reach_the_backbone() -> None:
    model = slim("vit-classifier", model=fresh("vit-classifier"))
    images = photos("vit-classifier")
    assert model.to(torch.bfloat16)(images).logits.dtype == torch.bfloat16
    assert model.half().unwrap().dtype == torch.float16
    assert model.double().backbone.dtype == torch.float64
    model.train()
    assert all(module.training for module in model.unwrap().modules())
    model.eval()
    assert not any(module.training for module in model.unwrap().modules())
