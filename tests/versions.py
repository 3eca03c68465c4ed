"""Skipping tests of features that the installed timm or transformers does not have yet."""

from __future__ import annotations

from importlib.metadata import version

import timm


def older_timm(version: str) -> bool:
    """Whether the installed timm is older than ``version``, such as "1.0.31"."""
    return _numbers(timm.__version__) < _numbers(version)


def needs_timm(version: str, feature: str) -> None:
    """Skip the calling test if the installed timm is older than ``version``, which introduced ``feature``."""
    if older_timm(version):
        import pytest  # imported here: the GPU script uses the small models without pytest

        pytest.skip(f"{feature} needs timm {version}, got {timm.__version__}")


def needs_transformers(since: str, feature: str) -> None:
    """Skip the calling test if the installed transformers is older than ``since``, with which ``feature`` works."""
    installed = version("transformers")
    if _numbers(installed) < _numbers(since):
        import pytest

        pytest.skip(f"{feature} needs transformers {since}, got {installed}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])
