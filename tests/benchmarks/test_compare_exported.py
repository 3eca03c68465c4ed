"""The comparison in exported engines: who exports takes part, and the others say why they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import built, photos

from patchlife.backbones import adapt
from patchlife.benchmarks import comparison as compare
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.comparison import time_methods
from patchlife.slimming import SlimModel

NAMES = ("no-decision-bound", "tome", "ours-fixed", "ours-adaptive")


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def in_torch(model, engine, images):
        asked.append((type(model), engine))
        return lambda: model(images)

    monkeypatch.setattr(compare, "prepared", in_torch)
    some = [METHODS[name] for name in NAMES]
    rows = {
        row.method: row for row in time_methods(adapt(built("vit")), some, photos("vit", 2), 0.65, "onnx", rounds=5)
    }
    assert {name: row.engine for name, row in rows.items() if row.seconds} == {
        "dense": "onnx",
        "dense-eager": "eager",
        "no-decision-bound": "onnx",
        "ours-fixed": "onnx",
    }
    assert asked.count((SlimModel, "onnx")) == 2, "dense and ours are exported with proof"
    for name in ("tome", "ours-adaptive"):
        assert rows[name].left_out.startswith("runs in torch only; onnx takes what exports with static shapes")
    assert rows["no-decision-bound"].memory is None, "what an engine takes is not seen from here"
    assert rows["dense-eager"].memory


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_race_in_an_engine(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path))
    some = [METHODS[name] for name in NAMES]
    for batch in (1, 2):
        rows = time_methods(adapt(built("vit")), some, photos("vit", batch), 0.65, engine, rounds=5)
        assert [row.method for row in rows if row.left_out] == ["tome", "ours-adaptive"], rows
        assert len(list(tmp_path.iterdir())) == 3, "exported once for all batch sizes"
