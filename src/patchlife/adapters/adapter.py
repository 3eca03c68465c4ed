"""Life adapters on disk: what was decided or learned about a backbone, never the unchanged backbone itself.

A folder of ``adapter.json`` (settings, which backbone), ``adapter.safetensors`` (scorer, calibration, change of the
backbone) and ``SHA256SUMS`` (checked before anything is opened; safetensors itself loads flipped bits without a word).
"""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..backbones import Origin, adapt, rebuild, signature
from ..backbones.identity import differences
from ..backbones.weight_delta import Change, change_since, merged
from ..config import LifeConfig
from ..errors import AdapterError, shortened
from ..io.files import check_sums, recover, replace_folder, sha256_of, steadily
from ..slimming.calibration import Calibration
from ..slimming.model import SlimModel
from ..slimming.regressor import LifeRegressor
from ..slimming.scorers import AttentionRule, LifeHead
from ..version import __version__

__all__ = ["FORMAT", "check_free", "load", "read_adapter", "save"]

FORMAT = 2
SCORERS: dict[str, type[LifeHead]] = {scorer.kind: scorer for scorer in (AttentionRule, LifeRegressor)}
_JSON, _TENSORS = "adapter.json", "adapter.safetensors"


def save(model: SlimModel, folder: str | Path) -> Path:
    """Write ``model``'s adapter; an adapter that stands there is replaced in one step or stays whole.

    Weights of the backbone that were trained after it was wrapped are saved whole, in their own precision: as large as
    they are. What `fit` changes is small. The backbone itself is never saved.

    Raises AdapterError, before anything is written, when ``folder`` exists and is something else, when the backbone's
    parts are other ones than when it was wrapped, and when the scorer cannot be saved.
    """
    folder = Path(folder)
    check_free(folder)
    scorer: LifeHead = getattr(model.scorer, "_orig_mod", model.scorer)  # inside torch.compile's wrapper
    entry = _scorer_entry(scorer)
    change = change_since(model.backbone, model.base, model.change)
    about = {
        "format": FORMAT,
        "patchlife": __version__,
        "config": model.config.to_dict() | {"start": model.start, "drops": list(model.drops)},
        "scorer": entry,
        "calibrations": {patches: calibration.images for patches, calibration in model.calibrations.items()},
        "backbone": change.base if change else model.base,
        "classes": change.classes if change else None,
        "origin": model.origin.to_dict() if model.origin else None,
    }
    tensors = {f"scorer.{k}": v for k, v in scorer.state_dict().items()}
    for patches, calibration in model.calibrations.items():
        tensors |= {f"calibration.{patches}.{k}": v for k, v in calibration.tensors().items()}
    tensors |= {f"change.{k}": v for k, v in (change.tensors if change else {}).items()}
    with replace_folder(folder) as fresh:
        (fresh / _JSON).write_text(_text(about))
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}  # tied weights, too
        (fresh / _TENSORS).write_bytes(to_bytes(own))
    return folder


def load(
    folder: str | Path, vit: nn.Module | None = None, scorer: LifeHead | type[LifeHead] | None = None
) -> SlimModel:
    """The slimmed model that was saved in ``folder``; a change that it makes to ``vit`` goes into a copy.

    Args:
        folder: as `save` wrote it.
        vit: the backbone. Without it the backbone is built again from where it came from (timm name and file).
        scorer: for a scorer that patchlife does not know: its class, which is called with the saved settings, or an
            instance, of which a copy gets the saved weights.

    The scorer is frozen and in eval mode; ``model.scorer.requires_grad_(True)`` goes on learning it.

    Raises AdapterError when the adapter is damaged, of another format, or was made for another backbone or scorer.
    """
    folder = Path(folder)
    about, tensors = read_adapter(folder)
    judge = _restored(about["scorer"], _under("scorer.", tensors), scorer, folder)
    if vit is None:
        vit = _rebuild(about, folder)
    backbone, parts = adapt(vit), _under("change.", tensors)
    change = Change(parts, about["backbone"], about["classes"]) if parts or about["classes"] is not None else None
    _check_same(about["backbone"], signature(backbone), change, folder)
    if change:
        backbone = adapt(merged(vit, change.tensors, change.classes))
    judge.to(next(vit.parameters()).device)
    model = SlimModel(backbone, LifeConfig.from_dict(about["config"]), judge)
    judge.eval().requires_grad_(False)
    model.origin = Origin(**about["origin"]) if about["origin"] else None
    model.change = change
    for patches, images in about["calibrations"].items():
        tables = _under(f"calibration.{patches}.", tensors)
        model.use_calibration(Calibration(**tables, images=images, patches=int(patches)))
    return model


def check_free(folder: Path) -> None:
    """Raise AdapterError unless `save` may write to ``folder``: an adapter, an empty folder, or nothing."""
    recover(folder)
    if folder.exists() and not (folder / _JSON).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AdapterError(f"{folder} exists and is not a patchlife adapter; it was left alone, choose another folder")


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what ``adapter.json`` says, tensors), after the checksums were verified.

    Raises AdapterError when the folder is no adapter, is damaged, or is of another format.
    """
    return steadily(folder, lambda: _read(Path(folder)))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / _JSON).is_file():
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no {_JSON}")
    files = check_sums(folder, AdapterError)
    if not {_JSON, _TENSORS} <= files.keys():
        raise AdapterError(f"{folder}'s checksums do not cover {_JSON} and {_TENSORS}; save or download it again")
    about = json.loads(files[_JSON].read_text())
    if about["format"] > FORMAT:
        raise AdapterError(
            f"{folder} was written by patchlife {about['patchlife']} in format {about['format']}; this is "
            f"{__version__}, which reads format {FORMAT}: pip install -U patchlife"
        )
    if about["format"] < FORMAT:
        raise AdapterError(
            f"{folder} is in format {about['format']}, which cannot tell its backbone from a similar one; patchlife "
            f"{__version__} reads format {FORMAT}. Fit it again; or run recipes/resign.py of patchlife's repository, "
            "once, with the backbone's file"
        )
    return about, load_file(files[_TENSORS])


def _text(about: dict[str, Any]) -> str:
    """JSON for people, too: a line for each weight of the backbone."""
    weights, place = about["backbone"]["weights"], f"weights {uuid.uuid4()}"
    lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(found)}" for name, found in weights.items())
    rest = about | {"backbone": about["backbone"] | {"weights": place}}
    return json.dumps(rest, indent=2).replace(json.dumps(place), f"{{\n{lines}\n    }}") + "\n"


# ---- the scorer


def _scorer_entry(scorer: LifeHead) -> dict[str, Any]:
    """Kind and settings for ``adapter.json``. Raises AdapterError for what could not be loaded again."""
    of = type(scorer).__name__
    kind = getattr(scorer, "kind", None)
    if not isinstance(kind, str):
        raise AdapterError(f"{of} has no kind, so no adapter can name it; give the class one: kind = 'my-scorer'")
    if SCORERS.get(kind, type(scorer)) is not type(scorer):
        raise AdapterError(
            f"{of} has the kind {kind!r}, which is {SCORERS[kind].__name__}'s; give the class one of its own: "
            "kind = 'my-scorer'"
        )
    other = [name for name, value in scorer.state_dict().items() if not isinstance(value, Tensor)]
    if other:
        raise AdapterError(f"{of}'s state_dict holds more than tensors ({shortened(other)}); move that into settings()")
    return {"kind": kind, "settings": _as_json(scorer)}


def _as_json(scorer: LifeHead) -> dict[str, Any]:
    """The scorer's settings as JSON gives them back. Raises AdapterError for settings that it would change."""
    said: dict[str, Any] = {}
    for name, value in scorer.settings().items():
        try:
            said[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise _no_json(scorer, name, value, str(error)) from None
        if said[name] != _listed(value):
            raise _no_json(scorer, name, value, "it would come back as another one")
    return said


def _no_json(scorer: LifeHead, name: str, value: Any, reason: str) -> AdapterError:
    return AdapterError(
        f"{type(scorer).__name__}.settings() must give values that JSON can hold, got {name}={value!r} ({reason}); "
        "give numbers, strings, lists or dicts with string keys, and make the rest in __init__"
    )


def _listed(value: Any) -> Any:
    """With lists for tuples, as in JSON."""
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return {key: _listed(part) for key, part in value.items()} if isinstance(value, dict) else value


def _restored(
    entry: dict[str, Any], tensors: dict[str, Tensor], given: LifeHead | type[LifeHead] | None, folder: Path
) -> LifeHead:
    """The saved scorer. No code is imported for it: its class is one of patchlife's, or is given."""
    kind, settings = entry["kind"], entry["settings"]
    if given is None:
        if kind not in SCORERS:
            raise AdapterError(
                f"{folder} was saved with a scorer of kind {kind!r}, and patchlife itself has {', '.join(SCORERS)}; "
                "give the class that it was saved with: patchlife.load(folder, vit, scorer=TheClass)"
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


def _made(kind: type[LifeHead], settings: dict[str, Any], of: str, folder: Path) -> LifeHead:
    try:
        return kind(**settings)
    except Exception as error:  # the class may be anybody's
        raise AdapterError(
            f"{of} cannot be made with the settings in {folder}, {settings} ({type(error).__name__}: {error}); "
            "settings() must give the arguments of __init__"
        ) from error


# ---- the backbone


def _check_same(saved: dict[str, Any], found: dict[str, Any], change: Change | None, folder: Path) -> None:
    """Raise AdapterError unless these are the weights that the adapter belongs to."""
    told = differences(saved, found, ignored=change.replaced if change else ())
    if not told:
        return
    name = saved["name"] or saved["family"]
    if all(part.endswith("has other values") for part in told):
        raise AdapterError(
            f"{folder} was made for other weights of {name}: {shortened(told)}; load the checkpoint it was fitted on, "
            "or fit a new adapter"
        )
    raise AdapterError(
        f"{folder} is for {name} and does not fit: this backbone is {found['name'] or found['family']} "
        f"({shortened(told)})"
    )


def _rebuild(about: dict[str, Any], folder: Path) -> nn.Module:
    """The backbone from where it came from. Raises AdapterError if that is not known, or another file lies there."""
    origin = about["origin"]
    if origin is None:
        raise AdapterError(f"{folder} does not know where its backbone comes from; pass the model: load(folder, vit)")
    file = origin["checkpoint"]
    if not file and not origin["pretrained"]:
        raise AdapterError(
            f"{folder} needs the backbone {origin['model']} and does not say where its weights are; "
            "pass the model: load(folder, vit)"
        )
    if file and not Path(file).is_file():
        raise AdapterError(
            f"{folder} needs the backbone {origin['model']} from {file}, which is not there; "
            "give its place with --checkpoint, or pass the model: load(folder, vit)"
        )
    if file and origin["sha256"] not in (None, sha256_of(file)):
        raise AdapterError(
            f"{file} is not the file that {folder} was made for (sha256 {origin['sha256'][:12]}..., found "
            f"{sha256_of(file)[:12]}...); put that one back, or pass the model: load(folder, vit)"
        )
    return rebuild(Origin(**origin))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
