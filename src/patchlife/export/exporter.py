"""Export a slimmed model to a file that runs elsewhere, and prove that it answers alike before the file is there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from ..runtime.describe import describe
from ..runtime.engine import sum_file
from ..runtime.metadata import Format, Metadata
from ..runtime.sessions import OpenVinoSession, open_session
from ..runtime.tensor_module import Decision, TensorModule, tensor_module
from ..slimming import Schedule, SlimModel
from .graph import (
    decision_nodes,
    described,
    nodes_before,
    openvino_bytes,
    products_of_activations,
    redescribed,
    to_onnx,
    to_openvino,
    to_torch,
    torch_bytes,
    with_plain_weights,
)
from .int8 import integers_of, quantised_onnx, quantised_openvino
from .parity import Parity, check_decision, check_int8, check_outputs, hard_cases, sample_images

__all__ = ["AGREEMENT", "FORMATS", "TOLERANCE", "Exported", "Int8", "built", "export", "proved", "write_exported"]

FORMATS: tuple[Format, ...] = ("onnx", "openvino", "torch")
Int8 = Literal["off", "dynamic", "static"]
TOLERANCE = 1e-4
"""Largest difference of a logit between a float32 export and the model."""
AGREEMENT = 0.98
"""Least fraction of the photos for which int8 names the same class."""


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: the file; its sha256 lies beside it.
        metadata: what it says about itself.
        parity: how close it came to the model. generated: on generated images, as no photos were given.
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
    lives: bool = True,
    int8: Int8 = "off",
) -> Exported:
    """Write ``model``, at its budget, as one file that needs neither timm nor the backbone's code.

    Before anything is written, logits and lives are compared with the model's own, at batch 1, 2 and 5, and the
    decision on ties and NaN. The file's sha256 is written beside it.

    Args:
        model: in fixed mode; it is not changed.
        out: the file; an older one is replaced.
        format: onnx; openvino (one zip of its model.xml and model.bin); torch (.pt2, through torch.export).
        images: prepared photos to compare on; generated ones if not given.
        calibration: prepared photos for int8; ``images`` if not given.
        labels, preprocess: what the file says about classes and input; the backbone's own if not given.
        lives: give the file a second output, how many blocks each patch lives.
        int8: dynamic or static (calibrated on the images), ONNX and OpenVINO. The life head stays in float, and so
            do as many of the first blocks as it takes for enough images to agree. ``metadata.integers`` says on which
            processors the products are exact.

    Raises:
        ConfigError: adaptive mode, or a format that has no such int8.
        MissingExtraError: a package for the format is missing; the message is the install line.
        ExportError: the graph does not answer as the model does, with the place where it first differs.
    """
    check_request(format, int8, images, calibration)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    module = tensor_module(model, lives)
    generated = images is None
    if images is None:
        backbone = module.model.backbone
        images = sample_images(8, backbone.channels, backbone.image_size)
    precision = "fp32" if int8 == "off" else f"int8-{int8}"
    metadata = describe(module.model, format, labels, preprocess, lives, precision, integers_of(format, precision))
    content, metadata, parity = proved(
        module, metadata, images, images if calibration is None else calibration, generated
    )
    write_exported(path, content)
    return Exported(path, metadata, parity, generated)


def check_request(format: Format, int8: Int8, images: object | None, calibration: object | None = None) -> None:
    """Refuse what no engine does, and ask for missing packages, before any work.

    Of photos and calibration photos it matters only whether there are any.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    kinds = ("off",) if format == "torch" else ("off", "dynamic", "static")
    if int8 not in kinds:
        raise ConfigError(f"{format} files come with int8 {' or '.join(kinds)}, got {int8!r}")
    if int8 == "static" and images is None and calibration is None:
        raise ConfigError("static int8 is calibrated on photos, got none; give some with --photos, or images=")
    require_export(format, int8 != "off")


def proved(
    module: TensorModule, metadata: Metadata, images: Tensor, calibration: Tensor, generated: bool = False
) -> tuple[bytes, Metadata, Parity]:
    """(the content of the file, what it says about itself, how close it comes to the model).

    ``generated`` says that the images are no photos.

    Dynamic int8 takes every block or, while too few images agree, one block less at the front, until it begins at the
    decision: rounding before that changes which patches die, and with them the class of a photo or two in a hundred.
    Those blocks run on all patches, so each of them that stays in float costs speed. Static int8, which takes long to
    calibrate, tries the first and the last of these.

    Raises ExportError where it does not come close enough.
    """
    blocks = {"fp32": [0], "int8-dynamic": range(metadata.start + 1), "int8-static": [0, metadata.start]}[
        metadata.precision
    ]
    forms = [replace(metadata, int8_from=block) for block in blocks]
    graph = exported_graph(module, metadata)
    for form in forms:
        content = built(module, form, calibration, graph)
        try:
            parity = checked(content, module, form, images)
        except ExportError:
            if form is forms[-1]:
                raise
            continue
        form = with_parity(form, parity, generated)
        return restated(content, form, graph), form, parity
    raise AssertionError("there is no form to export")


def exported_graph(module: TensorModule, metadata: Metadata) -> Any:
    """``module`` as torch or ONNX writes it down, before anything is done to it."""
    backbone = module.model.backbone
    inputs = {"images": sample_images(2, backbone.channels, backbone.image_size)}
    return to_torch(module, inputs) if metadata.kind == "torch" else to_onnx(module, inputs, metadata.outputs)


def built(module: TensorModule, metadata: Metadata, calibration: Tensor, graph: Any = None) -> bytes:
    """The content of the file; ``graph`` is `exported_graph`'s, if it is there already."""
    model = exported_graph(module, metadata) if graph is None else graph
    if metadata.kind == "torch":
        return torch_bytes(model, metadata.to_json())
    if metadata.precision != "fp32":
        model = with_plain_weights(model)
    floating = decision_nodes(model) + nodes_before(model, metadata.int8_from)
    if metadata.kind == "openvino":
        return _openvino(model, floating, metadata, calibration)
    if metadata.precision != "fp32":
        model = quantised_onnx(described(model, ""), floating, metadata.precision, calibration)
    return described(model, metadata.to_json())


def with_parity(metadata: Metadata, parity: Parity, generated: bool) -> Metadata:
    """A description that says how close the graph came to the model."""
    return replace(metadata, parity={**asdict(parity), "generated": generated})


def restated(content: bytes, metadata: Metadata, graph: Any) -> bytes:
    """The content of a file with another description; ``graph`` is what it was made of (see `exported_graph`)."""
    text = metadata.to_json()
    return torch_bytes(graph, text) if metadata.kind == "torch" else redescribed(metadata.kind, content, text)


def checked(
    content: bytes, module: TensorModule, metadata: Metadata, images: Tensor, weights: Path | None = None
) -> Parity:
    """How close a file's content comes to the model. Raises ExportError where it does not come close enough.

    ``weights`` is the file that holds them where they are not inside (see `sharing.py`).
    """
    session = open_session(metadata.kind, content, None, weights)
    if metadata.precision != "fp32":
        parity = check_int8(session, module, images, AGREEMENT)
        if metadata.kind != "openvino" or metadata.precision != "int8-dynamic":
            return parity
        return _without_vnni(parity, check_int8(OpenVinoSession(content, None, weights, 0), module, images, AGREEMENT))
    schedule = module.model.schedule()
    if schedule.drops and metadata.kind != "torch":  # torch sorts a .pt2 with the very kernels that eager does
        decision = _decision(schedule, metadata.grid)
        if metadata.kind == "openvino":
            decision = openvino_bytes(to_openvino(decision), "")
        check_decision(open_session(metadata.kind, decision), schedule, metadata.grid)
    return check_outputs(session, module, images, TOLERANCE)


def _without_vnni(here: Parity, plain: Parity) -> Parity:
    """The less close of an OpenVINO file's two ways to run: as this processor does it, and with plain activations."""
    if here == plain:  # to the last bit
        return replace(here, note="activations were in float, as this processor has no VNNI")
    return min(here, plain, key=lambda parity: parity.agreement)


def write_exported(path: Path, content: bytes) -> None:
    """Write the file and its sum. An interruption leaves the old pair, or a file that says it is not whole."""
    sum_file(path).unlink(missing_ok=True)
    write_atomic(path, content)
    write_atomic(sum_file(path), f"{sha256_of(path)}  {path.name}\n")


@lru_cache(maxsize=4)
def _decision(schedule: Schedule, grid: tuple[int, int]) -> bytes:
    """The decision alone as an ONNX file's content, exported as the whole was."""
    _, scores = hard_cases(schedule.kept[0])
    program = to_onnx(Decision(schedule, grid).eval(), {"scores": scores[:2]}, ("life", "order", "merge"))
    return described(program, "")


def _openvino(model: Any, floating: list[str], metadata: Metadata, calibration: Tensor) -> bytes:
    converted = to_openvino(described(model, ""))
    if metadata.precision != "fp32":
        if metadata.precision == "int8-static":
            floating = floating + products_of_activations(model)
        converted = quantised_openvino(converted, floating, metadata.precision, calibration)
    return openvino_bytes(converted, metadata.to_json())
