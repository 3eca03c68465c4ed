"""What several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The local folder with real weights and photos; PATCHLIFE_SHARED says where, if not next to the repo."""
    folder = Path(os.environ.get("PATCHLIFE_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("no local folder with the shared data")
    return folder
