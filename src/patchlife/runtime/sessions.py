"""Whatever can run a graph, behind one call: arrays in, arrays out. What the arrays mean is `engines.py`'s."""

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
from .compiled import compiled_alone
from .metadata import KEY, Format, metadata_in

__all__ = ["ModuleSession", "OnnxSession", "Session", "engine_version", "open_session"]

Arrays = list[np.ndarray]

_GROUP = 64  # divides the width of nearly every Vision Transformer: it is a head's
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # ONNX Runtime's name for it


class Session(ABC):
    """Runs one graph. ``description`` is the text found in its file; empty where there is none."""

    description: str = ""

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
        options.add_session_config_entry("session.intra_op.allow_spinning", _spinning())
        if weights:  # by a name that the graph knows, in a folder that it does not
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.parent))
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.description = self.session.get_modelmeta().custom_metadata_map.get(KEY, "")
        self.inputs = [i.name for i in self.session.get_inputs()]

    def run(self, *inputs: np.ndarray) -> Arrays:
        """The graph's outputs, in their order."""
        return self.session.run(None, dict(zip(self.inputs, inputs, strict=True)))


class OpenVinoSession(Session):
    """OpenVINO on the CPU, in float32: left alone it computes in bfloat16 where the processor can.

    Where a file's weights are int8 and its activations are not, it rounds them as it runs: a scale for 64 channels of
    a token, so that neither a large token nor a large channel costs the others their steps. Only processors with VNNI
    do so; ``group`` 0, instead of those 64 channels, computes as the others do.
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
                self.description = metadata_in(archive)
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
    """A torch module where it stands, as it is or compiled."""

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.module = compiled_alone(module) if compiled else module

    @torch.no_grad()
    def run(self, *inputs: np.ndarray) -> Arrays:
        """The module's outputs, in their order."""
        outputs = self.module(*(torch.from_numpy(array).to(self.device) for array in inputs))
        return [output.cpu().numpy() for output in outputs]


class TorchSession(ModuleSession):
    """A program that torch.export saved."""

    def __init__(self, content: bytes, threads: int | None = None, weights: Path | None = None) -> None:
        extra = {f"{KEY}.json": ""}
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        self.description = extra[f"{KEY}.json"]
        super().__init__(program.module())


def open_session(kind: Format, content: bytes, threads: int | None = None, weights: Path | None = None) -> Session:
    """The session of a file's content.

    Args:
        kind: of which engine. content: the file's.
        threads: as many as torch uses, if not given (.pt2 runs in torch).
        weights: the file that holds a package's weights, if they are not inside; ``content`` is then ONNX, or XML.
    """
    runners: dict[Format, Any] = {"onnx": OnnxSession, "openvino": OpenVinoSession, "torch": TorchSession}
    return runners[kind](content, threads, weights)


def _spinning() -> str:
    """Idle threads wait as politely as OpenMP's are told to: spinning ones starve shared cores."""
    return "0" if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else "1"


def engine_version(engine: str) -> dict[str, str]:
    """The engine's package and version, for the conditions of a number; empty where torch itself runs."""
    package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(engine)
    return {package: version(package)} if package else {}
