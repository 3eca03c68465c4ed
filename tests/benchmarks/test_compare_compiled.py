"""The comparison with torch.compile: static methods are compiled, the others run eagerly."""

from __future__ import annotations

import pytest
from families import built, photos

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.comparison import time_methods


@pytest.mark.slow
def test_a_compiled_comparison_has_the_dense_model_compiled_and_eager() -> None:
    methods = [METHODS[name] for name in ("no-decision-bound", "tome", "evit", "ours-fixed", "ats")]
    rows = {
        row.method: row
        for row in time_methods(adapt(built("vit")), methods, photos("vit", 2), 0.65, "compile", rounds=5)
    }
    assert {name: row.engine for name, row in rows.items()} == {
        "dense": "compile",
        "dense-eager": "eager",
        "no-decision-bound": "compile",
        "tome": "compile",
        "evit": "compile",
        "ours-fixed": "compile",
        "ats": "eager",
    }
    assert not [row.left_out for row in rows.values() if row.left_out]
    assert all(row.seconds for row in rows.values())
