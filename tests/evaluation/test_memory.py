"""The peak counts what is alive at once, not what was ever made."""

from __future__ import annotations

import torch

from patchlife.evaluation.memory import peak_bytes

MEGA = torch.zeros(250_000)  # a megabyte


def test_what_dies_is_not_counted_with_what_follows() -> None:
    def chain() -> torch.Tensor:
        x = MEGA + 1
        for _ in range(5):
            x = x + 1  # two alive at a time
        return x

    assert peak_bytes(chain) == 2_000_000


def test_what_is_held_adds_up() -> None:
    assert peak_bytes(lambda: [MEGA + i for i in range(5)]) == 5_000_000


def test_views_weights_and_changes_in_place_are_free() -> None:
    assert peak_bytes(lambda: MEGA.view(500, 500).t()[:10]) == 0
    assert peak_bytes(lambda: MEGA.add_(0)) == 0


def test_weights_made_without_a_graph_are_seen_through() -> None:
    with torch.inference_mode():
        layer = torch.nn.Linear(100, 50)
        x = torch.zeros(10, 100)
        assert peak_bytes(lambda: layer(x)) >= 4 * 10 * 50
