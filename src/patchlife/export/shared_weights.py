"""Moves the weights of a bundle's graphs, which are the same at every budget, into one file beside the graphs."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..runtime.bundle import WEIGHTS
from ..runtime.metadata import Format

__all__ = ["WeightsFile", "move_weights"]

_PAGE = 4096  # alignment of weights, so that the file can be mapped into memory; smaller weights use cache lines
_LINE = 64
_SMALL = 1024  # bytes; smaller ONNX constants stay inside the graph


class WeightsFile:
    """A file of weights. Weights that are already in it, byte for byte, are not added again.

    Args:
        path: the file; it is emptied first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offsets = path, dict[bytes, int]()
        path.write_bytes(b"")

    def put(self, weight: bytes) -> int:
        """The offset of ``weight`` in the file, in bytes; it is added if it is not there."""
        key = hashlib.sha256(weight).digest()
        if key not in self.offsets:
            with open(self.path, "ab") as file:
                file.write(bytes(-file.tell() % (_LINE if len(weight) < _PAGE else _PAGE)))
                self.offsets[key] = file.tell()
                file.write(weight)
        return self.offsets[key]


def move_weights(kind: Format, content: bytes, weights: WeightsFile) -> bytes:
    """The content of a graph whose weights were moved to ``weights``: an ONNX graph, or the XML of an OpenVINO file."""
    return _onnx(content, weights) if kind == "onnx" else _openvino(content, weights)


def _onnx(content: bytes, weights: WeightsFile) -> bytes:
    import onnx

    model: Any = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
        size = len(tensor.raw_data)
        if size >= _SMALL:
            offset = weights.put(tensor.raw_data)
            onnx.external_data_helper.set_external_data(tensor, WEIGHTS, offset, size)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    return model.SerializeToString()


def _openvino(content: bytes, weights: WeightsFile) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root, constants = ElementTree.fromstring(archive.read("model.xml")), archive.read("model.bin")
    for data in root.iter("data"):  # OpenVINO stores all constants outside of the XML, small ones too
        if "offset" in data.attrib and "size" in data.attrib:
            start = int(data.attrib["offset"])
            value = constants[start : start + int(data.attrib["size"])]
            data.attrib["offset"] = str(weights.put(value))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
