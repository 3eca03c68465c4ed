"""Scorers in adapters: what is saved of one, and how it is built again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError, shortened
from ..slimming.regressor import LifeRegressor, LifeRegressors
from ..slimming.scorers import AttentionScorer, Scorer

__all__ = ["SCORERS", "restored_scorer", "scorer_entry"]

SCORERS: dict[str, type[Scorer]] = {s.kind: s for s in (AttentionScorer, LifeRegressor, LifeRegressors)}
"""The package's own, by kind."""


def scorer_entry(scorer: Scorer) -> dict[str, Any]:
    """Kind and settings for ``adapter.json``. Raises AdapterError for a scorer that could not be loaded again."""
    of = type(scorer).__name__
    kind = getattr(scorer, "kind", None)
    if not isinstance(kind, str):
        raise AdapterError(f"{of} has no kind, so it cannot be saved; add one to the class: kind = 'my-scorer'")
    if SCORERS.get(kind, type(scorer)) is not type(scorer):
        raise AdapterError(
            f"{of} has the kind {kind!r}, which is {SCORERS[kind].__name__}'s; choose another one for the class: "
            "kind = 'my-scorer'"
        )
    other = [name for name, value in scorer.state_dict().items() if not isinstance(value, Tensor)]
    if other:
        raise AdapterError(f"{of}'s state_dict holds more than tensors ({shortened(other)}); move that into settings()")
    return {"kind": kind, "settings": _as_json(scorer)}


def _as_json(scorer: Scorer) -> dict[str, Any]:
    """The scorer's settings after a round trip through JSON. Raises AdapterError where that changes them."""
    settings: dict[str, Any] = {}
    for name, value in scorer.settings().items():
        try:
            settings[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise _no_json(scorer, name, value, str(error)) from None
        if settings[name] != _listed(value):
            raise _no_json(scorer, name, value, "JSON would change it")
    return settings


def _no_json(scorer: Scorer, name: str, value: Any, reason: str) -> AdapterError:
    return AdapterError(
        f"{type(scorer).__name__}.settings() must return JSON values, got {name}={value!r} ({reason}); "
        "return numbers, strings, lists or dicts with string keys, and build the rest in __init__"
    )


def _listed(value: Any) -> Any:
    """``value`` with lists for tuples, as in JSON."""
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return {key: _listed(part) for key, part in value.items()} if isinstance(value, dict) else value


def restored_scorer(
    entry: dict[str, Any], tensors: dict[str, Tensor], given: Scorer | type[Scorer] | None, folder: Path
) -> Scorer:
    """The saved scorer. No code is imported: its class is one of patchlife's, or is given by the caller."""
    kind, settings = entry["kind"], entry["settings"]
    if given is None:
        if kind not in SCORERS:
            raise AdapterError(
                f"{folder} was saved with a scorer of kind {kind!r}, which patchlife does not have (it has "
                f"{', '.join(SCORERS)}); give the class that it was saved with: "
                "patchlife.load(folder, vit, scorer=TheClass)"
            )
        given = SCORERS[kind]
    of = given.__name__ if isinstance(given, type) else type(given).__name__
    if getattr(given, "kind", None) != kind:
        raise AdapterError(
            f"{folder} was saved with a scorer of kind {kind!r}, and {of} is of kind {getattr(given, 'kind', None)!r}; "
            "give the class that it was saved with"
        )
    scorer = _made(given, settings, of, folder) if isinstance(given, type) else copy.deepcopy(given)
    if _as_json(scorer) != settings:
        raise AdapterError(
            f"{folder} was saved with {of}'s settings {settings}, and this one has {_as_json(scorer)}; give the class "
            "itself, or an instance with the saved settings"
        )
    try:
        scorer.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"the scorer in {folder} does not fit {of}: {reason}; was the class changed since?"
        ) from None
    return scorer


def _made(kind: type[Scorer], settings: dict[str, Any], of: str, folder: Path) -> Scorer:
    try:
        return kind(**settings)
    except Exception as error:  # the class may be the user's own
        raise AdapterError(
            f"{of} cannot be made with the settings in {folder}, {settings} ({type(error).__name__}: {error}); "
            "settings() must give the arguments of __init__"
        ) from error
