"""The peak counts tensors that exist at the same time, not all that were created."""

from __future__ import annotations

import torch

from patchlife.evaluation.memory import peak_bytes

MEGA = torch.zeros(250_000)  # a megabyte


def test_a_freed_tensor_is_not_counted_with_later_ones() -> None:
    def chain() -> torch.Tensor:
        x = MEGA + 1
        for _ in range(5):
            x = x + 1  # two exist at a time
        return x

    assert peak_bytes(chain) == 2_000_000


def test_tensors_that_are_kept_add_up() -> None:
    assert peak_bytes(lambda: [MEGA + i for i in range(5)]) == 5_000_000


def test_views_and_changes_in_place_take_no_memory() -> None:
    assert peak_bytes(lambda: MEGA.view(500, 500).t()[:10]) == 0
    assert peak_bytes(lambda: MEGA.add_(0)) == 0


def test_memory_is_counted_inside_inference_mode() -> None:
    with torch.inference_mode():
        layer = torch.nn.Linear(100, 50)
        x = torch.zeros(10, 100)
        assert peak_bytes(lambda: layer(x)) >= 4 * 10 * 50
