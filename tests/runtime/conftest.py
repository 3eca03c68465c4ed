"""What the tests of compiled runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def forget_graphs() -> Iterator[None]:
    """No compiled graph of an earlier test, and none left for a later one."""
    import torch
    from torch._dynamo.utils import counters  # slow to import: only the tests of compiled runs do

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
