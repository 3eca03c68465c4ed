"""From a torch module to the bytes of one file. Nothing is written to where users look."""

from __future__ import annotations

import io
import logging
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import ExportError
from ..extras import need
from ..runtime.metadata import KEY, Format

__all__ = [
    "decision_nodes",
    "described",
    "nodes_before",
    "openvino_bytes",
    "products_of_activations",
    "redescribed",
    "to_onnx",
    "to_openvino",
    "to_torch",
    "torch_bytes",
    "with_plain_weights",
]

_LIMIT = 2**31  # of a protobuf message, in bytes
_SCOPES = "pkg.torch.onnx.name_scopes"

# The ONNX exporter of torch 2.9 finds a guard against batch 1 where there is none; the graph takes one all the same.
_ONNX_LEAST = 2 if torch.__version__.startswith("2.9.") else 1

# torch's exporter names nodes after modules; int8 finds the life head by this one (see `TensorModule`)
HEAD = "model.scorer"


def to_onnx(module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    """``module`` as an onnx.ModelProto; the first dimension of every input, the batch, stays open.

    Raises ExportError when it is larger than an ONNX file can be.
    """
    need("onnxscript", "export to ONNX")
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamic_shapes=_open_batch(inputs, least=_ONNX_LEAST),
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    try:
        return program.model_proto
    except ValueError as error:  # protobuf's own words are about bytes and messages
        raise _too_large() from error


def described(model: Any, metadata: str) -> bytes:
    """An onnx.ModelProto as a file's content: with its description, without traces of the machine that made it."""
    import onnx

    model = _copy(model)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, {KEY: about} if about else {})
    if model.ByteSize() >= _LIMIT:
        raise _too_large()
    return model.SerializeToString()


def with_plain_weights(model: Any) -> Any:
    """A copy in which no product's weight is a constant that is turned on the way: int8 takes plain constants only.

    The exporter leaves a weight as it is where somebody else reads it, too, as the attention rule does.
    """
    import onnx

    model = _copy(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    turns = {n.output[0]: n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    for node in model.graph.node:
        turn = turns.get(node.input[1]) if node.op_type == "MatMul" else None
        if turn is not None:
            order = next((list(a.ints) for a in turn.attribute if a.name == "perm"), None)
            weight = onnx.numpy_helper.to_array(weights[turn.input[0]]).transpose(order)
            node.input[1] = f"{node.name}_weight"
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight.copy(), node.input[1]))
    return model


def decision_nodes(model: Any) -> list[str]:
    """Names of the nodes that decide and merge, and of what they give.

    They are the life head, and products of two activations outside attention.

    They stay in float when the rest goes to int8: a decision on rounded scores is another decision.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        scopes = _scopes(node)
        merges = node.op_type == "MatMul" and not constant & set(node.input) and "attention" not in scopes
        if f"'{HEAD}'" in scopes or (merges and "blocks" not in scopes):
            names += [node.name, *node.output]  # OpenVINO calls nodes by what they give
    return names


def products_of_activations(model: Any) -> list[str]:
    """Names of the nodes that multiply two activations, and of what they give."""
    constant = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and not constant & set(node.input)]
    return [name for node in products for name in (node.name, *node.output)]


def nodes_before(model: Any, block: int) -> list[str]:
    """Names of the nodes of embedding and blocks before ``block``, and of what they give; none for block 0.

    No later than the decision: up to there blocks run as the backbone's own modules, which nodes are named after.
    """
    names = []
    for node in model.graph.node:
        found = re.search(r"patch_embed|blocks\.(\d+)\b", _scopes(node))
        if found and int(found[1] or 0) < block:
            names += [node.name, *node.output]
    return names


def _scopes(node: Any) -> str:
    """The modules inside which torch's exporter met a node."""
    return {prop.key: prop.value for prop in node.metadata_props}.get(_SCOPES, "")


def to_openvino(onnx_file: bytes) -> Any:
    """An ONNX file's content as an openvino.Model."""
    ov = need("openvino", "export to OpenVINO")
    return ov.Core().read_model(onnx_file, b"")


def openvino_bytes(model: Any, metadata: str) -> bytes:
    """An openvino.Model as one file: a zip of model.xml, model.bin and the description, none compressed."""
    import openvino as ov

    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w") as archive:
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        ov.serialize(model, xml, weights)
        # ONNX promises that equal values keep their order; OpenVINO's reader forgets to ask its TopK for it
        archive.writestr(_dated(xml.name), xml.read_text("utf-8").replace('stable="false"', 'stable="true"'))
        archive.writestr(_dated(weights.name), weights.read_bytes())
        archive.writestr(_dated(f"{KEY}.json"), metadata)
    return content.getvalue()


def redescribed(kind: Format, content: bytes, metadata: str) -> bytes:
    """An ONNX or OpenVINO file's content with another description."""
    if kind == "onnx":
        import onnx

        return described(onnx.load_from_string(content), metadata)
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(fresh, "w") as archive:
        for name in old.namelist():
            archive.writestr(_dated(name), about if name == f"{KEY}.json" else old.read(name))
    return fresh.getvalue()


def to_torch(module: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """``module`` through torch.export; the first dimension of every input stays open."""
    program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=_open_batch(inputs))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that made it
    return program


def torch_bytes(program: ExportedProgram, metadata: str) -> bytes:
    """A .pt2 file's content, the description among its extra files."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{KEY}.json": about})
    return content.getvalue()


def _open_batch(inputs: dict[str, Tensor], least: int = 1) -> tuple[dict[int, Any], ...]:
    batch = Dim("batch", min=least, max=4096)
    return tuple({0: batch} for _ in inputs)


def _too_large() -> ExportError:
    return ExportError(
        "the model's weights do not fit into one ONNX file, which holds at most 2 GB; export with --format torch"
    )


def _dated(name: str) -> zipfile.ZipInfo:
    """A zip entry without the time, so that equal content makes equal files."""
    return zipfile.ZipInfo(name)


def _copy(model: Any) -> Any:
    twin = type(model)()
    twin.CopyFrom(model)
    return twin


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what it could not fold."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
