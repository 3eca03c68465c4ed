"""Settings of the command line, one dataclass for each verb. `cli/arguments.py` turns them into options and help texts.

The attribute docstrings are the help texts. The first sentence of a nested group's text is the title of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import ConfigError
from .checks import check_budget, check_whole
from .slimming import MODES, LifeConfig, Mode
from .training import TrainingConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["eager", "compile", "onnx", "openvino"]
ClassOrder = Literal["number", "imagefolder"]
Precision = Literal["float32", "bfloat16", "float16"]

CURVE_BUDGETS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.61, 0.7, 0.8, 0.9, 1.0)
"""The budgets of a curve of accuracy against the budget. At 1.0 a slimmed model is the dense model."""


@dataclass(frozen=True)
class BackboneConfig:
    """The model and its weights.

    Attributes:
        model: Name of a timm model; hf-hub:ORG/NAME (timm's models of the Hugging Face hub) or local-dir:FOLDER (saved
            by timm); hf:ORG/NAME[@REVISION] (transformers' models of the hub) or a FOLDER that transformers saved, with
            config.json, safetensors files and preprocessor_config.json; open_clip:ARCH/TAG, open_clip:ARCH/FILE or
            open_clip:hf-hub:ORG/NAME; the folder of an adapter, or its hf:ORG/NAME; for predict, embed and eval an
            exported file or bundle; or demo, the small model that comes with patchlife.
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
        _check_at_least(1, image_size=self.image_size)


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
        object.__setattr__(self, "life", _checked_life(self.life))


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
        _check_at_least(1, batch_size=self.batch_size, workers=self.workers, threads=self.threads)


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
        _check_at_least(1, part_size=self.part_size)
        if self.ray is None and (self.part_size or self.ordered):
            option = "--part-size" if self.part_size else "--ordered"
            raise ConfigError(f"{option} is about the parts of a run on Ray; add --ray, or remove {option}")
        if self.ray is not None and "://" in self.ray:
            raise ConfigError(
                f"expected HOST:PORT or auto after --ray, got {self.ray}; run the command on a machine of the cluster, "
                "for example with ray job submit"
            )


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
        _check_at_least(1, top=self.top)
        if self.keep_aspect and self.engine not in (None, "eager"):
            raise ConfigError(
                f"--keep-aspect gives images of different sizes, and --engine {self.engine} runs images of one size; "
                "remove one of the two"
            )
        if self.resume and self.out is None:
            raise ConfigError("--resume needs the file to continue, got none; give it with --out FILE")
        _check_dtype(self.engine, self.run.dtype)
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
        _check_at_least(1, max_photos=self.max_photos)
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
        _check_at_least(5, rounds=self.rounds)
        if self.run.dtype != "float32":
            raise ConfigError(f"demo runs in float32, got --dtype {self.run.dtype}; remove --dtype")
        object.__setattr__(self, "life", _checked_life(self.life))


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
        _check_at_least(1, photos=self.photos)
        if self.run.dtype != "float32":
            raise ConfigError(f"tune runs in float32, got --dtype {self.run.dtype}; remove --dtype")


@dataclass(frozen=True)
class EvalConfig:
    """Measure accuracy at several budgets and compare with the dense model, on labelled photos.

    Without labels (all photos in one folder that is not a class), only the agreement with the dense model is measured.
    Of a model without a classifier, the embeddings are measured: by their cosine to those of the dense model, and by
    the accuracy of their nearest neighbours.

    Attributes:
        model: Model and weights.
        data: Folder with one subfolder of photos per class (see --class-order). For a model without a classifier any
            folder of photos; neighbours are compared only if it has several subfolders, whose names are the classes.
        labels_from: CSV file with the columns path and label, which replaces the subfolders. A label is a class name, a
            WordNet id or a class number; for a model without a classifier any text. Several labels of a photo, with
            --multi-label, are separated by ; or |.
        budgets: Budgets, as fractions of the dense model's FLOPs. Default: 1.0,0.8,0.6,0.45; with --curve
            0.3,0.35,0.4,0.45,0.5,0.61,0.7,0.8,0.9,1.0.
        modes: fixed, adaptive, or both as fixed,adaptive.
        every: Use every N-th photo.
        gallery: For a model without a classifier: photos among which the neighbours are searched, with one subfolder
            per class. Default: the photos of DATA themselves, each one left out in turn.
        neighbours: For a model without a classifier: how many neighbours vote for the class of a photo. Default: 10.
        engine: Engine that runs the model. onnx and openvino export the model at each budget on the first run and keep
            the files in a cache folder. Default: eager, or the engine of an exported bundle, whose graph of budget 1 is
            then the dense model.
        trust: Allow opening a .pt2 file (export --format torch). A .pt2 file can run any code: open it only if
            you trust its source.
        out: File for the results (JSON). If matplotlib is installed, a plot is written beside it.
        curve: Draw top-1 and KL divergence from the dense model against the budget: a picture (.png), or a page with
            the numbers in a table (.html). Without labels, the agreement with the dense model replaces top-1.
            Budgets that the model cannot reach are left out and named.
        points: Results of other methods or models to draw beside this model's: files of patchlife bench --data, or of
            eval --out, measured on the same photos.
        run: Device, number format and batches.
    """

    model: ModelConfig
    data: Path
    budgets: tuple[float, ...] = ()
    modes: tuple[str, ...] = field(default=("fixed",), metadata={"metavar": "MODE"})
    every: int = 1
    labels_from: Path | None = field(default=None, metadata={"metavar": "CSV"})
    gallery: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    neighbours: int | None = None
    engine: EngineName | None = None
    trust: bool = False
    out: Path | None = None
    curve: Path | None = None
    points: tuple[Path, ...] = field(default=(), metadata={"metavar": "RESULT"})
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def settings(self) -> list[tuple[float, Mode]]:
        """(budget, mode) for every budget in every mode."""
        return [(budget, cast(Mode, mode)) for mode in self.modes for budget in self.budgets]

    def __post_init__(self) -> None:
        budgets = tuple(self.budgets) or (CURVE_BUDGETS if self.curve else (1.0, 0.8, 0.6, 0.45))
        object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in budgets))
        if self.curve is not None and self.curve.suffix not in (".png", ".html"):
            raise ConfigError(f"--curve must end in .png or .html, got {self.curve}")
        if self.points and not (self.curve or self.out):
            raise ConfigError("--points are drawn in a plot, got none; add --curve FILE.png or FILE.html")
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"modes must be from {', '.join(MODES)}, got {mode!r}")
        if "adaptive" in self.modes and self.engine not in (None, "eager"):
            raise ConfigError(f"--engine {self.engine} runs fixed mode only, got adaptive; remove --engine or adaptive")
        if unused := [name for name in ("budget", "speedup", "kept", "mode") if name in self.model.life]:
            raise ConfigError(f"--{unused[0]} has no effect in eval; give --budgets and --modes instead")
        _check_at_least(1, every=self.every, neighbours=self.neighbours)
        _check_dtype(self.engine, self.run.dtype)


@dataclass(frozen=True)
class BenchConfig(BackboneConfig):
    """Compare this method with baselines on this machine: speed, and accuracy on labelled photos.

    Random weights are enough for speed.

    Attributes:
        data: Folder with one subfolder of photos per class. With it, accuracy is measured too.
        every: Use every N-th photo of --data.
        methods: Methods to compare. Default: all. dense is always included as the reference.
        speed: Measure speed. --no-speed measures accuracy only, on --data.
        batch_sizes: Batch sizes.
        flops: Budgets at which the methods are compared, as fractions of the dense model's FLOPs.
        engine: eager: plain torch. compile: torch.compile for methods with static shapes. onnx, openvino: exported
            graphs on the CPU, for dense, the no-decision bound and patchlife in fixed mode; the other methods are
            listed as left out, with the reason. Exported files are kept in a cache folder (environment variable
            PATCHLIFE_CACHE).
            The dense model is timed in eager mode as well; accuracy is always measured in eager mode.
        dtype: Number format of weights and images.
        rounds: Number of timing rounds; each round times every method once.
        patience: Start no new round after N seconds, for each batch size and budget. At least five rounds are run.
        predictors: Trained predictors of DynamicViT, a safetensors file. Without it, only the speed of DynamicViT is
            measured.
        advice: Also report on how many CPU threads the dense and the slimmed model are fastest, and the fastest
            schedule on this machine at these numbers, or that slimming does not pay. With --data, also report the
            fastest of all budgets and schedules within --max-drop.
        max_drop: Largest loss of top-1 accuracy against the dense model, in percentage points, of the schedule that
            --advice reports.
        report: Draw the report of earlier result files again, without measuring.
        device: Device of the model. auto: a CUDA GPU if there is one, else the CPU.
        out: Folder for the result (JSON), report (HTML) and plot (PNG). Earlier results in it are kept.
    """

    model: str = field(default="", metadata={"positional": True})
    data: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    every: int = 1
    methods: tuple[str, ...] | None = field(default=None, metadata={"metavar": "NAME"})
    speed: bool = True
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    flops: tuple[float, ...] = (0.8, 0.6, 0.45)
    engine: EngineName = "eager"
    dtype: Precision = "float32"
    rounds: int = 20
    patience: float = field(default=120.0, metadata={"metavar": "SECONDS"})
    predictors: Path | None = None
    advice: bool = False
    max_drop: float = field(default=1.0, metadata={"metavar": "POINTS"})
    report: tuple[Path, ...] | None = None
    device: Device = "auto"
    out: Path = field(default=Path("patchlife-bench"), metadata={"metavar": "FOLDER"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == bool(self.report):
            got = "both" if self.model else "neither"
            raise ConfigError(f"expected either a MODEL to measure or result files to draw (--report FILE), got {got}")
        object.__setattr__(self, "flops", tuple(check_budget(fraction, "flops") for fraction in self.flops))
        _check_at_least(1, every=self.every)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if not self.speed and (self.data is None or self.advice) and not self.report:
            raise ConfigError(
                "--no-speed measures accuracy only, which needs labelled photos and gives no advice; add --data FOLDER "
                "and remove --advice, or remove --no-speed"
            )
        if self.engine in ("onnx", "openvino") and (self.dtype != "float32" or self.device not in ("auto", "cpu")):
            raise ConfigError(
                f"--engine {self.engine} runs float32 on the CPU, got {self.dtype} on {self.device}; drop --dtype and "
                "--device, or --engine"
            )
        if not 0 <= self.max_drop <= 100:
            raise ConfigError(f"max_drop must be in percentage points, 0 to 100, got {self.max_drop:g}")
        if self.rounds < 5:
            raise ConfigError(f"rounds must be at least 5, got {self.rounds}")


def _check_at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {value}")


def _check_is_path(out: Path | str | None, cluster: ClusterConfig) -> None:
    """Raise ConfigError if one process would write to an address."""
    if isinstance(out, str) and cluster.ray is None:
        raise ConfigError(f"one process writes to a file of this machine, got --out {out}; give a path, or add --ray")


def _check_dtype(engine: EngineName | None, dtype: Precision) -> None:
    if dtype != "float32" and engine not in (None, "eager"):
        raise ConfigError(f"--engine {engine} runs in float32, got --dtype {dtype}; remove one of the two")


def _checked_life(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `LifeConfig` stores them. Raises ConfigError for invalid ones, before a model is built."""
    checked = LifeConfig.from_dict(settings)
    alternatives = [name for name in ("budget", "speedup", "kept") if settings.get(name) is not None]
    if len(alternatives) > 1:
        raise ConfigError(f"{' and '.join(alternatives)} are alternatives; give only one of them")
    return {name: value if name == "speedup" else getattr(checked, name) for name, value in settings.items()}
