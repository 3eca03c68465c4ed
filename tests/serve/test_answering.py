"""The model of a service: a batch answers as each photo alone; what is not a photo gets the reader's message."""

from __future__ import annotations

import warnings

import pytest
import torch
from not_photos import BAD, encoded

from patchlife.config import ModelConfig, ServeConfig
from patchlife.data import read_photo
from patchlife.errors import ConfigError, ImageError
from patchlife.serve.answering import open_answerer
from patchlife.serve.questions import Ask


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_photo_gets_the_readers_message(demo, name, tmp_path):
    content, message = BAD[name]
    with pytest.raises(ImageError, match=message) as refused:
        demo.read(content)
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(ImageError) as told:
        read_photo(tmp_path / "photo")
    assert str(refused.value) == str(told.value).replace(str(tmp_path / "photo"), "photo")
    assert "0x" not in str(refused.value)


@pytest.mark.parametrize("task", ["predict", "embed"])
@pytest.mark.parametrize("budget", [1.0, 0.6, 0.45])
def test_a_batch_answers_as_each_photo_alone(demo, task, budget):
    images = [demo.read(encoded(seed)) for seed in range(5)]
    ask = Ask(task, budget, top=10, lives=True)
    together = demo.answer([ask] * 5, images)
    for image, record in zip(images, together, strict=True):
        (alone,) = demo.answer([ask], [image])
        assert record.keys() == alone.keys()
        if task == "embed":
            torch.testing.assert_close(*(torch.tensor(r["embedding"]) for r in (record, alone)), rtol=1e-4, atol=1e-4)
            continue
        assert record["kept"] == alone["kept"]
        assert record["lives"] == alone["lives"]
        probabilities = [{entry["class"]: entry["probability"] for entry in r["top"]} for r in (record, alone)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


def test_each_photo_gets_what_it_asked_for(demo):
    images = [demo.read(encoded(seed)) for seed in range(2)]
    first, second = demo.answer([Ask("predict", 0.6, top=1), Ask("predict", 0.6, top=99, lives=True)], images)
    assert (len(first["top"]), "lives" in first) == (1, False)
    assert (len(second["top"]), second["lives"]["grid"]) == (10, [14, 14])
    assert len(second["lives"]["life"]) == 196


def test_the_budget_is_that_of_the_ask(demo):
    image = demo.read(encoded(0))
    fractions = [demo.answer([Ask("predict", budget)], [image])[0]["fraction_of_dense"] for budget in (1.0, 0.5, 0.8)]
    assert fractions == pytest.approx([1.0, 0.5, 0.8], abs=0.03)


def test_a_budget_out_of_reach_is_an_error_of_the_settings():
    with pytest.raises(ConfigError, match="budget"):
        open_answerer(ServeConfig(ModelConfig("demo"), device="cpu", degrade=(1.0, 0.01)))


def test_degrade_begins_at_its_first_budget():
    answerer = open_answerer(ServeConfig(ModelConfig("demo"), device="cpu", degrade=(0.8, 0.6)))
    assert (answerer.description.budget, answerer.description.budgets) == (0.8, None)


def test_adaptive_mode_works_with_thresholds():
    answerer = open_answerer(ServeConfig(ModelConfig("demo", life={"mode": "adaptive"}), device="cpu"))
    ask = Ask("predict", answerer.description.budget)
    together = answerer.answer([ask] * 3, [answerer.read(encoded(seed)) for seed in range(3)])
    alone = [answerer.answer([ask], [answerer.read(encoded(seed))])[0] for seed in range(3)]
    assert [record["kept"] for record in together] == [record["kept"] for record in alone]


def test_a_failure_of_the_model_is_no_error_of_the_photo(monkeypatch):
    """The client is told neither that its photo is wrong nor what failed; a replica that always fails is replaced."""
    with warnings.catch_warnings():  # Ray's own
        warnings.simplefilter("ignore")
        from patchlife.serve.replica import Model

    replica = Model.__new__(Model)
    answerer = open_answerer(ServeConfig(ModelConfig("demo"), device="cpu"))
    image = answerer.read(encoded(0))
    monkeypatch.setattr(answerer.pipeline.model, "predict", lambda images: torch.empty(-1))
    (failure,) = answerer.answer([Ask("predict", 1.0)], [image])
    assert "the model fails on it" in failure.error
    replica._failures = 0
    told = [replica._told(failure) for _ in range(20)]
    assert set(told) == {(500, "the model gave no answer for this photo; the log of the service has the reason")}
    with pytest.raises(RuntimeError, match="20 photos"):
        replica.check_health()
    assert replica._told({"top": []}) == (200, {"top": []})
    replica.check_health()
