"""The committed adapters were converted from format 2 to 3, not trained again; their logits have not changed.

``logits_of_format_2.safetensors`` holds the logits of three of the demo's photos, for each adapter, mode and budget,
computed by the code before the conversion. They are in float64, so that the order of additions has no effect. The
numbers of kept patches are those of that code: the decision costs less now, so a budget keeps about one patch more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchlife.config import ModelConfig
from patchlife.data import list_photos, read_photo
from patchlife.runtime.demo_model import demo_folder
from patchlife.runtime.opening import open_pipeline

ROOT = Path(__file__).parents[2]
KEPT = {
    ("demo", "fixed", 0.61): (129, 84),
    ("demo", "fixed", 0.45): (87, 38),
    ("demo", "adaptive", 0.61): (130, 84),
    ("demo", "adaptive", 0.45): (87, 39),
    ("vit_tiny", "fixed", 0.61): (125, 81),
    ("vit_tiny", "fixed", 0.45): (83, 35),
    ("vit_tiny", "adaptive", 0.61): (126, 81),
    ("vit_tiny", "adaptive", 0.45): (84, 35),
}
"""From block 3 on, and from block 6 on."""
LOGITS = load_file(Path(__file__).with_name("logits_of_format_2.safetensors"))


@pytest.fixture(scope="module")
def pipelines():
    return {}


def cached_pipeline(name: str, request, pipelines):
    if name not in pipelines:
        config = ModelConfig("demo")
        if name != "demo":
            weights = request.getfixturevalue("shared") / "weights" / "vit_tiny_patch16_224.safetensors"
            config = ModelConfig(str(ROOT / "recipes" / "vit_tiny" / name), checkpoint=weights)
        pipelines[name] = open_pipeline(config)
        pipelines[name].model.double()
    return pipelines[name]


@pytest.mark.parametrize("budget", [1.0, 0.61, 0.45])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize(
    "name", ["demo", pytest.param("head", marks=pytest.mark.shared), pytest.param("adapter", marks=pytest.mark.shared)]
)
def test_logits_equal_those_of_format_2(name, mode, budget, request, pipelines):
    pipeline = cached_pipeline(name, request, pipelines)
    photos = [pipeline.preprocess(read_photo(path)) for path in list_photos([demo_folder()])[:3]]
    model = pipeline.model.set_mode(mode).set_budget(budget)
    third, sixth = KEPT.get((name if name == "demo" else "vit_tiny", mode, budget), (196, 196))
    with torch.inference_mode(), model.temporarily(kept=(196,) * 3 + (third,) * 3 + (sixth,) * 6):
        logits = model(torch.stack(photos).double())
    torch.testing.assert_close(logits, LOGITS[f"{name}.{mode}.{budget:g}"], rtol=0, atol=1e-6)
