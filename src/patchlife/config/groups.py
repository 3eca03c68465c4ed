"""Settings that several verbs share: the model, how it runs, on which machines. Each is a group of options in the help.

As in `verbs.py`, the attribute docstrings are the help texts. The first sentence of a class is the title of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .checks import check_at_least, check_whole
from .slimming import LifeConfig

__all__ = [
    "BackboneConfig",
    "ClassOrder",
    "ClusterConfig",
    "Device",
    "EngineName",
    "ModelConfig",
    "Precision",
    "RunConfig",
    "check_dtype",
    "checked_life",
]

Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["eager", "compile", "onnx", "openvino"]
ClassOrder = Literal["number", "imagefolder"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BackboneConfig:
    """The model and its weights.

    Attributes:
        model: Name of a timm model; hf-hub:ORG/NAME (timm's models of the Hugging Face hub) or local-dir:FOLDER (saved
            by timm); hf:ORG/NAME[@REVISION] (transformers' models of the hub) or a FOLDER that transformers saved, with
            config.json, safetensors files and preprocessor_config.json; open_clip:ARCH/TAG, open_clip:ARCH/FILE or
            open_clip:hf-hub:ORG/NAME; the folder of an adapter, or its hf:ORG/NAME; for predict, embed, eval, explore
            and serve an exported file or bundle; or demo, the small model that comes with patchlife.
        checkpoint: Weights of the backbone, a safetensors file, for a name of timm or open_clip:ARCH. For an adapter:
            the present path of that file, or a folder of transformers with the same weights. The number of classes and
            the image size are read from the file.
        pretrained: Use the weights that timm provides for this name; they are downloaded once. Models of a hub or
            folder always bring their weights.
        model_args: Arguments of the timm model, such as global_pool=avg, in_chans=1 (photos are converted to grey),
            img_size=384 or img_size=256,128 (height, width). Default for an adapter: the arguments saved in it.
        labels: Text file with the names of the classes, one per line. Default: the names that the model has, else the
            ImageNet names for a model of 1000 classes.
        class_order: How folder names of labelled photos map to classes. number: the name is the number of the class.
            imagefolder: any names; the classes are the folders in text order (0, 1, 10, 11, 2, ...), as torchvision's
            ImageFolder numbers them in training. Default: the name is the class name or its WordNet id, or the number
            of the class if the classes have no names.
        image_size: Height and width in pixels that photos are resized to. Position embeddings are interpolated.
            Default: the size of the model's image processor (transformers), else of the checkpoint's position
            embeddings, else of the model.
    """

    model: str
    checkpoint: Path | None = None
    pretrained: bool = False
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"metavar": "NAME=VALUE"})
    labels: Path | None = None
    class_order: ClassOrder | None = None
    image_size: int | None = field(default=None, metadata={"metavar": "PIXELS"})

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", check_whole(self.image_size, "image_size"))
        check_at_least(1, image_size=self.image_size)


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The model, its weights and how it is slimmed.

    Attributes:
        multi_label: A photo can have several classes or none. The probability of a class is the sigmoid of its logit,
            and accuracy is the mean average precision. Default: as the model says, if it does.
        life: How the model is slimmed. Default for an adapter: the settings saved in it.
    """

    multi_label: bool = False
    life: dict[str, Any] = field(default_factory=dict, metadata={"settings_of": LifeConfig})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "life", checked_life(self.life))


@dataclass(frozen=True)
class RunConfig:
    """Device, number format, batch size and photo reading.

    Attributes:
        device: Device of the model. auto: a CUDA GPU if there is one, else the CPU.
        dtype: Number format of weights and images. bfloat16 and float16 are for GPUs; on many CPUs they are slower.
        batch_size: Photos per batch.
        workers: Threads that read photos. Default: one per CPU core, at most 8.
        threads: CPU threads of the model. Default: the environment variable OMP_NUM_THREADS, else as many as torch
            chooses; demo chooses the fastest number. bench --advice measures which number is fastest.
        progress: Show a progress bar. Default: only on a terminal.
    """

    device: Device = "auto"
    dtype: Precision = "float32"
    batch_size: int = 16
    workers: int | None = None
    threads: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size, workers=self.workers, threads=self.threads)


@dataclass(frozen=True)
class ClusterConfig:
    """Many machines (extra ray).

    Attributes:
        ray: Run on Ray, with one worker per GPU, or per --threads CPU cores where there is no GPU. ADDRESS is that of a
            running cluster, HOST:PORT, or auto for the cluster of this machine; without it, a cluster of this machine's
            cores is started and ended. Each worker uses one CPU thread if --threads is not given. --out is then a
            folder, or its address. Its files are parts: the results of consecutive photos, Parquet if the name of the
            folder ends in .parquet, JSON lines if it ends otherwise (embed: only if it ends in .jsonl). Each part is
            complete or absent, and --resume computes those that are absent.
        part_size: Photos per part, rounded up to whole batches. Default: at most 1024, and about four parts per worker.
        ordered: Write the parts in their order. Default: as they are done.
    """

    ray: str | None = field(default=None, metadata={"metavar": "ADDRESS", "alone": "local"})
    part_size: int | None = field(default=None, metadata={"metavar": "PHOTOS"})
    ordered: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, part_size=self.part_size)
        if self.ray is None and (self.part_size or self.ordered):
            option = "--part-size" if self.part_size else "--ordered"
            raise ConfigError(f"{option} is about the parts of a run on Ray; add --ray, or remove {option}")
        if self.ray is not None and "://" in self.ray:
            raise ConfigError(
                f"expected HOST:PORT or auto after --ray, got {self.ray}; run the command on a machine of the cluster, "
                "for example with ray job submit"
            )


def check_dtype(engine: EngineName | None, dtype: Precision) -> None:
    """Raise ConfigError for another number format than float32 with an engine that has only this one."""
    if dtype != "float32" and engine not in (None, "eager"):
        raise ConfigError(f"--engine {engine} runs in float32, got --dtype {dtype}; remove one of the two")


def checked_life(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `LifeConfig` stores them. Raises ConfigError for invalid ones, before a model is built."""
    checked = LifeConfig.from_dict(settings)
    alternatives = [name for name in ("budget", "speedup", "kept") if settings.get(name) is not None]
    if len(alternatives) > 1:
        raise ConfigError(f"{' and '.join(alternatives)} are alternatives; give only one of them")
    return {name: value if name == "speedup" else getattr(checked, name) for name, value in settings.items()}
