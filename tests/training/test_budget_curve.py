"""The curve over budgets in the report of a fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, QUICK, small_model, some_photos

from patchlife.config import CURVE_BUDGETS
from patchlife.data import read_photo
from patchlife.evaluation.accuracy import evaluate
from patchlife.training.budget_curve import agreements, budget_sections
from patchlife.training.fit import fit, work_folder
from patchlife.training.validation import Validation


def test_the_points_equal_an_evaluation_of_the_photos(tmp_path: Path) -> None:
    model, photos = small_model(), some_photos(tmp_path / "photos")
    sets = Validation.from_photos(model, {"some": photos}, PREPROCESS, tmp_path / "cache", QUICK).sets
    rows = agreements(model, sets["some"])
    assert [row[0] for row in rows] == [budget for budget in reversed(CURVE_BUDGETS) if budget >= rows[-1][0]]
    images = torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])
    labels = torch.tensor([photo.label for photo in photos])
    dense = model.backbone.model
    scores = evaluate(model, dense, [(images, labels)], [(row[0], "fixed") for row in rows])
    for (_, fraction, score), expected in zip(rows, scores, strict=True):
        assert fraction == pytest.approx(expected.fraction)
        assert (score.top1, score.agreement) == (pytest.approx(expected.top1), pytest.approx(expected.agreement))
        assert score.kl == pytest.approx(expected.divergence, rel=0.1, abs=1e-6)  # cached tokens are float16
    whole = rows[0][2]
    assert (whole.agreement, whole.kl) == (1, pytest.approx(0, abs=1e-6))


def test_top1_of_validation_photos_or_agreement_of_held_out_photos(tmp_path: Path) -> None:
    model, photos = small_model(), some_photos(tmp_path / "photos")
    sets = Validation.from_photos(model, {"some": photos}, PREPROCESS, tmp_path / "cache", QUICK).sets
    with_labels = "".join(budget_sections(model, sets["some"], sets))
    without = "".join(budget_sections(model, sets["some"]))
    assert "<h2>Accuracy by budget" in with_labels
    assert "top-1, %</th>" in with_labels
    assert "12 of the validation photos some, by budget. Budgets out of reach: 0.3" in with_labels
    assert "<h2>Agreement with the dense model by budget" in without
    assert "top-1" not in without
    for text in (with_labels, without):
        assert "0.0000</td>" in text.split("<tbody>")[1].splitlines()[1], "the first row is budget 1.0, without any KL"
    _, empty = sets["some"].split(0)
    assert budget_sections(model, empty) == []


def test_the_report_of_a_fit_shows_its_validation_sets(tmp_path: Path) -> None:
    photos, out = some_photos(tmp_path / "photos"), tmp_path / "adapter"
    config = replace(QUICK, epochs=1)
    fit(small_model(), photos, PREPROCESS, out, config, validation={"street": photos[:6]})
    report = (work_folder(out) / "report.html").read_text()
    assert "Slimmed model in fixed mode against the dense model on 6 of the validation photos street" in report
