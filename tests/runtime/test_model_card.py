"""The model card, read back: its header is valid YAML and its table holds the numbers of `flops`."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
from converted import pair
from families import built, photos
from gated_deltas import gated_model
from huggingface_hub import ModelCard

import patchlife
from patchlife import LifeConfig
from patchlife.backbones import Origin
from patchlife.errors import ConfigError
from patchlife.runtime.model_card import base_model_of, model_card


def table(card: ModelCard) -> list[dict[str, str]]:
    """Rows of the table, by the heading of the column."""
    lines = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row + [""] * (len(header) - len(row)), strict=True)) for row in rows]


def read_back(model: Any, **details: Any) -> ModelCard:
    """The card after a round trip through text, as the hub reads it."""
    return ModelCard(str(model_card(model, "someone/vit-slim", **details)))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_the_table_holds_the_costs_of_each_budget(mode: Any) -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.65, start=2, mode=mode)).calibrate([photos("vit", 8)])
    rows = table(read_back(model))
    assert [row["budget"] for row in rows] == ["1", "0.8", "0.7", "0.65 (default)", "0.6", "0.5"]
    for row in rows:
        with model.temporarily(budget=float(row["budget"].split()[0])):
            cost = patchlife.flops(model)
            assert float(row["GFLOPs per image"]) == pytest.approx(cost.slimmed / 1e9, rel=5e-3)
            assert row["of the dense FLOPs"] == f"{cost.budget:.1%}"
            assert int(row["patches in the last block"]) == model.schedule().kept[-1]
    assert rows[0]["patches in the last block"] == "36"
    assert f"in {mode} mode" in read_back(model).text
    assert model.settings.budget == 0.65


def test_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2))
    data = read_back(model, license="apache-2.0", base_model="timm/vit_tiny_patch16_224").data
    assert data.library_name == "patchlife"
    assert data.base_model == "timm/vit_tiny_patch16_224"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert "token-pruning" in data.tags
    bare = read_back(patchlife.wrap(built("no-classifier"), LifeConfig(budget=0.7, start=2))).data
    assert bare.pipeline_tag == "image-feature-extraction"
    assert bare.base_model is None
    assert bare.license is None


def test_measured_figures_are_columns() -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2))
    results = {"top-1 in %, my photos": {1.0: 82.2, 0.65: 81.9}, "images per s": {0.65: "410 (CPU)"}}
    rows = {row["budget"]: row for row in table(read_back(model, results=results))}
    assert rows["1"]["top-1 in %, my photos"] == "82.2"
    assert (rows["0.65"]["top-1 in %, my photos"], rows["0.65"]["images per s"]) == ("81.9", "410 (CPU)")
    assert rows["0.8"]["images per s"] == ""
    with pytest.raises(ConfigError, match=r"0\.01"):
        read_back(model, results={"top-1": {0.01: 1.0}})
    with pytest.raises(ConfigError, match="60"):
        read_back(model, results={"top-1": {60: 1.0}})


def test_an_explicit_schedule_is_no_budget() -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(kept=(36, 36, 30, 20, 5), start=2))
    assert not any("default" in row["budget"] for row in table(read_back(model)))
    assert model.schedule().kept == (36, 36, 30, 20, 5)


def usage(card: ModelCard) -> str:
    return card.text.partition("```python\n")[2].partition("```")[0]


def test_the_lines_that_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2))
    loaded: list[Any] = []
    monkeypatch.setattr("patchlife.from_hub", lambda *given: loaded.append(given), raising=False)
    exec(usage(read_back(model)), {})
    assert loaded.pop() == ("someone/vit-slim", ...)
    model.origin = Origin("vit_tiny_patch16_224", pretrained=True)
    exec(usage(read_back(model)), {})
    assert loaded.pop() == ("someone/vit-slim",)
    _, base = pair("vit")
    of_hub = copy.copy(base)
    of_hub.name_or_path = "google/vit-small"
    slimmed = patchlife.wrap(of_hub, LifeConfig(budget=0.7, start=2))
    names = types.SimpleNamespace(from_pretrained=lambda name: f"the model {name}")
    monkeypatch.setattr("transformers.ViTForImageClassification", names)
    exec(usage(read_back(slimmed, base_model=base_model_of(slimmed))), {})
    assert loaded.pop() == ("someone/vit-slim", "the model google/vit-small")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (Origin("hf-hub:someone/vit", pretrained=True), "someone/vit"),
        (Origin("hf-hub:someone/vit@v1", pretrained=True), "someone/vit"),
        (Origin("hf:someone/vit", pretrained=True), "someone/vit"),
        (Origin("open_clip:ViT-B-32/openai", pretrained=True), None),
        (Origin("local-dir:some/folder", pretrained=True), None),
        (Origin("vit_tiny_patch16_224", pretrained=True), "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        (Origin("vit_tiny_patch16_224", checkpoint="vit.safetensors"), None),
        (None, None),
    ],
)
def test_the_base_model(origin: Origin | None, expected: str | None) -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2))
    model.origin = origin
    assert base_model_of(model) == expected


def test_the_card_says_what_the_adapter_holds() -> None:
    model = patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2))
    text = read_back(model).text
    assert "before block 2 of 5" in text
    assert "thresholds" not in text
    assert "weights, not the backbone" not in text
    both = read_back(model.calibrate([photos("vit", 8)]), changes_weights=True).text
    assert "the thresholds of adaptive mode and the changes of the backbone's weights, not the backbone" in both


def test_a_gated_delta_is_named_as_none_at_budget_1() -> None:
    model = gated_model(built("vit"))
    text = read_back(model, changes_weights=True).text
    assert "the changes of the backbone's weights, which are none at budget 1.0, not the backbone" in text
    assert model.settings.budget == 0.7
