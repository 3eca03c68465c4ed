"""Blocks in 8-bit integers; the life head and the merging of heirs stay in float."""

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

from .extras import need
from .rows import by_rows

__all__ = ["quantised_onnx", "quantised_openvino"]

_OPERATIONS = ["MatMul", "Gemm"]  # with constant weights; products of activations stay in float


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
        return by_rows(onnx.load_from_string(content), floating)
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
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(target)


def quantised_openvino(
    model: Any, floating: list[str], precision: str, calibration: Float[Tensor, "n channels height width"]
) -> Any:
    """An int8 openvino.Model, through NNCF.

    int8-dynamic rounds the weights; activations are OpenVINO's to round as it runs (see `OpenVinoRunner`).
    int8-static takes their ranges from the calibration images.
    """
    nncf = need("nncf", "int8 for OpenVINO")
    nncf.set_log_level(logging.ERROR)
    ignored = nncf.IgnoredScope(names=floating, validate=False)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        if precision == "int8-dynamic":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
        return nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in calibration.numpy()]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            ignored_scope=ignored,
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
