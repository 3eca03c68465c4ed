"""ONNX graphs of a model with a gated weight delta that share the weights of the backbone.

The weights of such a model differ between budgets. In a bundle, a graph computes each changed matrix from constants:
the weight without the delta and the factors of the delta, which all graphs share, and the gates of its own budget. ONNX
Runtime and OpenVINO compute it once, when they open the graph. Vectors are small and are stored with the delta.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backbones.merged_delta import MergedDelta
from ..slimming import SlimModel

__all__ = ["with_shared_bases"]


class _Sum(NamedTuple):
    """A matrix as ``base + (up * gates) @ down``, or the transpose of it."""

    base: Tensor
    up: Tensor
    gates: Tensor
    down: Tensor
    transposed: bool


def with_shared_bases(graph: Any, model: SlimModel) -> Any:
    """A copy of an onnx.ModelProto of ``model`` that computes the matrices with a gated delta, as described above.

    A graph of a model without a gated delta, or at budget 1.0, is returned as it is.
    """
    gated = model.backbone.gated
    known = _sums(gated) if isinstance(gated, MergedDelta) else {}
    if not known:
        return graph
    import onnx

    result = type(graph)()
    result.CopyFrom(graph)
    tensors, nodes = [], []
    for tensor in result.graph.initializer:
        found = known.get(_key(onnx.numpy_helper.to_array(tensor)))
        if found is None:
            tensors.append(tensor)
        else:
            constants, computed = _computed(tensor.name, found)
            tensors += constants
            nodes += computed
    nodes += result.graph.node
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.initializer.extend(tensors)
    result.graph.node.extend(nodes)
    return result


def _sums(gated: MergedDelta) -> dict[bytes, _Sum]:
    """The changed matrices, and their transposes, by a hash of their present values."""
    found: dict[bytes, _Sum] = {}
    for parameter, base, factors in gated.factors():
        if factors.down is not None:
            gates = torch.tensor(factors.channels(gated.values))
            own = _Sum(base.detach(), factors.up.float(), gates, factors.down.float(), False)
            value = parameter.detach().numpy()
            found |= {_key(value): own, _key(value.T): own._replace(transposed=True)}
    return found


def _key(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).digest()


def _computed(name: str, of: _Sum) -> tuple[list[Any], list[Any]]:
    """(constants, nodes) that compute the matrix ``name``."""
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    base, up, down, gates = of.base, of.up, of.down, of.gates
    values = {"base": base, "up": up, "down": down, "gates": gates}
    if of.transposed:
        values = {"base": base.T, "up": up.T, "down": down.T, "gates": gates[:, None]}
    names = {part: f"{name}_{part}" for part in (*values, "gated", "delta")}
    constants = [from_array(value.contiguous().numpy(), names[part]) for part, value in values.items()]
    factors = [names["gated"], names["down"]]
    nodes = [
        make_node("Mul", [names["up"], names["gates"]], [names["gated"]], names["gated"]),
        make_node("MatMul", factors[::-1] if of.transposed else factors, [names["delta"]], names["delta"]),
        make_node("Add", [names["base"], names["delta"]], [name], f"{name}_sum"),
    ]
    return constants, nodes
