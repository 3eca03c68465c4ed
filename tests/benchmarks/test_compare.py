"""The comparison on small models: every method has a row of numbers or a reason, on the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import built, photos
from PIL import Image

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.comparison import evaluate_methods, time_methods
from patchlife.data import Preprocess

PREPROCESS = Preprocess(size=(48, 48), crop_fraction=1.0)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        pixels = torch.randint(0, 256, (48, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


def test_timing_has_a_row_for_every_method() -> None:
    rows = time_methods(adapt(built("vit")), list(METHODS.values()), photos("vit", 2), 0.65, rounds=5)
    assert [r.method for r in rows] == list(METHODS)
    for row in rows:
        assert row.left_out == ""
        assert row.seconds is not None
        assert row.memory is not None
        assert row.memory > 0
        assert row.flops == pytest.approx(1.0 if row.method == "dense" else 0.65, abs=0.03)
    assert rows[0].ratio is not None
    assert rows[0].ratio.median == 1


def test_a_method_that_cannot_run_is_left_out_and_the_others_are_timed() -> None:
    methods = [METHODS[n] for n in ("evit", "ours-fixed")]
    dense, evit, ours = time_methods(adapt(built("siglip")), methods, photos("siglip", 2), 0.65, rounds=5)
    assert dense.seconds
    assert ours.seconds
    assert evit.seconds is None
    assert "class token" in evit.left_out


def test_evaluation_counts_right_predictions(pictures: list[Path]) -> None:
    bb = adapt(built("vit"))
    methods = [METHODS[n] for n in ("dense", "no-decision-bound", "tome", "ours-adaptive")]
    with torch.no_grad():
        truth = [int(bb.model(PREPROCESS(Image.open(p))[None]).argmax()) for p in pictures]
    rows, unread = evaluate_methods(bb, methods, [0.65], pictures, truth, PREPROCESS, batch=4)
    by = {row.method: row for row in rows}
    assert unread == 0
    assert by["dense"].top1 == 100
    assert by["tome"].right == by["tome"].agreeing <= 6
    assert by["tome"].flops == pytest.approx(0.65, abs=0.03)
    assert by["ours-adaptive"].flops == pytest.approx(0.65, abs=0.05)
    assert "accuracy is not meaningful" in by["no-decision-bound"].left_out


def test_the_divergence_is_the_mean_of_the_photos(pictures: list[Path]) -> None:
    bb, methods = adapt(built("vit")), [METHODS[n] for n in ("dense", "tome", "ours-fixed")]
    rows, _ = evaluate_methods(bb, methods, [0.65], pictures, [0] * 6, PREPROCESS, batch=4)
    images = torch.stack([PREPROCESS(Image.open(path)) for path in pictures])
    for row in rows:
        with torch.no_grad():
            logits = METHODS[row.method].build(bb, row.target, images)(images)
            logs = [each.log_softmax(dim=1) for each in (logits, bb.model(images))]
        expected = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True).item()
        assert row.divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (row.divergence > 1e-3) == (row.method != "dense")


def test_an_unreadable_photo_is_counted_and_the_others_are_evaluated(pictures: list[Path]) -> None:
    pictures[2].write_bytes(b"not an image")
    rows, unread = evaluate_methods(
        adapt(built("vit")), [METHODS["dense"]], [0.65], pictures, [0] * 6, PREPROCESS, batch=4
    )
    assert unread == 1
    assert rows[0].photos == 5
