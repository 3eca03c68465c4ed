"""Average precision against values that were computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from patchlife.evaluation.average_precision import average_precision, mean_average_precision


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.6, 0.9, 0.7, 0.8], [0, 1, 1, 0], (1 / 1 + 2 / 3) / 2),  # the same photos in another order
        ([0.4, 0.3, 0.2, 0.1], [0, 0, 0, 1], 1 / 4),
        ([0.4, 0.3, 0.2, 0.1], [1, 1, 1, 1], 1.0),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 1 / 4),  # equal scores count together
        ([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
        ([0.9, 0.5, 0.5, 0.1], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
    ],
)
def test_average_precision(scores, positive, expected):
    found = average_precision(torch.tensor(scores), torch.tensor(positive).bool())
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_mean_leaves_out_classes_that_no_photo_has():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.2], [0.7, 0.3, 0.9]])
    positive = torch.tensor([[True, False, False], [False, False, True], [True, False, False]])
    assert mean_average_precision(scores, positive) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    assert math.isnan(mean_average_precision(scores, torch.zeros(3, 3, dtype=torch.bool)))
    assert math.isnan(average_precision(scores[:, 0], torch.zeros(3, dtype=torch.bool)))
