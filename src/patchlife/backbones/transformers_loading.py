"""Building a model of transformers from a folder or from the Hugging Face hub, and reading its image processor.

Weights come from safetensors files only, and code of a model's repository is never run. A weight that the files do not
hold is an error: transformers would draw it at random.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, shortened
from ..extras import need
from .transformers import adapt
from .transformers_files import CONFIG, check_files, checked_settings, first_line, folder_of, has_processor
from .transformers_models import CORES, HEADS, REFUSED, SUPPORTED
from .transformers_towers import reason_of

__all__ = ["build_transformers", "processor_of"]

_TOWERS = {  # class of a checkpoint: the class of the part that is built, prefixes of the weights that are left out
    "CLIPModel": ("CLIPVisionModelWithProjection", ("text_model.", "text_projection.", "logit_scale")),
    "SiglipModel": ("SiglipVisionModel", ("text_model.", "logit_scale", "logit_bias")),
    "ViTMAEForPreTraining": ("ViTMAEModel", ("decoder.",)),
    "ViTForMaskedImageModeling": ("ViTModel", ("decoder.",)),
    "DeiTForMaskedImageModeling": ("DeiTModel", ("decoder.",)),
}


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
    settings, kind = checked_settings(name, folder)
    built, left_out = _TOWERS.get(kind, (kind, ()))
    check_files(name, folder)
    with _quiet(transformers):
        config = _config(transformers, name, folder, settings, kind, built)
        if built not in (*CORES, *HEADS):
            _refuse(getattr(transformers, built), name, settings)
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
    if not has_processor(folder):
        raise CheckpointError(
            f"hf:{name} has no preprocessor_config.json, so it is not known how photos become its input; save its "
            "image processor into its folder: AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )
    try:
        with _quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        return processor.to_dict()
    except Exception as error:  # transformers raises several kinds
        raise CheckpointError(f"the image processor of hf:{name} cannot be read: {first_line(error)}") from None


# ---- the model


def _config(transformers: Any, name: str, folder: Path, settings: Mapping[str, Any], kind: str, built: str) -> Any:
    """The configuration of the part that is built. Raises UnsupportedModelError if transformers does not know it."""
    if not _is_model_class(transformers, built):
        code = "code of its own repository, which is never run" if settings.get("auto_map") else "another version"
        raise UnsupportedModelError(
            f"hf:{name}: transformers {transformers.__version__} has no class {built}: the model needs {code}. "
            f"Supported: {SUPPORTED}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises several kinds
        raise UnsupportedModelError(f"hf:{name}: {CONFIG} cannot be read: {first_line(error)}") from None
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"hf:{name} has quantised weights ({CONFIG} has a quantization_config); give the model in float32, float16 "
            "or bfloat16, or load it in Python and wrap it: patchlife.wrap(model)"
        )
    if kind in ("CLIPModel", "SiglipModel"):
        width = getattr(config, "projection_dim", None)
        config = config.vision_config
        config.projection_dim = width  # the model's own setting; the tower's copy may differ from it
    if built == "ViTMAEModel":
        config.mask_ratio = 0.0
    return config


def _is_model_class(transformers: Any, name: str) -> bool:
    """Whether transformers has a class of models of this name. Nothing else that a file names is ever called."""
    found = getattr(transformers, name, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _refuse(built: type[nn.Module], name: str, settings: Mapping[str, Any]) -> NoReturn:
    """Raise UnsupportedModelError with the reason why this class is not supported."""
    what = f"hf:{name} is a {built.__name__} ({settings.get('model_type')})"
    if "vision_config" in settings:
        raise UnsupportedModelError(
            f"{what}, a model of images and text. Its vision tower can be slimmed in Python: load the model, and wrap "
            f"the tower in its place with patchlife.wrap. Supported here: {SUPPORTED}, CLIPModel, SiglipModel"
        )
    if not {"patch_size", "image_size", "num_channels"} & settings.keys():
        raise UnsupportedModelError(f"{what}, which takes no images; give a Vision Transformer. Supported: {SUPPORTED}")
    reason = reason_of([kind.__name__ for kind in built.__mro__], REFUSED)
    why = f"; patches of this model cannot be dropped: {reason}" if reason else ", which is not supported"
    raise UnsupportedModelError(f"{what}{why}. Supported: {SUPPORTED}")


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
            f"the weights of hf:{name} are not readable ({first_line(error)}); is the download complete?"
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
    if size is None and has_processor(folder):
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
