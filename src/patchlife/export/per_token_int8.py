"""Per-token int8 for ONNX Runtime: one scale per token, computed at run time.

A few tokens of a Vision Transformer are tens of times larger than the others. With one scale for all tokens, as in
ONNX's own dynamic quantisation, only a few steps are left for the others. With one scale per token each token has 8
bits, and the outputs for an image do not depend on the other images of the batch.

Processors without VNNI add the products of two neighbouring inputs in 16 bits, and saturate larger sums. So the sum of
two neighbouring weights is bounded: then every such sum fits into 16 bits, and a product is the same integer on every
processor, whatever the options of a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int8, Shaped

__all__ = ["PAIR", "SHIFT", "largest_pair", "quantised_per_token", "rounded_weight"]

PAIR = 128
"""Largest sum of two neighbouring weights' absolute values: times 255, the largest activation, it fits in 16 bits."""

SHIFT = 0.1701
"""GELU is never below -SHIFT. Its output plus SHIFT needs no sign, so the steps are half as large."""

_TINY = 1e-12  # smallest scale, for tokens of zeros
_RUNTIME = "com.microsoft"  # domain of ONNX Runtime's own operators: integer product and scales of the columns in one


def quantised_per_token(model: Any, floating: list[str]) -> Any:
    """A copy of an onnx.ModelProto whose linear layers multiply in int8.

    Weights have one scale per column (output channel), activations one per token. The nodes named in ``floating`` stay
    in float, and so does a classifier on one token, which the exporter writes as a Gemm: its cost is negligible.
    """
    import onnx

    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    graph = _Graph(quantised)
    nodes = [new for node in quantised.graph.node for new in _quantised_nodes(graph, node, floating)]
    del quantised.graph.node[:]
    quantised.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    constants = [constant for name, constant in graph.constants.items() if name in used]
    del quantised.graph.initializer[:]
    quantised.graph.initializer.extend(constants)
    if all(opset.domain != _RUNTIME for opset in quantised.opset_import):
        quantised.opset_import.append(onnx.helper.make_opsetid(_RUNTIME, 1))
    return quantised


def rounded_weight(
    weight: Float[np.ndarray, "inputs outputs"],
) -> tuple[Int8[np.ndarray, "inputs outputs"], Float[np.ndarray, "outputs"]]:
    """(integers, scales) whose product is the weight, up to rounding.

    The scale of a column follows from its largest pair of neighbouring weights. 7 bits for each weight would be as
    safe, but on timm's ViT-Tiny the steps would be one and a half times as large.
    """
    scale = np.maximum(largest_pair(weight), _TINY) / (PAIR - 1)  # rounding adds at most 1/2 to each of the two
    return np.round(weight / scale).astype(np.int8), scale.astype(np.float32)


def largest_pair(weight: Shaped[np.ndarray, "inputs outputs"]) -> Shaped[np.ndarray, "outputs"]:
    """The largest sum of two neighbouring weights' absolute values (inputs 0 and 1, 2 and 3, ...) in each column."""
    sizes = np.abs(weight if weight.dtype.kind == "f" else weight.astype(int))
    return np.add.reduceat(sizes, range(0, len(sizes), 2), axis=0).max(axis=0)


class _Graph:
    """Look-ups in a graph: constants by name, the node that produces a value, the nodes that consume it."""

    def __init__(self, model: Any) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(self.constants[name])

    def add(self, name: str, value: np.ndarray) -> str:
        import onnx

        self.constants[name] = onnx.numpy_helper.from_array(value, name)
        return name


def _quantised_nodes(graph: _Graph, node: Any, floating: list[str]) -> Iterator[Any]:
    """The node itself, or the nodes that compute the same in integers."""
    linear = node.op_type == "MatMul" and node.input[1] in graph.constants and node.name not in floating
    if not linear or len(graph.constants[node.input[1]].dims) != 2:
        yield node
        return
    integers, columns = rounded_weight(graph.value(node.input[1]))
    if _shift_into_bias(graph, node, SHIFT * (integers * columns).sum(axis=0)):
        zero, steps = 0, 255
    else:
        zero, steps = 128, 127
    yield from _product(graph, node, integers, columns, zero, steps)


def _shift_into_bias(graph: _Graph, node: Any, excess: Float[np.ndarray, "outputs"]) -> bool:
    """Whether the input is a GELU's output and will be shifted; then ``excess``, the effect of the shift, is subtracted
    from the bias.
    """
    consumers = graph.consumers.get(node.output[0], [])
    producer = graph.producer.get(node.input[0])
    if producer is None or producer.op_type != "Gelu" or len(consumers) != 1 or consumers[0].op_type != "Add":
        return False
    for place, name in enumerate(consumers[0].input):
        if name in graph.constants and graph.constants[name].dims == [len(excess)]:
            consumers[0].input[place] = graph.add(f"{node.name}_bias", (graph.value(name) - excess).astype(np.float32))
            return True
    return False


def _product(
    graph: _Graph,
    node: Any,
    integers: Int8[np.ndarray, "inputs outputs"],
    columns: Float[np.ndarray, "outputs"],
    zero: int,
    steps: int,
) -> Iterator[Any]:
    """The nodes of one integer product: scale per token, rounding, product, scales of column and token applied again.

    ``zero`` is the zero point; if it is 0, the input is shifted first and has no sign.
    """
    from onnx.helper import make_node

    last = graph.add("last_axis", np.array([-1], np.int64))
    flat = graph.add(f"tokens_of_{len(integers)}", np.array([-1, len(integers)], np.int64))
    point = graph.add(f"zero_{zero}", np.array(zero, np.uint8))
    step = graph.add(f"step_{steps}", np.array(1 / steps, np.float32))
    tiny, one = graph.add("tiny", np.array(_TINY, np.float32)), graph.add("one", np.array(1, np.float32))
    weight, scales = graph.add(f"{node.name}_int8", integers), graph.add(f"{node.name}_scales", columns)

    def made(kind: str, what: str, *inputs: str, **settings: Any) -> Any:
        name = f"{node.name}_{what}"
        return make_node(kind, inputs, [name], name=name, **settings)

    source = node.input[0]
    if zero:
        sized = made("Abs", "size", source)
    else:
        sized = made("Add", "size", source, graph.add("shift", np.array(SHIFT, np.float32)))
        source = sized.output[0]
    yield sized
    yield made("ReduceMax", "largest", sized.output[0], last, keepdims=1)
    yield made("Mul", "step", f"{node.name}_largest", step)
    yield made("Max", "token_scale", f"{node.name}_step", tiny)
    yield made("Reshape", "token_scales", f"{node.name}_token_scale", last)
    yield made("Reshape", "flat", source, flat)
    yield made("Shape", "count", f"{node.name}_token_scales")
    yield made("Expand", "zeros", point, f"{node.name}_count")
    yield made(
        "QuantizeLinear", "rounded", f"{node.name}_flat", f"{node.name}_token_scales", f"{node.name}_zeros", axis=0
    )
    yield made("Shape", "shape", source)
    yield made("Reshape", "input", f"{node.name}_rounded", f"{node.name}_shape")
    product = (f"{node.name}_input", weight, one, scales, point)
    yield made("MatMulIntegerToFloat", "columns", *product, domain=_RUNTIME)
    yield make_node("Mul", [f"{node.name}_columns", f"{node.name}_token_scale"], [node.output[0]], name=node.name)
