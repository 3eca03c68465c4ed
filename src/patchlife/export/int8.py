"""int8: blocks compute in 8-bit integers; the scorer and merging stay in float.

Processors without VNNI add the products of two neighbouring inputs in 16 bits, and saturate larger sums. So weights are
bounded (see `per_token_int8.py`): those of static int8 have 7 bits. Products of two activations, which have no such
bound, stay in float.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..errors import ExportError
from ..extras import need
from ..runtime.metadata import Format
from .per_token_int8 import PAIR

__all__ = ["integers_of", "quantised_openvino"]

_INTEGERS: dict[tuple[str, str], str] = {
    ("onnx", "int8-dynamic"): (
        "weights of 8 bits, two neighbours at most 128 together; activations of 8 bits, a scale for each token; "
        "products are exact on every x86 and ARM processor"
    ),
    ("openvino", "int8-dynamic"): (
        "weights of 8 bits; OpenVINO rounds activations to 8 bits, a scale for 64 channels of a token, on x86 "
        "processors with VNNI and leaves them in float on those without, so outputs differ between the two"
    ),
    ("openvino", "int8-static"): (
        "weights of 7 bits; activations of 8 bits, one scale for all tokens; products are exact on every x86 processor"
    ),
}


def integers_of(kind: Format, precision: str) -> str:
    """The integer formats of an int8 file, and the processors on which products are exact; empty for float32."""
    return _INTEGERS.get((kind, precision), "")


def quantised_openvino(
    model: Any, floating: list[str], precision: str, calibration: Float[Tensor, "n channels height width"]
) -> Any:
    """An int8 openvino.Model, made by NNCF.

    int8-dynamic rounds the weights; OpenVINO rounds activations at run time (see `OpenVinoSession`). int8-static takes
    the ranges of activations from the calibration images. The nodes named in ``floating`` stay in float.
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
    _check_range([node.data for node in constants if node.get_element_type().get_type_name() == "i8"])
    return quantised


def _check_range(weights: list[np.ndarray]) -> None:
    """Raise ExportError if two weights may be too large to be added exactly without VNNI."""
    largest = max((int(np.abs(weight.astype(int)).max()) for weight in weights), default=0)
    if 2 * largest > PAIR:
        raise ExportError(
            f"NNCF gave weights of up to {largest}, expected at most {PAIR // 2}: outputs would differ on processors "
            "without VNNI; nothing was written, please report NNCF's version"
        )
