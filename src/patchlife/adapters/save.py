"""Saving an adapter: settings, scorer, calibrations, and what was trained of the backbone."""

from __future__ import annotations

from pathlib import Path

from ..backbones.weight_delta import delta_since
from ..slimming import Scorer, SlimModel
from ..version import __version__
from .format import FORMAT, WITHOUT_GATES, WITHOUT_SHAPES, calibration_name, check_free, write_adapter
from .scorers import scorer_entry

__all__ = ["save"]


def save(model: SlimModel, folder: str | Path) -> Path:
    """Write the adapter of ``model``; an existing adapter is replaced in one step, or not at all.

    The backbone is never saved. What a fit changed of it is a small weight delta; weights that were trained in another
    way after the model was wrapped are saved whole, in their own precision.

    Raises AdapterError, before anything is written, when ``folder`` exists and is not an adapter, when the structure of
    the backbone changed since it was wrapped, and when the scorer could not be loaded again. Raises ConfigError when a
    weight with a gated delta was replaced while the delta was merged.
    """
    folder = Path(folder)
    check_free(folder)
    scorer: Scorer = getattr(model.scorer, "_orig_mod", model.scorer)  # unwrap torch.compile's module
    entry = scorer_entry(scorer)
    delta = delta_since(model.backbone, model.base, model.delta)
    settings = model.full_settings()
    calibrations = {
        calibration_name(patches, start if settings.shapes else None): calibration
        for (patches, start), calibration in model.calibrations.items()
        if start in model.starts
    }
    manifest = {
        "format": FORMAT if settings.shapes else WITHOUT_SHAPES if delta and delta.gates else WITHOUT_GATES,
        "patchlife": __version__,
        "config": settings.to_dict(),
        "scorer": entry,
        "calibrations": {name: calibration.images for name, calibration in calibrations.items()},
        "backbone": delta.base if delta else model.base,
        "classes": delta.classes if delta else None,
        "gates": delta.gates if delta else None,
        "tuning": model.tuning,
        "origin": model.origin.to_dict() if model.origin else None,
    }
    tensors = {f"scorer.{k}": v for k, v in scorer.state_dict().items()}
    for name, calibration in calibrations.items():
        tensors |= {f"calibration.{name}.{k}": v for k, v in calibration.tensors().items()}
    tensors |= {f"weight_delta.{k}": v for k, v in (delta.tensors if delta else {}).items()}
    write_adapter(folder, manifest, tensors)
    return folder
