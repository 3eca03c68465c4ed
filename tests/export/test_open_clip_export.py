"""Exported files of open_clip's image towers: open_clip's own embeddings, in every format."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.export import export
from patchlife.export.exporter import FORMATS, build_file, export_graph
from patchlife.export.parity import check_int8
from patchlife.runtime import open_engine
from patchlife.runtime.metadata import metadata_of
from patchlife.runtime.sessions import open_session
from patchlife.runtime.tensor_module import tensor_module

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # open_clip imports timm by an old path
    open_clip: Any = pytest.importorskip("open_clip", reason="needs the extra patchlife[open_clip]")
    from open_clip.transformer import VisionTransformer

SMALL = {"image_size": 48, "patch_size": 8, "width": 48, "layers": 3, "heads": 4, "mlp_ratio": 2.0, "output_dim": 24}
MODELS: dict[str, dict[str, Any]] = {  # names of open_clip_models
    "plain": {},
    "odd heads": {"heads": 3},
    "quick gelu": {"act_layer": open_clip.transformer.QuickGELU},
    "average": {"pool_type": "avg"},
    "attentional pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4},
    "custom, qk norm": {"qk_norm": True},
    "custom, scales": {"scale_heads": True, "scale_attn": True, "scale_attn_inner": True, "scale_fc": True},
}
FAST = [("attentional pool", "torch")]
SLOW = [(name, kind) for name in MODELS for kind in FORMATS if (name, kind) not in FAST]


def wrapped(name: str) -> SlimModel:
    vit = families.liven(VisionTransformer(**{**SMALL, **MODELS[name]})).eval()
    return patchlife.wrap(vit, LifeConfig(budget=0.7, start=1, drops=(1, 2)))


def images(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 48, 48, generator=draw) * torch.linspace(0.3, 1.5, count)[:, None, None, None]


@pytest.mark.contract("{kind}", library="open_clip")
@pytest.mark.parametrize(("name", "kind"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_a_file_has_the_embeddings_of_open_clip_at_every_batch_size(tmp_path, name, kind):
    model = wrapped(name)
    engine = open_engine(export(model, tmp_path / "file", kind).path, threads=1, trust=True)
    assert engine.metadata.outputs == ("embedding", "life")
    assert "open_clip_torch" in engine.metadata.versions
    assert engine.metadata.versions["open_clip_torch"]
    for batch in (1, 3, 6):
        output, lives = engine.predict(images(batch))
        torch.testing.assert_close(output, model(images(batch)), atol=1e-4, rtol=1e-5)
        assert torch.equal(lives.life, model.predict(images(batch))[1].life)
    dense = model.unwrap()(images(3))
    assert (model(images(3)) - dense).abs().max() > 1e-3, "patches must be dropped in this test"


@pytest.mark.slow
def test_int8_rounds_the_attention_of_torch_as_a_whole():
    import onnx

    model = wrapped("plain")
    module, x = tensor_module(model), images(8)
    metadata = metadata_of(model, "onnx", precision="int8-dynamic")
    graph = export_graph(module, metadata)
    for first in (0, 1):
        content = build_file(module, replace(metadata, int8_from=first), x, graph)
        rounded = [n for n in onnx.load_from_string(content).graph.node if n.op_type == "MatMulIntegerToFloat"]
        # in each block q, k and v together, the output, two of the MLP; then the projection
        assert len(rounded) == 4 * (3 - first) + 1
        assert 0.9 < check_int8(open_session("onnx", content), module, x, 0.9).closeness < 1
