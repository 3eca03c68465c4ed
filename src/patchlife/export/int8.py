"""Blocks in 8-bit integers; the life head and the merging of heirs stay in float.

Processors without VNNI add the products of two neighbouring inputs in 16 bits and cut larger sums off. So weights are
bounded (see `rows.py`): static ones have 7 bits, and products of two activations, which nothing bounds, stay in float.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..errors import ExportError
from ..extras import need
from ..runtime.metadata import Format
from .per_token_int8 import PAIR, quantised_per_token

__all__ = ["integers_of", "quantised_onnx", "quantised_openvino"]

_ROWS = "weights of 8 bits, two neighbours at most 128 together; activations of 8 bits, a scale for each token"
_STATIC = "weights of 7 bits; activations of 8 bits, one scale for all tokens"
_INTEGERS: dict[tuple[str, str], str] = {
    ("onnx", "int8-dynamic"): f"{_ROWS}; products are exact on every x86 and ARM processor",
    ("onnx", "int8-static"): f"{_STATIC}; products are exact on every x86 and ARM processor",
    ("openvino", "int8-dynamic"): (
        "weights of 8 bits; OpenVINO rounds activations to 8 bits, a scale for 64 channels of a token, on x86 "
        "processors with VNNI and leaves them in float on those without, so answers differ between the two"
    ),
    ("openvino", "int8-static"): f"{_STATIC}; products are exact on every x86 processor",
}
_OPERATIONS = ["MatMul", "Gemm"]  # with constant weights; products of activations stay in float


def integers_of(kind: Format, precision: str) -> str:
    """The form of an int8 file's integers, and on which processors their products are exact; empty for float32."""
    return _INTEGERS.get((kind, precision), "")


def quantised_onnx(
    content: bytes, floating: list[str], precision: str, calibration: Float[Tensor, "n channels height width"]
) -> Any:
    """An ONNX file's content as an int8 onnx.ModelProto.

    Weights are rounded per channel. ``precision`` says how activations are: int8-dynamic finds each token's range anew
    in each run, int8-static takes one for all from the calibration images. ``floating`` names nodes to leave alone.

    On the ViT-Tiny of timm, whose tokens differ in size tens of times, static names another class for three in ten
    of the photos, with the blocks before the decision in float or not; dynamic for 2 and 1 in a hundred.
    """
    import onnx

    if precision == "int8-dynamic":
        return quantised_per_token(onnx.load_from_string(content), floating)
    quantize = need("onnxruntime.quantization", "int8 for ONNX")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        quantize.quantize_static(
            source,
            target,
            _reader(quantize.CalibrationDataReader, calibration),
            quant_format=quantize.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATIONS,
            nodes_to_exclude=floating,
            per_channel=True,
            weight_type=quantize.QuantType.QInt8,
            reduce_range=True,  # weights of 7 bits
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(target)
    whole = (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2)
    _check_range([onnx.numpy_helper.to_array(tensor) for tensor in whole], "ONNX Runtime")
    return model


def quantised_openvino(
    model: Any, floating: list[str], precision: str, calibration: Float[Tensor, "n channels height width"]
) -> Any:
    """An int8 openvino.Model, through NNCF.

    int8-dynamic rounds the weights; activations are OpenVINO's to round as it runs (see `OpenVinoSession`).
    int8-static takes their ranges from the calibration images. ``floating`` names nodes to leave alone.
    """
    nncf = need("nncf", "int8 for OpenVINO")
    nncf.set_log_level(logging.ERROR)
    ignored = nncf.IgnoredScope(names=floating, validate=False)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        if precision == "int8-dynamic":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
        quantised = nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in calibration.numpy()]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            ignored_scope=ignored,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),  # 7 bits
        )
    constants = (node for node in quantised.get_ops() if node.get_type_name() == "Constant")
    _check_range([node.data for node in constants if node.get_element_type().get_type_name() == "i8"], "NNCF")
    return quantised


def _check_range(weights: list[np.ndarray], quantiser: str) -> None:
    """Raise ExportError where two weights may be larger together than every processor adds exactly."""
    largest = max((int(np.abs(weight.astype(int)).max()) for weight in weights), default=0)
    if 2 * largest > PAIR:
        raise ExportError(
            f"{quantiser} gave weights of up to {largest}, expected at most {PAIR // 2}: processors without VNNI would "
            "give other answers; nothing was written, please report its version"
        )


def _reader(base: type, images: Tensor) -> Any:
    """Images one by one, as ONNX Runtime asks for them."""

    class Reader(base):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(images.numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
