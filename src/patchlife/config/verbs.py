"""Settings of the command line, one dataclass for each verb. `cli/arguments.py` makes options and help texts of them.

The attribute docstrings are the help texts. The verbs that measure are in `measuring.py`, those that listen on a port
in `services.py`, and what several verbs share is in `groups.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .checks import check_at_least, check_budget
from .groups import ClusterConfig, Device, EngineName, ModelConfig, RunConfig, check_dtype, checked_life
from .slimming import LifeConfig
from .training import TrainingConfig


@dataclass(frozen=True)
class PredictConfig:
    """Classify photos; write one JSON line or row per photo, in the order of the paths.

    Attributes:
        model: Model and weights.
        paths: Photos, folders or glob patterns, also at addresses such as s3://BUCKET/photos; Parquet tables with the
            paths of photos in the column path; shards (*.tar). In folders, all JPEG, PNG and WEBP files are used.
        out: File for the JSON lines, or for a table if its name ends in .parquet. A table is complete when the run
            ends; until then the results are in a JSON lines file beside it. Default: JSON lines on standard output.
        resume: Continue an interrupted --out file. Photos that have a line in the file are skipped, also if the line is
            an error; delete such lines of a JSON lines file to retry these photos.
        top: Number of classes to report per photo.
        labelled: Report the top-1 accuracy, or the mean average precision with --multi-label. Each photo is in the
            folder of its class (see --class-order).
        labels_from: CSV file with the columns path and label, which replaces the folders of --labelled. A label is a
            class name, a WordNet id or a class number. Several labels of a photo, with --multi-label, are separated by
            ; or |.
        engine: Engine that runs the model. onnx and openvino export the model on the first run and keep the file in a
            cache folder (environment variable PATCHLIFE_CACHE). Default: eager, or the engine of an exported file or
            bundle.
        keep_aspect: Photos keep their own shape. Each is scaled to as many pixels as the model's input has, at most,
            and cut to whole patches, less than one at each edge; photos of different sizes run together. Position
            embeddings are interpolated for each size. For models of timm, the demo, adapters on them, and models of
            transformers that interpolate.
        trust: Allow opening a .pt2 file (export --format torch). A .pt2 file can run any code: open it only if
            you trust its source.
        cluster: Many machines (extra ray).
        run: Device, number format and batches.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path | str | None = field(default=None, metadata={"address": True})
    resume: bool = False
    top: int = 5
    labelled: bool = False
    labels_from: Path | None = field(default=None, metadata={"metavar": "CSV"})
    engine: EngineName | None = None
    keep_aspect: bool = False
    trust: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_at_least(1, top=self.top)
        if self.keep_aspect and self.engine not in (None, "eager"):
            raise ConfigError(
                f"--keep-aspect gives images of different sizes, and --engine {self.engine} runs images of one size; "
                "remove one of the two"
            )
        if self.resume and self.out is None:
            raise ConfigError("--resume needs the file to continue, got none; give it with --out FILE")
        check_dtype(self.engine, self.run.dtype)
        if self.cluster.ray is not None and self.out is None:
            raise ConfigError("--ray writes a folder of parts, got none; give it with --out FOLDER")
        _check_is_path(self.out, self.cluster)
        if self.out is not None and Path(self.out).suffix == ".npy":
            raise ConfigError("predictions are not written to .npy files, only embeddings are; give .jsonl or .parquet")


@dataclass(frozen=True)
class EmbedConfig:
    """Compute the embeddings of photos, for retrieval or as features, and write them to a .parquet or .npy file.

    The embedding is the vector that the classifier reads. For a model without a classifier it is the output.

    Attributes:
        model: Model and weights.
        paths: Photos, folders, glob patterns, addresses, tables and shards; as for predict.
        out: Output file, complete when the run ends. .parquet: a table with the columns path, embedding, flops,
            fraction_of_dense, error and run. .npy: an array with a row per photo; a .jsonl file beside it has the other
            columns. Until the run ends, the results are in a JSON lines file beside it.
        resume: Continue an interrupted run. Photos that it has done are skipped, also those with an error.
        normalize: Scale each embedding to length 1, so that the product of two is their cosine.
        keep_aspect: Photos keep their own shape; as for predict.
        trust: Allow opening a .pt2 file (export --format torch). A .pt2 file can run any code: open it only if
            you trust its source.
        cluster: Many machines (extra ray).
        run: Device, number format and batches.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path | str = field(default=Path("embeddings.parquet"), metadata={"address": True})
    resume: bool = False
    normalize: bool = False
    keep_aspect: bool = False
    trust: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        suffix = Path(self.out).suffix
        _check_is_path(self.out, self.cluster)
        if self.cluster.ray is not None and suffix == ".npy":
            raise ConfigError(f"--ray writes a folder of .parquet or .jsonl files, got {self.out}; give another --out")
        if self.cluster.ray is None and suffix not in (".parquet", ".npy"):
            raise ConfigError(f"--out must end in .parquet or .npy, got {self.out}")


@dataclass(frozen=True)
class ExportConfig:
    """Export a slimmed model to one file for ONNX Runtime, OpenVINO or torch, verified against the model.

    Attributes:
        model: Model and weights.
        out: File to write, or folder for a bundle. A file with SHA-256 checksums is written too. Default: a name made
            of model, budget and format.
        budgets: Write a bundle instead of a file: a folder with one graph per budget and shared weights (onnx,
            openvino). Replaces --budget.
        format: onnx; openvino (a zip of model.xml and model.bin); or torch (.pt2, which can run code when it is opened:
            predict and eval need --trust for it). All compute in float32, unless --int8 is given.
        lives: Add a second output to the file: the life of each patch, in blocks.
        int8: Compute the blocks in 8-bit integers and the scorer in float. dynamic (onnx, openvino): one scale per
            token, computed at run time. static (openvino): one scale per tensor, measured on --photos. If too few
            predictions agree with the float model, blocks before the decision stay in float: with dynamic as many as
            necessary, with static all of them. Integer products are exact on every processor, but dynamic in OpenVINO
            rounds activations only on processors with VNNI.
        photos: Photos, folders or glob patterns. They calibrate int8, and the exported file is compared with the model
            on them. Default: generated images for the comparison.
        max_photos: Use at most N of the --photos, evenly spaced over their list.
        labelled: Also report the top-1 accuracy of the model and of the file. Each of the --photos is in the folder of
            its class (see --class-order).
    """

    model: ModelConfig
    out: Path | None = None
    budgets: tuple[float, ...] | None = None
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    lives: bool = True
    int8: Literal["off", "dynamic", "static"] = "off"
    photos: tuple[Path, ...] | None = field(default=None, metadata={"metavar": "PATH"})
    max_photos: int = 64
    labelled: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, max_photos=self.max_photos)
        if self.budgets is not None:
            object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in self.budgets))
        single = [f"--{name}" for name in ("budget", "speedup", "kept") if name in self.model.life]
        if self.budgets and single:
            raise ConfigError(f"--budgets sets the budgets of a bundle, got {single[0]} as well; give one of the two")
        if self.labelled and not self.photos:
            raise ConfigError("labelled needs photos, got none; give --photos PATH")


@dataclass(frozen=True)
class DrawConfig:
    """Draw life maps: the life of every patch, over the photo.

    Attributes:
        model: Model and weights.
        paths: Photos, folders or glob patterns.
        out: Folder for the pictures; created if missing.
        strip: Also draw which patches are kept at five blocks, from the first to the last.
        sheet: Also draw contact sheets of all life maps, each with the predicted class.
        whole: Draw the whole photo, with the part outside the model's crop dimmed.
        width: Width of a life map in pixels.
        run: Device, number format and batches.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path = field(default=Path("patchlife-pictures"), metadata={"metavar": "FOLDER"})
    strip: bool = False
    sheet: bool = False
    whole: bool = False
    width: int = field(default=480, metadata={"metavar": "PIXELS"})
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class InfoConfig:
    """Show the structure of a model, its FLOPs and what slimming saves.

    Attributes:
        model: Model and weights. Random weights are enough.
        json: Print JSON instead of text.
    """

    model: ModelConfig
    json: bool = False


@dataclass(frozen=True)
class DemoConfig:
    """Compare the dense and the slimmed demo model on photos that come with patchlife; write a report.

    Attributes:
        out: Folder for the report and its pictures; created if missing.
        rounds: Number of timing rounds; each round times the dense and the slimmed model once.
        life: How the model is slimmed.
        run: Device, number format and batches.
    """

    out: Path = field(default=Path("patchlife-demo"), metadata={"metavar": "FOLDER"})
    rounds: int = 20
    life: dict[str, Any] = field(default_factory=dict, metadata={"settings_of": LifeConfig})
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_at_least(5, rounds=self.rounds)
        if self.run.dtype != "float32":
            raise ConfigError(f"demo runs in float32, got --dtype {self.run.dtype}; remove --dtype")
        object.__setattr__(self, "life", checked_life(self.life))


@dataclass(frozen=True)
class FitConfig:
    """Train an adapter (scorer and, optionally, weight deltas) on photos, without labels.

    Attributes:
        model: Model and weights.
        data: Photos, folders or glob patterns; WebDataset shards (*.tar, read in place, not unpacked); timm data sets
            as timm:NAME[:SPLIT[:ROOT]].
        out: Folder for the adapter. Repeat the same command to continue an interrupted fit. A fit with other settings
            in the same folder is refused (see --restart).
        validation: Labelled photos for measuring accuracy during training; they are not trained on. Each FOLDER has one
            subfolder per class (see --class-order). For a model without a classifier the cosine to the dense embedding
            and the accuracy of nearest neighbours are measured. At most 500 photos of each FOLDER are used, evenly
            spaced.
        device: Device of the training. auto: a CUDA GPU if there is one, else the CPU.
        training: Training.
    """

    model: ModelConfig
    data: tuple[str, ...]
    out: Path = field(default=Path("patchlife-adapter"), metadata={"metavar": "FOLDER"})
    validation: tuple[str, ...] = field(default=(), metadata={"metavar": "FOLDER"})
    device: Device = "auto"
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class TuneConfig:
    """Search where patches are dropped at each budget, on unlabelled photos, without training; write an adapter.

    Prints a table: for each budget the distance from the dense model before and after. A scorer and a weight delta of
    MODEL stay as they are.

    Attributes:
        model: Model and weights.
        paths: Photos, folders or glob patterns. Labels are not used.
        out: Folder for the adapter.
        photos: Number of photos, drawn at random.
        scorer: What scores the patches of a MODEL without a learned scorer. solved: a life regressor whose parameters
            are solved for on the photos, without training. rule: the attention rule.
        seed: Seed of the draw.
        budgets: Budgets to search for, as fractions of the dense model's FLOPs; others have the shape of the nearest.
        run: Device, number format and batches.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path = field(default=Path("patchlife-adapter"), metadata={"metavar": "FOLDER"})
    photos: int = 256
    scorer: Literal["solved", "rule"] = "solved"
    seed: int = 0
    budgets: tuple[float, ...] = (0.3, 0.35, 0.4, 0.45, 0.5, 0.61, 0.7, 0.8, 0.9)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in self.budgets))
        check_at_least(1, photos=self.photos)
        if self.run.dtype != "float32":
            raise ConfigError(f"tune runs in float32, got --dtype {self.run.dtype}; remove --dtype")


def _check_is_path(out: Path | str | None, cluster: ClusterConfig) -> None:
    """Raise ConfigError if one process would write to an address."""
    if isinstance(out, str) and cluster.ray is None:
        raise ConfigError(f"one process writes to a file of this machine, got --out {out}; give a path, or add --ray")
