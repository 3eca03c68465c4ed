"""int8 for ONNX Runtime with a scale for each token, found anew in each run.

A few tokens of a Vision Transformer are tens of times larger than the others. One scale for all of them, as ONNX's own
dynamic quantisation takes, leaves the others a handful of steps; a scale for each row leaves every token 8 bits, and an
image's result does not depend on its batch mates.

Processors without VNNI add the products of two neighbouring inputs in 16 bits, and larger sums are cut off there. So
the weights of two neighbours are bounded together: then every such sum fits, and a product is the same integer on every
processor, whatever options a session has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int8, Shaped

__all__ = ["PAIR", "SHIFT", "largest_pair", "quantised_per_token", "rounded_weight"]

PAIR = 128
"""Largest sum of the sizes of two neighbouring weights: 255, the largest activation, times this fits in 16 bits."""

SHIFT = 0.1701
"""GELU never falls below its negative: what it gives, shifted, needs no sign, and has twice the steps."""

_TINY = 1e-12  # scale of a row of zeros
_RUNTIME = "com.microsoft"  # ONNX Runtime's own operators: the integer product and the columns' scales in one pass


def quantised_per_token(model: Any, floating: list[str]) -> Any:
    """An onnx.ModelProto whose linear layers multiply in int8; ``model`` stays as it is.

    Weights are rounded per column, activations per row. ``floating`` names nodes to leave alone. So is a classifier
    on one token, which the exporter writes as a Gemm: its share of the work is too small to gain anything.
    """
    import onnx

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = _Graph(twin)
    nodes = [new for node in twin.graph.node for new in _replaced(graph, node, floating)]
    del twin.graph.node[:]
    twin.graph.node.extend(nodes)
    wanted = {name for node in nodes for name in node.input}
    constants = [constant for name, constant in graph.constants.items() if name in wanted]
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(constants)
    if all(opset.domain != _RUNTIME for opset in twin.opset_import):
        twin.opset_import.append(onnx.helper.make_opsetid(_RUNTIME, 1))
    return twin


def rounded_weight(
    weight: Float[np.ndarray, "inputs outputs"],
) -> tuple[Int8[np.ndarray, "inputs outputs"], Float[np.ndarray, "outputs"]]:
    """(integers, scales) whose product is the weight, but for the rounding.

    A column's scale follows from its largest pair of neighbours, not from its largest weight alone. 7 bits for each
    weight would be as safe, but on the ViT-Tiny of timm their steps are one and a half times as large.
    """
    scale = np.maximum(largest_pair(weight), _TINY) / (PAIR - 1)  # rounding adds a half for each of the two, at most
    return np.round(weight / scale).astype(np.int8), scale.astype(np.float32)


def largest_pair(weight: Shaped[np.ndarray, "inputs outputs"]) -> Shaped[np.ndarray, "outputs"]:
    """The largest sum of the sizes of two neighbouring weights, inputs 0 and 1, 2 and 3 and so on, in each column."""
    sizes = np.abs(weight if weight.dtype.kind == "f" else weight.astype(int))
    return np.add.reduceat(sizes, range(0, len(sizes), 2), axis=0).max(axis=0)


class _Graph:
    """What a node's replacement must know of the rest: constants by name, who gives and who takes a value."""

    def __init__(self, model: Any) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.giver = {name: node for node in model.graph.node for name in node.output}
        self.takers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(self.constants[name])

    def add(self, name: str, value: np.ndarray) -> str:
        import onnx

        self.constants[name] = onnx.numpy_helper.from_array(value, name)
        return name


def _replaced(graph: _Graph, node: Any, floating: list[str]) -> Iterator[Any]:
    """The node, or what computes the same in integers."""
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
    """Whether the input is GELU's, to be shifted; what that adds to the result is then taken off the bias."""
    takers = graph.takers.get(node.output[0], [])
    given = graph.giver.get(node.input[0])
    if given is None or given.op_type != "Gelu" or len(takers) != 1 or takers[0].op_type != "Add":
        return False
    for place, name in enumerate(takers[0].input):
        if name in graph.constants and graph.constants[name].dims == [len(excess)]:
            takers[0].input[place] = graph.add(f"{node.name}_bias", (graph.value(name) - excess).astype(np.float32))
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
    """Nodes: each row's largest value sets its scale; rounding; integers; the scales of row and column again.

    Without a ``zero`` point the input is shifted first and has no sign.
    """
    from onnx.helper import make_node

    last = graph.add("last_axis", np.array([-1], np.int64))
    flat = graph.add(f"rows_of_{len(integers)}", np.array([-1, len(integers)], np.int64))
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
    yield made("Max", "row", f"{node.name}_step", tiny)
    yield made("Reshape", "rows", f"{node.name}_row", last)
    yield made("Reshape", "flat", source, flat)
    yield made("Shape", "count", f"{node.name}_rows")
    yield made("Expand", "zeros", point, f"{node.name}_count")
    yield made("QuantizeLinear", "rounded", f"{node.name}_flat", f"{node.name}_rows", f"{node.name}_zeros", axis=0)
    yield made("Shape", "shape", source)
    yield made("Reshape", "input", f"{node.name}_rounded", f"{node.name}_shape")
    product = (f"{node.name}_input", weight, one, scales, point)
    yield made("MatMulIntegerToFloat", "columns", *product, domain=_RUNTIME)
    yield make_node("Mul", [f"{node.name}_columns", f"{node.name}_row"], [node.output[0]], name=node.name)
