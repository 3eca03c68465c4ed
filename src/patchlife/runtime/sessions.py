"""Sessions: one call that runs a graph, arrays in and arrays out. `Engine` gives the arrays their meaning."""

from __future__ import annotations

import io
import os
import zipfile
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..extras import need
from .compiled import compile_separately
from .metadata import KEY, Format, metadata_in

__all__ = ["ModuleSession", "OnnxSession", "OpenVinoSession", "Session", "engine_version", "open_session"]

Arrays = list[np.ndarray]

_GROUP = 64  # the width of an attention head; it divides the width of nearly every Vision Transformer
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # an option of ONNX Runtime


class Session(ABC):
    """Runs one graph. ``metadata_json`` is the metadata text found in its file; empty if there is none."""

    metadata_json: str = ""

    @abstractmethod
    def run(self, *inputs: np.ndarray) -> Arrays:
        """The graph's outputs, in their order."""


class OnnxSession(Session):
    """ONNX Runtime on the CPU."""

    def __init__(self, content: bytes, threads: int | None = None, weights: Path | None = None) -> None:
        ort = need("onnxruntime", "running an ONNX file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", _allow_spinning())
        if weights:  # the graph holds the file's name, but not its folder
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.parent))
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.metadata_json = self.session.get_modelmeta().custom_metadata_map.get(KEY, "")
        self.inputs = [i.name for i in self.session.get_inputs()]

    def run(self, *inputs: np.ndarray) -> Arrays:
        """The graph's outputs, in their order."""
        return self.session.run(None, dict(zip(self.inputs, inputs, strict=True)))


class OpenVinoSession(Session):
    """OpenVINO on the CPU, in float32; by default OpenVINO computes in bfloat16 where the processor can.

    Args:
        content: of the file: a zip, or with ``weights`` the model's XML.
        threads: CPU threads; torch's number of threads if not given.
        weights: the file that holds the weights of a bundle.
        group: where weights are int8 and activations are not, OpenVINO rounds activations at run time, with one scale
            per ``group`` channels of a token, so a large token or channel does not enlarge the steps of the others.
            Only processors with VNNI do this. 0 computes as the other processors do, with activations in float.
    """

    def __init__(
        self, content: bytes, threads: int | None = None, weights: Path | None = None, group: int = _GROUP
    ) -> None:
        ov = need("openvino", "running an OpenVINO file")
        core = ov.Core()
        if weights:
            model = core.read_model(content, weights.read_bytes())
        else:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                self.metadata_json = metadata_in(archive)
                model = core.read_model(archive.read("model.xml"), archive.read("model.bin"))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, *inputs: np.ndarray) -> Arrays:
        """The graph's outputs, in their order."""
        results = self.request.infer(list(inputs), share_inputs=True)
        return [results[index].copy() for index in range(len(results))]


class ModuleSession(Session):
    """A torch module on its own device, eager or compiled."""

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.module = compile_separately(module) if compiled else module

    @torch.no_grad()
    def run(self, *inputs: np.ndarray) -> Arrays:
        """The module's outputs, in their order."""
        outputs = self.module(*(torch.from_numpy(array).to(self.device) for array in inputs))
        return [output.cpu().numpy() for output in outputs]


class TorchSession(ModuleSession):
    """A program saved by torch.export."""

    def __init__(self, content: bytes, threads: int | None = None, weights: Path | None = None) -> None:
        extra = {f"{KEY}.json": ""}
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        self.metadata_json = extra[f"{KEY}.json"]
        super().__init__(program.module())


def open_session(kind: Format, content: bytes, threads: int | None = None, weights: Path | None = None) -> Session:
    """The session for the content of a file.

    Args:
        kind: of engine.
        content: of the file.
        threads: torch's number of threads if not given; .pt2 files run in torch and ignore it.
        weights: the file that holds the weights of a bundle; ``content`` is then an ONNX graph, or OpenVINO's XML.
    """
    sessions: dict[Format, Any] = {"onnx": OnnxSession, "openvino": OpenVinoSession, "torch": TorchSession}
    return sessions[kind](content, threads, weights)


def _allow_spinning() -> str:
    """The ONNX Runtime option for idle threads, from OpenMP's wait policy: spinning threads slow down shared cores."""
    return "0" if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else "1"


def engine_version(engine: str) -> dict[str, str]:
    """{package: version} of an engine; empty if torch itself runs the model."""
    package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(engine)
    return {package: version(package)} if package else {}
