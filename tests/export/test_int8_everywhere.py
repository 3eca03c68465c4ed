"""Integer products are the same on every processor.

Without VNNI, two neighbouring products of an activation (u8) and a weight (s8) are added in 16 bits, with saturation.
Whether such a sum always fits follows from the integers in the file, so no such processor is needed here.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import exported_models
import families
import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

import patchlife
from patchlife.errors import ExportError
from patchlife.export import export_bundle, exporter, int8
from patchlife.export.exporter import build_file, export_graph
from patchlife.export.parity import Parity, sample_images
from patchlife.export.per_token_int8 import largest_pair, rounded_weight
from patchlife.runtime import Bundle
from patchlife.runtime.metadata import metadata_of
from patchlife.runtime.sessions import OnnxSession
from patchlife.runtime.tensor_module import tensor_module

U8 = 255
"""The largest activation."""


def worst_pair(weight: np.ndarray) -> int:
    """The largest absolute value of the sum of two neighbouring products, over all activations."""
    sizes = np.abs(np.pad(weight.astype(int), ((0, len(weight) % 2), (0, 0))))
    return int(U8 * sizes.reshape(-1, 2, weight.shape[1]).sum(1).max())


def without_vnni(activations: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product of u8 and s8 as processors without VNNI compute it."""
    terms = activations[:, :, None].astype(int) * weight.astype(int)
    pairs = np.pad(terms, ((0, 0), (0, len(weight) % 2), (0, 0))).reshape(len(terms), -1, 2, weight.shape[1]).sum(2)
    return pairs.clip(-(2**15), 2**15 - 1).sum(1)


def extreme_activations(weight: np.ndarray) -> np.ndarray:
    """Activations that maximise or minimise the product with a column of a weight, and random ones."""
    columns = weight.T[:8]
    rows = [np.where(columns > 0, U8, 0), np.where(columns < 0, U8, 0), np.full((1, len(weight)), U8)]
    rows.append(np.random.default_rng(0).integers(0, U8 + 1, (5, len(weight))))
    return np.concatenate(rows).astype(np.uint8)


# ---- the numbers


def test_two_large_weights_do_not_saturate():
    """With weights of 127, as plain 8-bit rounding gives them, the sum saturates."""
    activations = np.array([[U8, U8]], np.uint8)
    plain = np.array([[127], [127]], np.int8)
    assert without_vnni(activations, plain) < activations.astype(int) @ plain
    weight, _ = rounded_weight(np.array([[1.0], [1.0]], np.float32))
    assert without_vnni(activations, weight) == activations.astype(int) @ weight


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), inputs=st.integers(1, 33), scale=st.floats(-30, 30), tail=st.sampled_from([0, 1, 3]))
def test_no_weights_saturate(seed, inputs, scale, tail):
    """Odd lengths, large and small weights, outliers, weights of equal size, zeros."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((inputs, 6)) * np.exp(tail * draw.standard_normal((inputs, 6)))
    weight[:, 0], weight[:, 1] = 0, np.sign(weight[:, 1])
    weight = (weight * 10**scale).astype(np.float32)
    integers, columns = rounded_weight(weight)
    assert worst_pair(integers) <= 2**15 - 1
    assert (np.abs(integers * columns - weight) <= 0.501 * columns + 1e-30).all(), "half a step"
    activations = extreme_activations(integers)
    np.testing.assert_array_equal(without_vnni(activations, integers), activations.astype(int) @ integers)


def test_steps_are_smaller_than_those_of_seven_bits():
    weight = np.random.default_rng(0).standard_normal((192, 100)).astype(np.float32)
    of_seven_bits = np.abs(weight).max(0) / 64
    assert (rounded_weight(weight)[1] / of_seven_bits).mean() < 0.8
    assert (largest_pair(rounded_weight(weight)[0]) >= 126).all(), "the bound is reached"


# ---- exported graphs


def _integer_weights(content: bytes) -> list[np.ndarray]:
    """The weights of an ONNX file's products of u8 and s8, inputs first."""
    import onnx

    graph = onnx.load_from_string(content).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = []
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            assert constants[node.input[4]].dtype == np.uint8
            weights.append(constants[node.input[1]])
        assert node.op_type not in ("MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "ConvInteger")
    assert all(weight.dtype == np.int8 for weight in weights)
    return weights


def _model(name: str) -> patchlife.SlimModel:
    wide = {**exported_models.SMALL, "embed_dim": 96, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **wide) if name == "wide" else families.built(name)
    return patchlife.wrap(families.liven(vit).eval(), patchlife.LifeConfig(budget=0.85, start=2, drops=(2,)))


@pytest.mark.parametrize("name", ["wide", "eva02"])
def test_the_sum_of_a_pair_fits_into_16_bits(name):
    model = _model(name)
    metadata, module = metadata_of(model, "onnx", precision="int8-dynamic"), tensor_module(model)
    graph, images = export_graph(module, metadata), sample_images(2, 3, model.backbone.image_size)
    for block in range(model.start + 1):
        weights = _integer_weights(build_file(module, replace(metadata, int8_from=block), images, graph))
        assert len(weights) >= 4 * (model.backbone.depth - block)
        assert max(map(worst_pair, weights)) <= 2**15 - 1


def test_the_engine_computes_exact_integers():
    """On this processor. Without VNNI it would fail for plain 8-bit weights."""
    model = exported_models.small()
    metadata = metadata_of(model, "onnx", precision="int8-dynamic")
    weights = _integer_weights(build_file(tensor_module(model), metadata, exported_models.images(2)))
    plain = np.sign(np.random.default_rng(1).standard_normal((64, 48)))
    for weight in [*weights, rounded_weight(plain.astype(np.float32))[0]]:
        activations = extreme_activations(weight)
        for zero in (0, 128):
            session = OnnxSession(_product_alone(weight, zero))
            exact = (activations.astype(int) - zero) @ weight.astype(int)
            for rows in (1, 3, len(activations)):
                np.testing.assert_array_equal(session.run(activations[:rows])[0], exact[:rows])


def _product_alone(weight: np.ndarray, zero: int) -> bytes:
    """A graph of one product of u8 and s8, as `quantised_per_token` writes it, with scales of 1."""
    from onnx import TensorProto, helper, numpy_helper

    arrays = {
        "w": weight,
        "one": np.float32(1),
        "scales": np.ones(weight.shape[1], np.float32),
        "zero": np.uint8(zero),
    }
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    node = helper.make_node("MatMulIntegerToFloat", ["x", *arrays], ["y"], domain="com.microsoft")
    ends = [helper.make_tensor_value_info(n, t, None) for n, t in (("x", TensorProto.UINT8), ("y", TensorProto.FLOAT))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_metadata_names_the_processors_with_exact_integers(tmp_path):
    bundle = export_bundle(
        exported_models.small(), tmp_path / "b", (0.7,), images=exported_models.images(4), int8="dynamic"
    )
    (metadata,) = bundle.graphs_metadata
    assert metadata == Bundle(bundle.path).graphs_metadata[0.7]
    assert "two neighbours at most 128 together" in metadata.integers
    assert metadata.integers.endswith("products are exact on every x86 and ARM processor")
    assert metadata.parity["agreement"] >= exporter.AGREEMENT
    assert metadata.parity["images"] == 4
    assert int8.integers_of("openvino", "int8-static").endswith("products are exact on every x86 processor")
    assert int8.integers_of("openvino", "int8-dynamic").endswith("so outputs differ between the two")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_static_for_openvino_has_seven_bits_and_attention_in_float():
    pytest.importorskip("nncf", reason="int8 for OpenVINO needs nncf (extra int8)")
    import openvino

    model = exported_models.small()
    content = build_file(
        tensor_module(model), metadata_of(model, "openvino", precision="int8-static"), exported_models.images(8)
    )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        read = openvino.Core().read_model(archive.read("model.xml"), archive.read("model.bin"))
    nodes = read.get_ordered_ops()
    constants = [n for n in nodes if n.get_type_name() == "Constant" and n.get_element_type().get_type_name() == "i8"]
    assert len(constants) >= 12
    assert max(np.abs(n.data.astype(int)).max() for n in constants) <= 64
    for product in (n for n in nodes if n.get_type_name() == "MatMul"):
        producers = [product.input_value(i).get_node().get_type_name() for i in (0, 1)]
        assert producers.count("FakeQuantize") < 2, "two activations"


@pytest.mark.parametrize("largest", [64, 65])
def test_larger_weights_from_nncf_are_refused(largest):
    weights = [np.zeros((2, 2), np.int8), np.full((3, 3), -largest, np.int8)]
    if largest == 64:
        return int8._check_range(weights)
    with pytest.raises(ExportError, match="weights of up to 65, expected at most 64"):
        int8._check_range(weights)


def test_openvino_is_compared_with_and_without_vnni():
    near, far = Parity(20, 0.1, 1.0), Parity(20, 0.2, 0.99)
    assert exporter._worse(near, far) == exporter._worse(far, near) == far
    assert "this processor has no VNNI" in str(exporter._worse(near, near))
