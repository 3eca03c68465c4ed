"""Conversion of a torch module to the content of an ONNX, OpenVINO or torch.export file."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import ExportError
from ..extras import need
from ..logs import errors_only
from ..runtime.metadata import KEY, Format
from ..runtime.tensor_module import TensorModule

__all__ = [
    "block_names",
    "decision_nodes",
    "nodes_before",
    "onnx_bytes",
    "openvino_bytes",
    "products_of_activations",
    "replace_metadata",
    "to_onnx",
    "to_openvino",
    "to_torch",
    "torch_bytes",
    "with_plain_weights",
]

_LIMIT = 2**31  # of a protobuf message, in bytes
_TALKERS = ("onnxscript", "onnx_ir", "torch.onnx")
_SCOPES = "pkg.torch.onnx.name_scopes"

# The ONNX exporter of torch 2.9 refuses a minimum batch of 1 without need; its graph runs at batch 1 all the same.
_ONNX_MIN_BATCH = 2 if torch.__version__.startswith("2.9.") else 1

# torch's exporter records the modules of each node; int8 finds the scorer by this name (see `TensorModule`)
SCORER = "model.scorer"


def to_onnx(module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    """``module`` as an onnx.ModelProto; the first dimension of every input, the batch, is dynamic.

    Raises ExportError if it is too large for an ONNX file.
    """
    need("onnxscript", "export to ONNX")
    with errors_only(*_TALKERS):  # they warn of constants that they could not fold
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamic_shapes=_dynamic_batch(inputs, minimum=_ONNX_MIN_BATCH),
            input_names=list(inputs),
            verbose=False,
        )
    assert program is not None
    try:
        return _with_output_names(program.model_proto, outputs)
    except ValueError as error:  # protobuf's message does not name a fix
        raise _too_large() from error


def _with_output_names(model: Any, outputs: tuple[str, ...]) -> Any:
    """``model``, whose outputs now have these names. Other values of the same names are renamed.

    torch's exporter would give a name twice: it names the result of an nn.Embedding ``embedding``.
    """
    graph = model.graph
    names = {name: f"{name}_inside" for name in outputs}
    names |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}
    for value in (*graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return model


def onnx_bytes(model: Any, metadata: str) -> bytes:
    """The content of an ONNX file with ``metadata``, without paths and source lines of the machine that exported it."""
    import onnx

    model = _copy(model)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, {KEY: metadata} if metadata else {})
    if model.ByteSize() >= _LIMIT:
        raise _too_large()
    return model.SerializeToString()


def with_plain_weights(model: Any, blocks: list[str]) -> Any:
    """A copy in which the weight of every product is a constant, not a transposed part of one, as int8 needs it.

    In ``blocks`` (see `block_names`) every linear layer is a product, also those that torch's multi-head attention
    computes on flattened tokens, which the exporter writes as a Gemm.

    The exporter keeps the transposition where another node reads the weight too, as the attention scorer does, and
    where the weight is a part of another one, as in torch's multi-head attention.
    """
    import onnx

    model = _copy(model)
    nodes = [new for node in model.graph.node for new in (_product_and_sum(node) if _inside(node, blocks) else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    reshaping = {name: n for n in model.graph.node if n.op_type in ("Transpose", "Split") for name in n.output}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in reshaping:
            weight = _constant(node.input[1], weights, reshaping)
            if weight is not None:
                node.input[1] = f"{node.name}_weight"
                model.graph.initializer.append(onnx.numpy_helper.from_array(weight.copy(), node.input[1]))
    return model


def _product_and_sum(node: Any) -> list[Any]:
    """A linear layer's Gemm as a transposition, a product and a sum; other nodes as they are."""
    from onnx.helper import get_attribute_value, make_node

    settings = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    expected = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    if node.op_type != "Gemm" or {**expected, "transB": 0, **settings} != expected or len(node.input) != 3:
        return [node]
    inputs, weight, bias = node.input
    transpose = make_node("Transpose", [weight], [f"{node.name}_transposed"], f"{node.name}_transpose", perm=[1, 0])
    product = make_node("MatMul", [inputs, transpose.output[0]], [f"{node.name}_result"], f"{node.name}_product")
    made = [transpose, product, make_node("Add", [product.output[0], bias], node.output, node.name)]
    for new in made:
        new.metadata_props.extend(node.metadata_props)
    return made


def _inside(node: Any, blocks: list[str]) -> bool:
    """Whether a node belongs to one of these modules."""
    scopes = _scopes(node)
    return any(f"'{block}'" in scopes for block in blocks)


def _constant(name: str, weights: dict[str, Any], reshaping: dict[str, Any]) -> np.ndarray | None:
    """The value of a weight, or of a transposed or split one; None for other values."""
    import onnx.reference

    if name in weights:
        return onnx.numpy_helper.to_array(weights[name])
    if name not in reshaping:
        return None
    node = reshaping[name]
    inputs = {source: _constant(source, weights, reshaping) for source in node.input}
    if any(value is None for value in inputs.values()):
        return None
    outputs: Any = onnx.reference.ReferenceEvaluator(node).run(None, inputs)
    return outputs[list(node.output).index(name)]


def decision_nodes(model: Any, blocks: list[str]) -> list[str]:
    """Names of the nodes of the scorer and of merging, and of their outputs.

    Nodes of merging are products of two activations outside of attention and of ``blocks`` (see `block_names`). All
    these nodes stay in float in an int8 file, because rounded scores change the decision.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        scopes = _scopes(node)
        merges = node.op_type == "MatMul" and not constant & set(node.input) and "attention" not in scopes
        if f"'{SCORER}'" in scopes or (merges and not _inside(node, blocks)):
            names += [node.name, *node.output]  # OpenVINO names nodes after their outputs
    return names


def products_of_activations(model: Any) -> list[str]:
    """Names of the nodes that multiply two activations, and of their outputs."""
    constant = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and not constant & set(node.input)]
    return [name for node in products for name in (node.name, *node.output)]


def block_names(module: TensorModule) -> list[str]:
    """Names of the backbone's blocks in ``module``, as the exporter records them."""
    names = {id(child): name for name, child in module.named_modules()}
    return [names[id(block)] for block in module.model.backbone.blocks]


def nodes_before(model: Any, blocks: list[str]) -> list[str]:
    """Names of the nodes of the embedding and of ``blocks``, and of their outputs; none without blocks.

    ``blocks`` are the names of the first blocks, at most of those before the start block. The exporter keeps the nodes
    in the order of the forward pass, so these are all nodes up to the last one of the last block.
    """
    nodes = model.graph.node
    inside = [place for place, node in enumerate(nodes) if _inside(node, blocks[-1:])]
    return [name for node in nodes[: inside[-1] + 1] for name in (node.name, *node.output)] if inside else []


def _scopes(node: Any) -> str:
    """The modules that a node belongs to, as recorded by torch's exporter."""
    return {prop.key: prop.value for prop in node.metadata_props}.get(_SCOPES, "")


def to_openvino(onnx_file: bytes) -> Any:
    """The content of an ONNX file as an openvino.Model."""
    ov = need("openvino", "export to OpenVINO")
    return ov.Core().read_model(onnx_file, b"")


def openvino_bytes(model: Any, metadata: str) -> bytes:
    """The content of an OpenVINO file: a zip of model.xml, model.bin and ``metadata``, not compressed."""
    import openvino as ov

    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w") as archive:
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        ov.serialize(model, xml, weights)
        # ONNX's TopK keeps the order of equal values; OpenVINO's reader does not set this for its own TopK
        archive.writestr(_entry(xml.name), xml.read_text("utf-8").replace('stable="false"', 'stable="true"'))
        archive.writestr(_entry(weights.name), weights.read_bytes())
        archive.writestr(_entry(f"{KEY}.json"), metadata)
    return content.getvalue()


def replace_metadata(kind: Format, content: bytes, metadata: str) -> bytes:
    """The content of an ONNX or OpenVINO file with other metadata."""
    if kind == "onnx":
        import onnx

        return onnx_bytes(onnx.load_from_string(content), metadata)
    updated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(updated, "w") as archive:
        for name in old.namelist():
            archive.writestr(_entry(name), metadata if name == f"{KEY}.json" else old.read(name))
    return updated.getvalue()


def to_torch(module: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """``module`` through torch.export; the first dimension of every input, the batch, is dynamic."""
    program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=_dynamic_batch(inputs))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exported it
    return program


def torch_bytes(program: ExportedProgram, metadata: str) -> bytes:
    """The content of a .pt2 file with ``metadata`` as an extra file."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{KEY}.json": metadata})
    return content.getvalue()


def _dynamic_batch(inputs: dict[str, Tensor], minimum: int = 1) -> tuple[dict[int, Any], ...]:
    batch = Dim("batch", min=minimum, max=4096)
    return tuple({0: batch} for _ in inputs)


def _too_large() -> ExportError:
    return ExportError(
        "the model's weights do not fit into one ONNX file, which holds at most 2 GB; export with --format torch"
    )


def _entry(name: str) -> zipfile.ZipInfo:
    """A zip entry without a time, so that equal content gives equal files."""
    return zipfile.ZipInfo(name)


def _copy(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy
