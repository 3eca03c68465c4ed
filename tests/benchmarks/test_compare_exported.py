"""The comparison in exported engines: methods that export are timed, the others have a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import built, photos

from patchlife.backbones import adapt
from patchlife.benchmarks import comparison
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.comparison import time_methods
from patchlife.slimming import SlimModel

NAMES = ("no-decision-bound", "tome", "ours-fixed", "ours-adaptive")


def test_methods_that_export_are_timed_and_the_others_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def in_torch(model, engine, images):
        prepared.append((type(model), engine))
        return lambda: model(images)

    monkeypatch.setattr(comparison, "prepared", in_torch)
    methods = [METHODS[name] for name in NAMES]
    rows = {
        row.method: row for row in time_methods(adapt(built("vit")), methods, photos("vit", 2), 0.65, "onnx", rounds=5)
    }
    assert {name: row.engine for name, row in rows.items() if row.seconds} == {
        "dense": "onnx",
        "dense-eager": "eager",
        "no-decision-bound": "onnx",
        "ours-fixed": "onnx",
    }
    assert prepared.count((SlimModel, "onnx")) == 2, "dense and ours are exported as SlimModel, with the parity check"
    for name in ("tome", "ours-adaptive"):
        assert rows[name].left_out.startswith("runs in torch only; onnx needs an export with static shapes")
    assert rows["no-decision-bound"].memory is None, "memory of an export engine cannot be measured"
    assert rows["dense-eager"].memory


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_comparison_in_an_export_engine(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path))
    methods = [METHODS[name] for name in NAMES]
    for batch in (1, 2):
        rows = time_methods(adapt(built("vit")), methods, photos("vit", batch), 0.65, engine, rounds=5)
        assert [row.method for row in rows if row.left_out] == ["tome", "ours-adaptive"], rows
        assert len(list(tmp_path.iterdir())) == 3, "exported once for all batch sizes"
