"""What the oldest supported timm does not have: tests that need it are skipped there, and say why."""

from __future__ import annotations

import timm


def older_timm(version: str) -> bool:
    """Whether the installed timm came before ``version``, such as "1.0.31"."""
    return _numbers(timm.__version__) < _numbers(version)


def needs_timm(version: str, what: str) -> None:
    """Skip the test that asks for ``what`` where the installed timm came before ``version``."""
    if older_timm(version):
        import pytest  # the GPU script uses the small models without it

        pytest.skip(f"{what} came with timm {version}; {timm.__version__} is installed")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])
