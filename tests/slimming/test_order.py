"""The order of patches is defined for every score: ties go to the lower patch index, NaN counts as the lowest."""

from __future__ import annotations

import pytest
import torch
from families import START, built, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import GivenScores, assert_close, masked
from slim_models import VARIANTS

from patchlife import LifeConfig, wrap
from patchlife.slimming.plan import longest_first

NAN, INF = torch.nan, torch.inf
ANY_SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 3.4028234663852886e38]),
    st.floats(width=32),
)


def expected_order(score: list[float]) -> list[int]:
    """The order in plain Python: falling score, NaN and -inf last, ties by index."""
    lowest = torch.finfo(torch.float32).min

    def value(x: float) -> float:
        return lowest if x != x else min(max(x, lowest), -lowest)

    return sorted(range(len(score)), key=lambda i: (-value(score[i]), i))


@pytest.mark.parametrize(
    ("score", "order"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([NAN, 1.0, NAN, 2.0], [3, 1, 0, 2]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
        ([-INF, NAN, 0.0, INF], [3, 2, 0, 1]),
        ([NAN, -INF, -1e38, 1e38], [3, 2, 0, 1]),
        ([INF, INF, 1.0, NAN], [0, 1, 2, 3]),
        ([2.0, 5.0, 2.0, 5.0], [1, 3, 0, 2]),
    ],
)
def test_ties_and_odd_values(score: list[float], order: list[int]) -> None:
    cleaned, indices = longest_first(torch.tensor([score]))
    assert indices[0].tolist() == order == expected_order(score)
    assert torch.isfinite(cleaned).all()


@given(st.lists(ANY_SCORE, min_size=1, max_size=40))
def test_any_scores(score: list[float]) -> None:
    _, indices = longest_first(torch.tensor([score, score[::-1]]))
    assert indices.tolist() == [expected_order(score), expected_order(score[::-1])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    score = torch.tensor([[1.0, NAN, 1.0, 2.0, -INF, INF]], dtype=dtype)
    assert longest_first(score)[1].tolist() == [[5, 3, 0, 2, 1, 4]]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, NAN, INF, -INF]), min_size=36, max_size=36))
def test_compiled_order_is_the_same(score: list[float]) -> None:
    values = torch.tensor([score])
    assert torch.equal(_compiled(values)[1], longest_first(values)[1])


_compiled = torch.compile(longest_first, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
def test_onnx_runtime_orders_the_same(tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Order(torch.nn.Module):
        def forward(self, score: torch.Tensor) -> torch.Tensor:
            return longest_first(score)[1]

    choices = torch.tensor([0.0, -0.0, 1.0, NAN, INF, -INF])
    score = choices[torch.randint(6, (5, 36), generator=torch.Generator().manual_seed(0))]
    program = torch.onnx.export(Order().eval(), (score,), dynamo=True, verbose=False)
    program.save(tmp_path / "order.onnx")
    session = runtime.InferenceSession(str(tmp_path / "order.onnx"), providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: score.numpy()})[0]
    assert exported.tolist() == longest_first(score)[1].tolist()


def model_with(score: torch.Tensor, variant: str, calibration: torch.Tensor | None = None):
    """The small ViT with a scorer that returns ``score``; adaptive mode is calibrated on ``calibration``, if given."""
    config = LifeConfig(budget=0.7, start=START, **VARIANTS[variant])
    model = wrap(built("vit"), config, GivenScores(score))
    if config.mode == "adaptive":
        given, model.scorer.score = model.scorer.score, score if calibration is None else calibration
        model.calibrate([photos("vit", len(model.scorer.score))])
        model.scorer.score = given
    return model


@pytest.mark.parametrize("merge", ["", ", merge"])
def test_equal_scores_keep_the_first_patches(merge: str) -> None:
    model = model_with(torch.zeros(3, 36), "fixed" + merge)
    lives = model.lives(photos("vit"))
    kept = int(lives.kept[0, -1])
    assert 1 <= kept < 36
    assert lives.present(4).tolist() == [[True] * kept + [False] * (36 - kept)] * 3
    assert_close(model(photos("vit")), masked(model, photos("vit"), lives)[0])


@pytest.mark.parametrize("merge", ["", ", merge"])
def test_patches_with_a_score_of_nan_are_dropped_first(merge: str) -> None:
    score = torch.rand(3, 36, generator=torch.Generator().manual_seed(0))
    score[:, 10:20] = NAN
    model = model_with(score, "fixed" + merge)
    lives = model.lives(photos("vit"))
    assert lives.kept[0, -1] <= 26
    assert not lives.present(4)[:, 10:20].any()
    assert_close(model(photos("vit")), masked(model, photos("vit"), lives)[0])


@pytest.mark.parametrize("merge", ["", ", merge"])
def test_adaptive_mode_with_ties_and_odd_scores(merge: str) -> None:
    """Scores of an image all NaN: one patch is kept; all -inf: one; all +inf: all; all equal: one or all."""
    score = torch.rand(5, 36, generator=torch.Generator().manual_seed(0))
    score[0], score[1], score[2], score[3] = NAN, -INF, INF, 0.5
    model = model_with(score, "adaptive" + merge, torch.rand(64, 36))
    lives = model.lives(photos("vit", 5))
    last = lives.kept[:, -1].tolist()
    assert last[:3] == [1, 1, 36]
    assert last[3] in (1, 36)
    assert 1 < last[4] < 36
    assert lives.present(4)[0].nonzero().flatten().tolist() == [0]
    assert_close(model(photos("vit", 5)), masked(model, photos("vit", 5), lives)[0])
