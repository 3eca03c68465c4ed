"""Every error that patchlife raises on purpose. Messages say what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "ImageError",
    "MissingExtraError",
    "NumericalError",
    "PatchLifeError",
    "UnsupportedModelError",
    "shortened",
]


class PatchLifeError(Exception):
    """Parent of all errors below: catch this one to catch them all."""


class ConfigError(PatchLifeError, ValueError):
    """A setting that cannot work: a budget of 60, a start block the model does not have."""


class UnsupportedModelError(PatchLifeError, TypeError):
    """A backbone whose tokens cannot be dropped exactly (windows, convolutions, unknown blocks)."""


class CheckpointError(PatchLifeError):
    """Backbone weights that are missing, of another model, damaged, or in a format we refuse to open."""


class AdapterError(PatchLifeError):
    """A life adapter that is damaged, incomplete, or was made for another backbone."""


class ExportError(PatchLifeError):
    """An exported file that is damaged, too new, or does not answer as the model it was made from."""


class ImageError(PatchLifeError):
    """A photo that cannot be read safely. Only that photo fails; its batch mates go on."""


class NumericalError(PatchLifeError):
    """NaN or infinity where numbers should be."""


class MissingExtraError(PatchLifeError, ImportError):
    """An optional dependency is not installed; the message is the install line."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'patchlife[{extra}]'")


def shortened(parts: Sequence[str], most: int = 5) -> str:
    """A list in words that does not fill the screen."""
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")
