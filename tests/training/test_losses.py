"""Losses: near zero for a perfect student, balanced between budgets, without unknown labels."""

from __future__ import annotations

import torch

from patchlife.training.losses import distillation_loss, importance_loss, similarity_loss


def test_losses_of_a_perfect_student_are_near_zero() -> None:
    teacher = torch.randn(4, 10)
    loss, divergence = distillation_loss(teacher, teacher)
    assert divergence.item() < 1e-6
    assert loss.item() < 0.01  # the power of the floor
    importance = torch.rand(4, 9).softmax(dim=1)
    assert importance_loss(importance.log(), importance).item() < 1e-6
    embedding = torch.nn.functional.normalize(torch.randn(4, 9, 5), dim=2)
    assert similarity_loss(embedding, embedding).item() < 1e-6


def test_divergence_is_in_nats() -> None:
    teacher, student = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    torch.testing.assert_close(distillation_loss(student, teacher)[1], expected)


def test_the_gradient_grows_slower_than_the_divergence() -> None:
    """The gradient of the plain divergence would be ten times as large at ten times the distance."""
    teacher, gradients = torch.zeros(1, 10), []
    for distance in (0.3, 3.0):
        with torch.enable_grad():
            student = torch.zeros(1, 10).index_fill(1, torch.tensor([0]), distance).requires_grad_()
            distillation_loss(student, teacher)[0].backward()
        assert student.grad is not None
        gradients.append(student.grad.abs().sum().item())
    assert 1 < gradients[1] / gradients[0] < 8


def test_photos_with_unknown_labels_use_the_distillation_loss_only() -> None:
    student, teacher = torch.randn(2, 10), torch.randn(2, 10)
    plain = distillation_loss(student, teacher)[0]
    torch.testing.assert_close(distillation_loss(student, teacher, torch.tensor([-1, -1]), 0.7)[0], plain)
    half = distillation_loss(student, teacher, torch.tensor([-1, 3]), 1.0)[0]
    by_hand = torch.stack((distillation_loss(student[:1], teacher[:1])[0], -student[1].log_softmax(0)[3])).mean()
    torch.testing.assert_close(half, by_hand)
