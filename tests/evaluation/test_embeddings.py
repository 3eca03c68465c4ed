"""Embeddings: cosines and neighbours equal slow loops; scores are those of the model's own outputs."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from families import built, photos

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.evaluation.accuracy import paired_interval
from patchlife.evaluation.embeddings import cosines, evaluate_embeddings, neighbour_classes, one_vector


def slow_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)) ** 0.5


def slow_class(query: torch.Tensor, gallery: list[tuple[torch.Tensor, int]], neighbours: int) -> int:
    nearest = sorted(((slow_cosine(query, vector), label) for vector, label in gallery), reverse=True)[:neighbours]
    votes: dict[int, float] = defaultdict(float)
    for cosine, label in nearest:
        votes[label] += max(0.0, cosine)
    return min(votes, key=lambda label: (-votes[label], label))


def clustered(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around four centres, which overlap, and the number of the centre."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.2 * torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("neighbours", [1, 3, 10, 100])
def test_neighbours_in_a_gallery_equal_a_slow_loop(neighbours: int) -> None:
    (queries, labels), (gallery, classes) = clustered(40, 1), clustered(60, 2)
    expected = [slow_class(query, list(zip(gallery, classes.tolist(), strict=True)), neighbours) for query in queries]
    found = neighbour_classes(queries, gallery, classes, neighbours)
    assert found.tolist() == expected
    assert 0 < (found == labels).double().mean() < 1  # the classes overlap


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_leaving_one_out_equals_a_slow_loop(neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.evaluation.embeddings._QUERIES_AT_ONCE", 7)
    vectors, labels = clustered(50, 3)
    pairs = list(zip(vectors, labels.tolist(), strict=True))
    expected = [slow_class(vector, pairs[:i] + pairs[i + 1 :], neighbours) for i, vector in enumerate(vectors)]
    assert neighbour_classes(vectors, vectors, labels, neighbours, leave_one_out=True).tolist() == expected


def test_a_vector_on_the_other_side_has_no_vote() -> None:
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.1, 1.0], [-1.0, 0.0], [-1.0, 0.1]])
    assert neighbour_classes(query, gallery, torch.tensor([1, 0, 0]), 3).tolist() == [1]


def test_neighbours_need_something_to_search() -> None:
    one = torch.ones(1, 2)
    with pytest.raises(ConfigError, match="1 vector to search, got 10 and 0"):
        neighbour_classes(one, one, torch.tensor([0]), leave_one_out=True)
    with pytest.raises(ConfigError, match="at least 1 neighbour"):
        neighbour_classes(one, one, torch.tensor([0]), 0)


def test_cosines_equal_a_slow_loop() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = [slow_cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert cosines(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_vector_for_each_token_counts_as_their_mean() -> None:
    output = torch.randn(2, 5, 3)
    torch.testing.assert_close(one_vector(output), output.mean(dim=1))
    assert one_vector(output[:, 0]) is not output  # (batch, dim) stays as it is
    assert torch.equal(one_vector(output[:, 0]), output[:, 0])


@pytest.mark.parametrize("with_gallery", [False, True])
def test_scores_are_those_of_the_outputs(with_gallery: bool) -> None:
    vit = built("no-classifier")
    model = wrap(vit, LifeConfig(budget=0.9, start=2))
    images, others = photos("no-classifier", 12), photos("no-classifier", 20, seed=1)
    labels, classes = torch.arange(12) % 3, torch.arange(20) % 3
    model.calibrate([others])
    settings = [(1.0, "fixed"), (0.65, "fixed"), (0.65, "adaptive")]
    gallery = [(others, classes)] if with_gallery else None
    batches = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    scores = evaluate_embeddings(model, model.backbone.output, batches, settings, gallery=gallery, neighbours=4)
    assert model.settings.budget == 0.9
    with torch.no_grad():
        dense, dense_others = vit(images), vit(others)
    for (budget, mode), score in zip(settings, scores, strict=True):
        with torch.no_grad(), model.temporarily():
            model.set_mode(mode).set_budget(budget)
            mine, lives = model.predict(images)
            mine_others = model.predict(others)[0]
            flops = model.flops_of(lives)
        cosine = torch.tensor([slow_cosine(a, b) for a, b in zip(dense, mine, strict=True)]).double()
        assert score.cosine == pytest.approx(cosine.mean().item(), abs=1e-5)
        assert score.low_cosine == pytest.approx(cosine.quantile(0.05).item(), abs=1e-5)
        assert score.flops == pytest.approx(sum(flops) / 12)
        right, dense_right = (
            (
                neighbour_classes(own, theirs, classes, 4)
                if with_gallery
                else neighbour_classes(own, own, labels, 4, leave_one_out=True)
            )
            == labels
            for own, theirs in ((mine, mine_others), (dense, dense_others))
        )
        assert (score.knn, score.dense_knn) == (right.double().mean().item(), dense_right.double().mean().item())
        assert score.drop_interval == paired_interval(dense_right, right)
    assert scores[0].cosine == pytest.approx(1, abs=1e-6)
    assert scores[0].drop == 0
    assert scores[1].cosine < 0.9999


def test_without_labels_only_the_cosine_is_measured() -> None:
    model = wrap(built("no-classifier"), LifeConfig(budget=0.65, start=2))
    unknown = torch.full((3,), -1)
    (score,) = evaluate_embeddings(
        model, model.backbone.output, [(photos("no-classifier"), unknown)], [(0.65, "fixed")]
    )
    assert 0 < score.cosine < 1
    assert (score.knn, score.dense_knn, score.drop, score.drop_interval) == (None, None, None, None)
