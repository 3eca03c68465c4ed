"""Export a slimmed model to one file. The file is written only if its outputs equal the model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ..data import Preprocess
from ..data.labels import Labels
from ..errors import ConfigError, ExportError
from ..extras import require_export
from ..io.files import sha256_of, write_atomic
from ..runtime.engine import checksum_file
from ..runtime.metadata import Format, Metadata, metadata_of
from ..runtime.sessions import OpenVinoSession, open_session
from ..runtime.tensor_module import DecisionModule, TensorModule, tensor_module
from ..slimming import Schedule, SlimModel
from .graph import (
    block_names,
    decision_nodes,
    nodes_before,
    onnx_bytes,
    openvino_bytes,
    products_of_activations,
    replace_metadata,
    to_onnx,
    to_openvino,
    to_torch,
    torch_bytes,
    with_plain_weights,
)
from .images import comparison_images, image_size_of
from .int8 import integers_of, quantised_openvino
from .parity import Parity, check_decision, check_int8, check_outputs, hard_cases, sample_images
from .per_token_int8 import quantised_per_token

__all__ = [
    "AGREEMENT",
    "COSINE",
    "FORMATS",
    "TOLERANCE",
    "Exported",
    "Int8",
    "build_and_compare",
    "build_file",
    "check_request",
    "compare_with_model",
    "export",
    "export_graph",
    "with_parity",
    "write_exported",
]

FORMATS: tuple[Format, ...] = ("onnx", "openvino", "torch")
Int8 = Literal["off", "dynamic", "static"]
_INT8_OF: dict[Format, tuple[Int8, ...]] = {
    "onnx": ("off", "dynamic"),
    "openvino": ("off", "dynamic", "static"),
    "torch": ("off",),
}
TOLERANCE = 1e-4
"""Largest difference between a float32 export and the model: of a logit, or of an embedding (see `Parity`)."""
AGREEMENT = 0.98
"""Smallest fraction of the images for which int8 and float32 must predict the same class."""
COSINE = 0.996
"""Smallest mean cosine of int8 and float32 embeddings. On 125 photos, ViT-Tiny with its classifier predicted the same
class for 98.4 % where the cosine of its embeddings was 0.9965, and for 96.0 % where it was 0.9950."""


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        path: the file; its checksum file is beside it.
        metadata: as stored in the file.
        parity: the result of the comparison with the model.
        generated: whether the comparison used generated images, because no photos were given.
    """

    path: Path
    metadata: Metadata
    parity: Parity
    generated: bool


def export(
    model: SlimModel,
    out: str | Path,
    format: Format = "onnx",
    *,
    images: Float[Tensor, "n channels height width"] | None = None,
    calibration: Float[Tensor, "n channels height width"] | None = None,
    labels: Labels | None = None,
    preprocess: Preprocess | None = None,
    image_size: tuple[int, int] | None = None,
    lives: bool = True,
    int8: Int8 = "off",
) -> Exported:
    """Write ``model``, at its budget, as one file that needs neither the model's library nor the backbone's code.

    Its first output is the logits, or for a model without a classifier the embedding. Before the file is written, its
    outputs and lives are compared with the model's at batch 1, 2 and 5, and its decision
    on tied and NaN scores with torch's. The file's sha256 is written beside it.

    Args:
        model: in fixed mode; it is not changed.
        out: the file; an older one is replaced.
        format: onnx; openvino (one zip of its model.xml and model.bin); torch (.pt2, through torch.export).
        images: prepared photos for the comparison; generated images if not given.
        calibration: prepared photos for static int8; ``images`` if not given.
        labels, preprocess: stored in the metadata; the backbone's own if not given.
        image_size: (height, width) in pixels of the images that the file takes; by default that of ``preprocess``, of
            ``images``, or the size that the model is built for. Positions are interpolated as the model does it.
        lives: add a second output, the number of blocks each patch takes part in.
        int8: dynamic (ONNX and OpenVINO) or static (OpenVINO, calibrated on photos). The scorer stays in float. If too
            few images agree, as many of the blocks before the decision as needed stay in float, too.
            ``metadata.integers`` names the processors on which products are exact.

    Raises:
        ConfigError: adaptive mode, a format without this int8, or an image size that the model does not take.
        MissingExtraError: a package for the format is missing; the message is the install line.
        ExportError: the outputs differ from the model's; the message names the first difference.
    """
    check_request(format, int8, images, calibration)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    module = tensor_module(model, lives)
    size = image_size_of(model, image_size, preprocess, images)
    generated = images is None
    images = comparison_images(module, size) if images is None else images
    metadata = export_metadata(module, format, labels, preprocess, int8, size)
    content, metadata, parity = build_and_compare(
        module, metadata, images, images if calibration is None else calibration, generated
    )
    write_exported(path, content)
    return Exported(path, metadata, parity, generated)


def export_metadata(
    module: TensorModule,
    format: Format,
    labels: Labels | None,
    preprocess: Preprocess | None,
    int8: Int8,
    size: tuple[int, int],
) -> Metadata:
    """The metadata of ``module``'s file at its present budget, before the comparison."""
    precision = "fp32" if int8 == "off" else f"int8-{int8}"
    integers = integers_of(format, precision)
    return metadata_of(module.model, format, labels, preprocess, module.lives, precision, integers, size)


def check_request(format: Format, int8: Int8, images: object | None, calibration: object | None = None) -> None:
    """Raise ConfigError for a combination that is not supported, and MissingExtraError for a missing package.

    Called before any work is done. ``images`` and ``calibration`` are only tested for None.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx" and int8 == "static":
        raise ConfigError(
            "int8 for onnx must be off or dynamic, got 'static', which loses too much accuracy there; use --int8 "
            "dynamic, or --format openvino"
        )
    if int8 not in _INT8_OF[format]:
        raise ConfigError(f"int8 for {format} must be {' or '.join(_INT8_OF[format])}, got {int8!r}")
    if int8 == "static" and images is None and calibration is None:
        raise ConfigError("static int8 is calibrated on photos, got none; give some with --photos, or images=")
    require_export(format, int8 != "off")


def build_and_compare(
    module: TensorModule, metadata: Metadata, images: Tensor, calibration: Tensor, generated: bool = False
) -> tuple[bytes, Metadata, Parity]:
    """(content of the file, its metadata, result of the comparison). ``generated``: the images are no photos.

    Dynamic int8 starts with all blocks. While too few images agree, one more block at the front stays in float, up to
    the start block: rounding before the decision changes which patches are dropped, and so the class of one or two
    photos in a hundred. These blocks run on all patches, so each one in float costs speed. Static int8, whose
    calibration is slow, tries only the first and the last of these.

    Raises ExportError if the outputs differ from the model's.
    """
    first_blocks = {"fp32": [0], "int8-dynamic": range(metadata.start + 1), "int8-static": [0, metadata.start]}[
        metadata.precision
    ]
    candidates = [replace(metadata, int8_from=block) for block in first_blocks]
    graph = export_graph(module, metadata)
    for candidate in candidates:
        content = build_file(module, candidate, calibration, graph)
        try:
            parity = compare_with_model(content, module, candidate, images)
        except ExportError:
            if candidate is candidates[-1]:
                raise
            continue
        compared = with_parity(candidate, parity, generated)
        return with_metadata(content, compared, graph), compared, parity
    raise AssertionError("there is always a candidate")


def export_graph(module: TensorModule, metadata: Metadata) -> Any:
    """``module`` as torch's ExportedProgram or an ONNX model, in float32."""
    inputs = {"images": sample_images(2, metadata.channels, metadata.image_size)}
    return to_torch(module, inputs) if metadata.kind == "torch" else to_onnx(module, inputs, metadata.outputs)


def build_file(module: TensorModule, metadata: Metadata, calibration: Tensor, graph: Any = None) -> bytes:
    """The content of the file. ``graph`` is the result of `export_graph`, if it is already available."""
    model = export_graph(module, metadata) if graph is None else graph
    if metadata.kind == "torch":
        return torch_bytes(model, metadata.to_json())
    blocks = block_names(module)
    if metadata.precision != "fp32":
        model = with_plain_weights(model, blocks)
    floating = decision_nodes(model, blocks) + nodes_before(model, blocks[: metadata.int8_from])
    if metadata.kind == "openvino":
        return _openvino(model, floating, metadata, calibration)
    if metadata.precision != "fp32":
        model = quantised_per_token(model, floating)
    return onnx_bytes(model, metadata.to_json())


def with_parity(metadata: Metadata, parity: Parity, generated: bool) -> Metadata:
    """``metadata`` with the result of the comparison."""
    return replace(metadata, parity={**parity.to_dict(), "generated": generated})


def with_metadata(content: bytes, metadata: Metadata, graph: Any) -> bytes:
    """The content of a file with other metadata. ``graph`` is the graph that it was built from (see `export_graph`)."""
    text = metadata.to_json()
    return torch_bytes(graph, text) if metadata.kind == "torch" else replace_metadata(metadata.kind, content, text)


def compare_with_model(
    content: bytes, module: TensorModule, metadata: Metadata, images: Tensor, weights: Path | None = None
) -> Parity:
    """Compare the content of a file with the model. Raises ExportError if the outputs differ too much.

    ``weights`` is the weights file of a bundle (see `shared_weights.py`).
    """
    session = open_session(metadata.kind, content, None, weights)
    minimum = COSINE if module.embeds else AGREEMENT
    if metadata.precision != "fp32":
        parity = check_int8(session, module, images, minimum)
        if metadata.kind != "openvino" or metadata.precision != "int8-dynamic":
            return parity
        without_vnni = OpenVinoSession(content, None, weights, group=0)
        return _worse(parity, check_int8(without_vnni, module, images, minimum))
    schedule = module.model.schedule(metadata.image_size)
    if schedule.drops and metadata.kind != "torch":  # a .pt2 file sorts with the same kernels as the model
        decision = _decision_file(schedule, metadata.grid)
        if metadata.kind == "openvino":
            decision = openvino_bytes(to_openvino(decision), "")
        check_decision(open_session(metadata.kind, decision), schedule, metadata.grid)
    return check_outputs(session, module, images, TOLERANCE)


def _worse(as_here: Parity, without_vnni: Parity) -> Parity:
    """The worse parity of an OpenVINO file: as this processor runs it, or with activations in float."""
    if as_here == without_vnni:  # to the last bit
        return replace(as_here, note="activations were in float, as this processor has no VNNI")
    return min(as_here, without_vnni, key=lambda parity: parity.closeness)


def write_exported(path: Path, content: bytes) -> None:
    """Write the file, then its checksum. After an interruption the old pair is there, or a file without checksum."""
    checksum_file(path).unlink(missing_ok=True)
    write_atomic(path, content)
    write_atomic(checksum_file(path), f"{sha256_of(path)}  {path.name}\n")


@lru_cache(maxsize=4)
def _decision_file(schedule: Schedule, grid: tuple[int, int]) -> bytes:
    """The decision alone as the content of an ONNX file."""
    _, scores = hard_cases(schedule.kept[0])
    model = to_onnx(DecisionModule(schedule, grid).eval(), {"scores": scores[:2]}, ("life", "order", "merge"))
    return onnx_bytes(model, "")


def _openvino(model: Any, floating: list[str], metadata: Metadata, calibration: Tensor) -> bytes:
    converted = to_openvino(onnx_bytes(model, ""))
    if metadata.precision != "fp32":
        if metadata.precision == "int8-static":
            floating = floating + products_of_activations(model)
        converted = quantised_openvino(converted, floating, metadata.precision, calibration)
    return openvino_bytes(converted, metadata.to_json())
