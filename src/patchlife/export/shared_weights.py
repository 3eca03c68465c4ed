"""Graphs of one model at several budgets hold the same weights: here they move into one file beside the graphs."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..runtime.bundle import WEIGHTS
from ..runtime.metadata import Format

__all__ = ["WeightsFile", "detached"]

_PAGE = 4096  # where weights begin, so that a file can be mapped into memory; what is smaller begins at a cache line
_LINE = 64
_SMALL = 1024  # bytes; less than that stays inside the graph


class WeightsFile:
    """A file to which weights are added; what is there already, to the byte, is not added again.

    Args:
        path: the file; made anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.places = path, dict[bytes, int]()
        path.write_bytes(b"")

    def put(self, weight: bytes) -> int:
        """Where ``weight`` lies in the file, in bytes from its beginning."""
        key = hashlib.sha256(weight).digest()
        if key not in self.places:
            with open(self.path, "ab") as file:
                file.write(bytes(-file.tell() % (_LINE if len(weight) < _PAGE else _PAGE)))
                self.places[key] = file.tell()
                file.write(weight)
        return self.places[key]


def detached(kind: Format, content: bytes, weights: WeightsFile) -> bytes:
    """A graph without its weights, which are now in ``weights``: ONNX from an ONNX file's content, or OpenVINO's XML
    from its zip.
    """
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
    for data in root.iter("data"):  # OpenVINO keeps all constants outside, small ones too
        if "offset" in data.attrib and "size" in data.attrib:
            start = int(data.attrib["offset"])
            value = constants[start : start + int(data.attrib["size"])]
            data.attrib["offset"] = str(weights.put(value))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
