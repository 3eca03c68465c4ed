"""Losses: zero where nothing is wrong, balanced, blind where labels are unknown."""

from __future__ import annotations

import torch

from patchlife.training.losses import distillation_loss, importance_loss, similarity_loss


def test_nothing_wrong_is_nothing() -> None:
    teacher = torch.randn(4, 10)
    loss, divergence = distillation_loss(teacher, teacher)
    assert divergence.item() < 1e-6
    assert loss.item() < 0.01  # the floor's power
    importance = torch.rand(4, 9).softmax(dim=1)
    assert importance_loss(importance.log(), importance).item() < 1e-6
    embedding = torch.nn.functional.normalize(torch.randn(4, 9, 5), dim=2)
    assert similarity_loss(embedding, embedding).item() < 1e-6


def test_divergence_is_in_nats() -> None:
    teacher, student = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    torch.testing.assert_close(distillation_loss(student, teacher)[1], expected)


def test_a_large_error_does_not_drown_a_small_one() -> None:
    """The plain divergence would pull ten times as hard where the student is ten times as far."""
    teacher, pulls = torch.zeros(1, 10), []
    for distance in (0.3, 3.0):
        with torch.enable_grad():
            student = torch.zeros(1, 10).index_fill(1, torch.tensor([0]), distance).requires_grad_()
            distillation_loss(student, teacher)[0].backward()
        assert student.grad is not None
        pulls.append(student.grad.abs().sum().item())
    assert 1 < pulls[1] / pulls[0] < 8


def test_unknown_labels_leave_their_weight_with_the_teacher() -> None:
    student, teacher = torch.randn(2, 10), torch.randn(2, 10)
    plain = distillation_loss(student, teacher)[0]
    torch.testing.assert_close(distillation_loss(student, teacher, torch.tensor([-1, -1]), 0.7)[0], plain)
    half = distillation_loss(student, teacher, torch.tensor([-1, 3]), 1.0)[0]
    by_hand = torch.stack((distillation_loss(student[:1], teacher[:1])[0], -student[1].log_softmax(0)[3])).mean()
    torch.testing.assert_close(half, by_hand)
