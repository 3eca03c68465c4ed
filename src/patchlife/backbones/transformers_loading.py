"""Building a model of transformers from a folder or from the Hugging Face hub, and reading its image processor.

Weights come from safetensors files only, and code of a model's repository is never run. A weight that the files do not
hold is an error: transformers would draw it at random.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, shortened
from ..extras import need
from ..io.files import sha256_of
from .transformers import adapt
from .transformers_models import CORES, HEADS, SUPPORTED

__all__ = [
    "build_transformers",
    "check_transformers_name",
    "folder_of",
    "is_transformers_folder",
    "processor_of",
    "weights_sha256",
]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_FILES = [_CONFIG, *_PROCESSORS, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
_FILES += ["adapter.json", "adapter.safetensors", "SHA256SUMS"]  # of an adapter, which has none of the others

_TOWERS = {  # class of a checkpoint: the class of the part that is built, prefixes of the weights that are left out
    "CLIPModel": ("CLIPVisionModelWithProjection", ("text_model.", "text_projection.", "logit_scale")),
    "SiglipModel": ("SiglipVisionModel", ("text_model.", "logit_scale", "logit_bias")),
    "ViTMAEForPreTraining": ("ViTMAEModel", ("decoder.",)),
    "ViTForMaskedImageModeling": ("ViTModel", ("decoder.",)),
    "DeiTForMaskedImageModeling": ("DeiTModel", ("decoder.",)),
}


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


def build_transformers(name: str, image_size: int | None) -> nn.Module:
    """The model of a folder or of the hub, in float32, for images of ``image_size`` (else of its image processor).

    Of a checkpoint of CLIP or SigLIP the image tower is built. ViTMAE is built as an encoder, without masking.

    Raises:
        UnsupportedModelError: not a Vision Transformer whose patches can be dropped.
        CheckpointError: files or weights are missing or damaged.
        ConfigError: images of this size cannot be cut into patches.
        MissingExtraError: transformers is not installed.
    """
    transformers = need("transformers", f"hf:{name}")
    folder = folder_of(name)
    settings, kind = _checked_settings(name, folder)
    built, left_out = _TOWERS.get(kind, (kind, ()))
    _check_files(name, folder)
    with _quiet(transformers):
        config = _config(transformers, name, folder, settings, kind, built)
        if built not in (*CORES, *HEADS):
            _refuse(transformers, name, config, settings, built)
        model = _loaded(getattr(transformers, built), name, folder, config, left_out)
    model.name_or_path = Path(name.partition("@")[0]).name if Path(name).is_dir() else name
    _set_image_size(model, name, folder, image_size)
    return model


def processor_of(name: str) -> Mapping[str, Any]:
    """The settings of a model's image processor, with the defaults of its class.

    Raises CheckpointError for a model without an image processor.
    """
    transformers = need("transformers", f"hf:{name}")
    folder = folder_of(name)
    if not any((folder / file).is_file() for file in _PROCESSORS):
        raise CheckpointError(
            f"hf:{name} has no {_PROCESSORS[0]}, so it is not known how photos become its input; save its image "
            "processor into its folder: AutoImageProcessor.from_pretrained(ORIGINAL_MODEL).save_pretrained(FOLDER)"
        )
    try:
        with _quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        return processor.to_dict()
    except Exception as error:  # transformers raises several kinds
        raise CheckpointError(f"the image processor of hf:{name} cannot be read: {_first_line(error)}") from None


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


# ---- files


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
            f"{_first_line(error)}; check the network. Without network: copy the folder of the model and give hf:FOLDER"
        )
    raise CheckpointError(f"{name} could not be loaded: {advice}")


def _settings(folder: Path) -> Any:
    """The content of ``config.json``; None if it is missing or damaged."""
    try:
        return json.loads((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _checked_settings(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """(the content of ``config.json``, the class of the checkpoint)."""
    settings = _settings(folder)
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"hf:{name}: expected a folder of transformers with {_CONFIG}, got "
            f"{'other content in' if (folder / _CONFIG).is_file() else 'no'} {_CONFIG}"
        )
    kinds = settings.get("architectures")
    if "architecture" in settings and not kinds:
        give = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
        raise UnsupportedModelError(f"hf:{name} is a model of timm, not of transformers; give {give}")
    if not isinstance(kinds, list) or not kinds:
        raise CheckpointError(
            f"hf:{name}: {_CONFIG} does not name the class of the model; expected architectures as save_pretrained "
            "writes it"
        )
    return settings, str(kinds[0])


def _check_files(name: str, folder: Path) -> None:
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


# ---- the model


def _config(transformers: Any, name: str, folder: Path, settings: Mapping[str, Any], kind: str, built: str) -> Any:
    """The configuration of the part that is built. Raises UnsupportedModelError if transformers does not know it."""
    if not hasattr(transformers, built):
        code = "code of its own repository, which is never run" if settings.get("auto_map") else "another version"
        raise UnsupportedModelError(
            f"hf:{name}: transformers {transformers.__version__} has no class {built}: the model needs {code}. "
            f"Supported: {SUPPORTED}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises several kinds
        raise UnsupportedModelError(f"hf:{name}: {_CONFIG} cannot be read: {_first_line(error)}") from None
    if kind in ("CLIPModel", "SiglipModel"):
        width = getattr(config, "projection_dim", None)
        config = config.vision_config
        config.projection_dim = width  # the model's own setting; the tower's copy may differ from it
    if built == "ViTMAEModel":
        config.mask_ratio = 0.0
    return config


def _refuse(transformers: Any, name: str, config: Any, settings: Mapping[str, Any], built: str) -> None:
    """Raise UnsupportedModelError with the reason why this class is not supported."""
    what = f"hf:{name} is a {built} ({settings.get('model_type')})"
    if "vision_config" in settings:
        raise UnsupportedModelError(
            f"{what}, a model of images and text. Its vision tower can be slimmed in Python: load the model, and wrap "
            f"the tower in its place with patchlife.wrap. Supported here: {SUPPORTED}, CLIPModel, SiglipModel"
        )
    if not {"patch_size", "image_size", "num_channels"} & settings.keys():
        raise UnsupportedModelError(f"{what}, which takes no images; give a Vision Transformer. Supported: {SUPPORTED}")
    with torch.device("meta"):
        adapt(getattr(transformers, built)(config))
    raise UnsupportedModelError(f"{what}, which is not supported. Supported: {SUPPORTED}")


def _loaded(kind: Any, name: str, folder: Path, config: Any, left_out: Collection[str]) -> Any:
    """The model with the weights of the folder. Raises CheckpointError unless they are exactly those of the model."""
    try:
        model, found = kind.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights of hf:{name} are not readable ({_first_line(error)}); is the download complete?"
        ) from None
    missing = sorted(found["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None  # the checkpoint was saved without it: the embedding is the class token
        missing = []
    extra = sorted(key for key in found["unexpected_keys"] if not key.startswith(tuple(left_out)))
    extra = [key for key in extra if not key.startswith("pooler.")]  # a classifier does not read it
    shapes = [f"{key} {tuple(own)} for {tuple(wanted)}" for key, own, wanted in found["mismatched_keys"]]
    _check_complete(name, kind.__name__, missing, extra, shapes)
    damaged = [key for key, value in model.state_dict().items() if not _is_finite(value)]
    if damaged:
        raise CheckpointError(f"hf:{name} holds NaN or infinite weights in {shortened(damaged, 8)}")
    return model


def _check_complete(name: str, kind: str, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    lists = (("missing", missing), ("not of this model", extra), ("of another shape", shapes))
    problems = [f"{what}: {shortened(keys, 8)}" for what, keys in lists if keys]
    if not problems:
        return
    hint = ""
    if any("classifier" in key for key in missing):
        hint = ". A classifier that is not in the file would be random: give a fine-tuned model"
    raise CheckpointError(f"the weights of hf:{name} do not fit {kind}: {'; '.join(problems)}{hint}")


def _set_image_size(model: Any, name: str, folder: Path, image_size: int | None) -> None:
    """Store the image size that the model is run at, if it is not the one of its position embeddings."""
    backbone = adapt(model)
    size = None if image_size is None else (image_size, image_size)
    if size is None and any((folder / file).is_file() for file in _PROCESSORS):
        size = _size_of_processor(name)
    if size is None or size == backbone.image_size:
        return
    (rows, cols), own = backbone.patch_size, backbone.trained_size
    source = "image_size" if image_size else "its image processor's size"
    if not backbone.any_size:
        raise ConfigError(
            f"hf:{name}: {source} must be {own[0]} x {own[1]}, because transformers interpolates square tables of "
            f"positions only, got {size[0]} x {size[1]}"
        )
    if size[0] % rows or size[1] % cols:
        fix = "" if image_size else "; give --image-size"
        raise ConfigError(
            f"hf:{name}: {source} must be a multiple of the patches' {rows} x {cols} pixels, got {size[0]} x {size[1]}"
            f"{fix}"
        )
    backbone.set_image_size(size)


def _size_of_processor(name: str) -> tuple[int, int]:
    from ..data import Preprocess

    return Preprocess.from_image_processor(processor_of(name)).size


# ---- steps


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and reports of missing weights, which `_check_complete` reports itself."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
