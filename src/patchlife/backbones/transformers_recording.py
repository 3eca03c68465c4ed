"""What transformers records of a model's layers while the model runs: hidden states and attention maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError

__all__ = ["not_recording", "recorded_layers"]


@contextmanager
def not_recording() -> Iterator[dict[str, Any]]:
    """Within it transformers records nothing; gives what it was recording, by name."""
    from transformers.utils.output_capturing import _active_collector

    recorded = _active_collector.get()
    if not recorded:
        yield {}
        return
    _active_collector.set(None)
    try:
        yield recorded
    finally:
        _active_collector.set(recorded)


def recorded_layers(recorded: dict[str, Any], depth: int) -> list[int]:
    """Indices of the layers whose outputs are recorded as hidden states.

    Raises ConfigError if attention maps are recorded.
    """
    if "attentions" in recorded:
        raise ConfigError(
            "attention maps of a slimmed model differ in size from layer to layer; call it without output_attentions, "
            "with set_budget(1.0), or use model.unwrap()"
        )
    if "hidden_states" not in recorded:
        return []
    chosen = recorded.get("_hidden_states_layers")  # hidden states, counted from the embeddings; before 5.20 layers
    return [layer for layer in range(depth) if chosen is None or layer in chosen or layer + 1 in chosen]
