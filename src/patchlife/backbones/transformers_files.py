"""The files of a model of transformers: its folder or download, its settings, its weights.

Weights are safetensors files only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError, shortened
from ..io.files import sha256_of

__all__ = [
    "CONFIG",
    "check_files",
    "check_transformers_name",
    "checked_settings",
    "first_line",
    "folder_of",
    "has_processor",
    "is_transformers_folder",
    "weights_sha256",
]

CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PEFT = "adapter_config.json"
_INDEX = f"{_WEIGHTS}.index.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_FILES = [CONFIG, *_PROCESSORS, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
_FILES += ["adapter.json", "adapter.safetensors", "SHA256SUMS"]  # of an adapter, which has none of the others


# ---- names


def is_transformers_folder(path: str) -> bool:
    """Whether a folder has a ``config.json`` as transformers writes it."""
    settings = _settings(Path(path))
    return isinstance(settings, dict) and ("model_type" in settings or "architectures" in settings)


def check_transformers_name(name: str) -> str:
    """The absolute path of a folder, or the name of a model of the hub.

    Raises CheckpointError for anything else.
    """
    folder = Path(name)
    if folder.is_dir():
        return str(folder.resolve())
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", name):
        raise CheckpointError(
            f"hf:{name}: expected a folder, or ORG/NAME of the Hugging Face hub; there is no such folder"
        )
    return name


def folder_of(name: str) -> Path:
    """The folder of a model; a model of the hub is downloaded. Raises CheckpointError if it cannot be."""
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    return Path(_downloaded(repository, revision or None))


@functools.cache
def _downloaded(repository: str, revision: str | None) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    name = f"hf:{repository}" + (f"@{revision}" if revision else "")
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_FILES)
    except errors.GatedRepoError:
        advice = "its access is restricted: accept the terms on its page, then log in with: hf auth login"
    except errors.RevisionNotFoundError:
        advice = f"it has no revision {revision}"
    except errors.RepositoryNotFoundError:
        advice = "the hub has no public model of this name; check it, or log in with: hf auth login"
    except Exception as error:  # the hub client raises many kinds
        advice = (
            f"{first_line(error)}; check the network. Without network: copy the folder of the model and give hf:FOLDER"
        )
    raise CheckpointError(f"{name} could not be loaded: {advice}")


def _settings(folder: Path) -> Any:
    """The content of ``config.json``; None if it is missing or damaged."""
    try:
        return json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def checked_settings(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """(the content of ``config.json``, the class of the checkpoint)."""
    settings = _settings(folder)
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"hf:{name}: expected a folder of transformers with {CONFIG}, got "
            f"{'other content in' if (folder / CONFIG).is_file() else 'no'} {CONFIG}"
        )
    if (folder / _PEFT).is_file():  # transformers would apply it where peft is installed, and ignore it elsewhere
        raise UnsupportedModelError(
            f"hf:{name} holds an adapter of peft ({_PEFT}) beside the model; merge it and save the result: "
            "peft.PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER), or remove it"
        )
    kinds = settings.get("architectures")
    if "architecture" in settings and not kinds:
        give = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
        raise UnsupportedModelError(f"hf:{name} is a model of timm, not of transformers; give {give}")
    if not isinstance(kinds, list) or not kinds:
        raise CheckpointError(
            f"hf:{name}: {CONFIG} does not name the class of the model; expected architectures as save_pretrained "
            "writes it"
        )
    return settings, str(kinds[0])


def check_files(name: str, folder: Path) -> None:
    """Raise CheckpointError unless the folder holds all files of its weights, as safetensors."""
    if (folder / _WEIGHTS).is_file():
        return
    if (folder / _INDEX).is_file():
        if missing := [file for file in _shards(name, folder) if not (folder / file).is_file()]:
            raise CheckpointError(
                f"hf:{name}: {_INDEX} names {shortened(missing)}, which is not there; copy it as well"
            )
        return
    others = sorted(file.name for pattern in ("*.bin", "*.h5", "*.msgpack", "*.pt*") for file in folder.glob(pattern))
    has = f"only {', '.join(others[:3])}" if others else "no weights"
    raise CheckpointError(
        f"hf:{name} has no {_WEIGHTS}, {has}. Pickles such as pytorch_model.bin are not opened, because that can run "
        "code; if you trust the file, convert it once: AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER), with "
        "the class of the model"
    )


def _shards(name: str, folder: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        names = {
            Path(str(file)).name for file in json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"hf:{name}: {_INDEX} is damaged or missing; copy it again") from None
    return sorted(names)


def weights_sha256(name: str) -> str | None:
    """A checksum of the weights in a folder; None for a model of the hub.

    For several files it is the checksum of the lines that sha256sum prints for them.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    if (folder / _WEIGHTS).is_file():
        return sha256_of(folder / _WEIGHTS)
    lines = "".join(f"{sha256_of(folder / file)}  {file}\n" for file in _shards(name, folder))
    return hashlib.sha256(lines.encode()).hexdigest()


def has_processor(folder: Path) -> bool:
    """Whether a folder holds the settings of an image processor."""
    return any((folder / file).is_file() for file in _PROCESSORS)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or else its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
