"""All errors that patchlife raises. A message states what was expected, what was got, and how to fix it."""

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
    """Base class of all errors of patchlife."""


class ConfigError(PatchLifeError, ValueError):
    """An invalid setting, such as a budget of 60 or a start block beyond the model's depth."""


class UnsupportedModelError(PatchLifeError, TypeError):
    """A model whose patches cannot be dropped exactly (windows, convolutions, unknown blocks)."""


class CheckpointError(PatchLifeError):
    """Backbone weights that are missing, damaged, of another model, or in a format that is not opened."""


class AdapterError(PatchLifeError):
    """An adapter that is damaged, incomplete, made for another backbone, or not available from the hub."""


class ExportError(PatchLifeError):
    """An exported file that is damaged, too new, or whose outputs differ from those of its model."""


class ImageError(PatchLifeError):
    """A photo that cannot be read safely. Only this photo fails; the other images of the batch are processed."""


class NumericalError(PatchLifeError):
    """NaN or infinite values."""


class MissingExtraError(PatchLifeError, ImportError):
    """An optional dependency is not installed. The message holds the install command."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'patchlife[{extra}]'")


def shortened(parts: Sequence[str], most: int = 5) -> str:
    """The first ``most`` parts as text, and the number of the others."""
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")
