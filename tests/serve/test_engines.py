"""What answers: the model itself, its engines, exported files and bundles. All give the answers of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from not_photos import encoded

from patchlife.cli.main import main
from patchlife.config import ModelConfig, ServeConfig
from patchlife.errors import ConfigError
from patchlife.serve.answering import Answerer, open_answerer
from patchlife.serve.questions import Ask

pytestmark = pytest.mark.slow

BUDGETS = (1.0, 0.6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    assert main(["export", "demo", "--budgets", "1.0,0.6", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module", params=["onnx", "openvino", "torch"])
def file(request, tmp_path_factory) -> Path:
    suffix = {"onnx": ".onnx", "openvino": ".zip", "torch": ".pt2"}[request.param]
    path = tmp_path_factory.mktemp("exported") / f"demo{suffix}"
    assert main(["export", "demo", "--budget", "0.6", "--format", request.param, "--out", str(path)]) == 0
    return path


def served(model: object, **settings: Any) -> Answerer:
    return open_answerer(ServeConfig(ModelConfig(str(model)), device="cpu", threads=1, **settings))


def assert_answers_equal(one: Answerer, other: Answerer, budget: float) -> None:
    """For a batch and for one photo."""
    images = [one.read(encoded(seed)) for seed in range(3)]
    for batch in (images, images[:1]):
        asks = [Ask("predict", budget, top=10, lives=True)] * len(batch)
        for found, expected in zip(one.answer(asks, batch), other.answer(asks, batch), strict=True):
            assert isinstance(found, dict)
            assert isinstance(expected, dict)
            assert (found["budget"], found["kept"]) == (expected["budget"], expected["kept"])
            assert found["lives"] == expected["lives"]
            values = [{top["class"]: top["probability"] for top in record["top"]} for record in (found, expected)]
            assert values[0] == pytest.approx(values[1], abs=2e-4)


def test_a_bundle_answers_at_its_budgets(bundle, demo):
    answerer = served(bundle, degrade=BUDGETS)
    assert answerer.description.budgets == BUDGETS
    for budget in BUDGETS:
        assert_answers_equal(answerer, demo, budget)
    assert served(bundle).description.budget == 1.0
    with pytest.raises(ConfigError, match=r"holds the budgets 1, 0\.6, got 0\.8 in --degrade"):
        served(bundle, degrade=(1.0, 0.8))


def test_a_file_answers_at_its_budget(file, demo):
    answerer = served(file, trust=True)
    assert answerer.description.budgets == (0.6,)
    assert_answers_equal(answerer, demo, 0.6)


@pytest.mark.parametrize("engine", ["onnx", "openvino", "compile"])
def test_an_engine_answers_at_the_budgets_of_degrade(engine, demo, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path))
    answerer = served("demo", engine=engine, degrade=BUDGETS, max_batch=4)
    assert answerer.description.budgets == BUDGETS
    for budget in BUDGETS:
        assert_answers_equal(answerer, demo, budget)
