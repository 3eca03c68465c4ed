"""The parts of recipes/camvid: scores against slow references, baselines, and the whole recipe on made-up scenes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import built, photos
from gated_deltas import gated_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import patchlife
from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.data import read_photo

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/camvid"))
import camvid
import dense_model
import methods
import segmentation
from evaluate import METHODS
from uniform_grid import UniformGrid, nearest, spread_out


@given(st.integers(1, 3), st.integers(0, 2**31))
def test_confusion_counts_every_labelled_pixel_once(scenes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, camvid.IGNORE + 1, (scenes, 4, 5), generator=generator)
    answers = torch.randint(0, camvid.IGNORE, (scenes, 4, 5), generator=generator)
    expected = torch.zeros(scenes, 11, 11, dtype=torch.long)
    for scene, row, col in np.ndindex(scenes, 4, 5):
        if labels[scene, row, col] != camvid.IGNORE:
            expected[scene, labels[scene, row, col], answers[scene, row, col]] += 1
    assert torch.equal(segmentation.confusion(answers, labels), expected)


def test_iou_by_hand() -> None:
    matrix = torch.zeros(11, 11)
    matrix[0, 0], matrix[0, 1], matrix[1, 1] = 6, 2, 4
    each = segmentation.iou(matrix)
    assert each[:2].tolist() == pytest.approx([6 / 8, 4 / 6])
    assert each[2:].isnan().all()  # neither present nor answered
    assert float(segmentation.mean_iou(matrix)) == pytest.approx((6 / 8 + 4 / 6) / 2)


def test_the_interval_of_equal_answers_is_zero_and_of_worse_ones_is_above() -> None:
    good = torch.eye(11, dtype=torch.long).expand(20, -1, -1) * 50
    bad = good.clone()
    bad[:, 0, 1] += torch.randint(20, 60, (20,), generator=torch.Generator().manual_seed(0))
    assert segmentation.interval_of_drop(good, good) == (0.0, 0.0)
    low, high = segmentation.interval_of_drop(good, bad)
    drop = segmentation.mean_iou(good.sum(dim=0)) - segmentation.mean_iou(bad.sum(dim=0))
    assert 0 < low < drop < high


def test_divergence_is_torchs() -> None:
    dense, other = torch.randn(2, 2, 11, 3, 4)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(dim=1), dense.log_softmax(dim=1), reduction="none", log_target=True
    )
    torch.testing.assert_close(segmentation.divergence(dense, other), expected.sum(dim=1).mean(dim=(1, 2)))


@pytest.mark.parametrize("grid", [(4, 4), (22, 30), (5, 3)])
def test_every_beginning_of_the_grid_order_is_spread_out(grid: tuple[int, int]) -> None:
    order = spread_out(grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    if grid == (22, 30):  # half of the patches: a checkerboard
        rows, cols = order[:330] // 30, order[:330] % 30
        assert len(set(((rows + cols) % 2).tolist())) == 1


def test_a_kept_patch_is_its_own_nearest_and_weights_sum_to_one() -> None:
    kept = torch.tensor([0, 3, 8, 11])
    neighbours, weights = nearest((3, 4), kept)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(12))
    assert neighbours[kept, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(weights[kept, 0], torch.ones(4))


@pytest.mark.parametrize("residual", [True, False])
def test_a_uniform_grid_of_all_patches_gives_the_dense_features(residual: bool) -> None:
    bb, batch = adapt(built("vit")), photos("vit")
    got = UniformGrid(bb, (6, 6), 2, 36, residual).features(batch, (1, 4))
    dense = bb.model.forward_intermediates(batch, indices=[1, 4], norm=True, intermediates_only=True)
    torch.testing.assert_close(got, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", [1, 3])
def test_a_uniform_grid_meets_its_budget(start: int) -> None:
    bb, batch = adapt(built("vit")), photos("vit")
    spent = UniformGrid.of(bb, 0.7, batch, start).flops(batch) / dense_flops(bb, batch)
    assert 0.66 < spent <= 0.7


@pytest.fixture(scope="module")
def parts() -> tuple[torch.nn.Module, dense_model.Head]:
    torch.manual_seed(0)
    return dense_model.backbone().eval(), dense_model.Head().eval()


@pytest.mark.parametrize("budget", [0.75, 0.4])
def test_every_method_spends_the_budget_on_the_whole_model(parts, budget: float) -> None:
    dense = methods.dense(*parts)
    allowed = budget * dense.backbone_flops + (dense.flops - dense.backbone_flops)
    for build in METHODS.values():
        spent = build(*parts, budget).flops / allowed
        assert 0.95 < spent < 1.005, build.__name__  # ToMe's is the closest number of pairs, above or below


def test_a_trained_adapter_is_evaluated_with_the_delta_of_each_budget_at_other_drop_points(parts, tmp_path) -> None:
    backbone, head = parts
    trained = gated_model(backbone, start=methods.START)
    patchlife.save(trained, tmp_path / "adapter")
    build, scenes = methods.fitted(tmp_path / "adapter"), torch.randint(0, 256, (1, 3, *camvid.INPUT)).byte()
    drops = (2, 6)
    with torch.inference_mode():
        dense = methods.dense(backbone, head).maps(scenes)
        torch.testing.assert_close(build(backbone, head, 1.0).maps(scenes), dense)
        for budget in (0.8, 0.5):
            found = build(backbone, head, budget, drops=drops).maps(scenes)
            with trained.temporarily(budget=budget, drops=drops):
                torch.testing.assert_close(found, methods.slimmed(trained, head).maps(scenes))


def test_the_smaller_input_is_the_largest_that_fits(parts) -> None:
    backbone, head = parts
    method = methods.smaller_input(backbone, head, 0.5)
    bb, dense = adapt(backbone), methods.dense(backbone, head)
    height, width = method.size
    for larger in ((height + 16, width), (height, width + 16)):
        flops = dense_flops(bb, methods.blank(larger)) + methods.head_flops(head, larger)
        allowed = 0.5 * dense.backbone_flops + (dense.flops - dense.backbone_flops)
        ratio = larger[1] / larger[0] / (camvid.INPUT[1] / camvid.INPUT[0])
        assert flops > allowed or abs(ratio - 1) > 0.06


def test_equal_importance_keeps_one_of_each_group_of_equal_patches_first() -> None:
    bb = adapt(built("vit"))
    groups = torch.nn.functional.one_hot(torch.arange(36) % 4, bb.dim).float()[None]
    tokens = torch.cat((torch.zeros(1, bb.prefix, bb.dim), groups), dim=1)
    score = methods.EqualImportance()(tokens, None, bb, 2).score[0]
    best = score.argsort(descending=True)[:4]
    assert sorted((best % 4).tolist()) == [0, 1, 2, 3]
    assert score.sort(descending=True).values[4:].abs().max() < 1e-6


def scenes_on_disk(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(count):
            photo = generator.integers(0, 255, (*camvid.PHOTO, 3), np.uint8)
            Image.fromarray(photo).save(folder / split / "images" / f"{index}.jpg")
            Image.fromarray(photo[..., 0] % 12).save(folder / split / "labels" / f"{index}.png")
    return folder


@pytest.mark.slow
def test_the_evaluation_command_writes_scores_and_resumes(parts, tmp_path, monkeypatch, capsys) -> None:
    import evaluate

    dense_model.save(tmp_path / "dense.safetensors", *parts)
    folder = scenes_on_disk(tmp_path / "scenes", 2)
    out = tmp_path / "scores.json"
    command = ["evaluate", "--data", str(folder), "--dense", str(tmp_path / "dense.safetensors"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--budgets", "1.0,0.5", "--methods", "untrained"])
    evaluate.main()
    scores = json.loads(out.read_text())["scores"]
    assert [score["budget"] for score in scores] == [1.0, 0.5]
    assert scores[0]["drop"] == pytest.approx(0, abs=1e-3)
    assert scores[0]["agreement"] > 0.999
    assert scores[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert scores[1]["kl"] > 1e-4
    capsys.readouterr()
    evaluate.main()
    assert capsys.readouterr().out == ""  # nothing is measured twice
    assert str(tmp_path) not in out.read_text()


def test_the_evaluated_rows_are_those_that_the_librarys_preprocessing_gives(tmp_path) -> None:
    from fit import PREPROCESS, mirrored

    folder = scenes_on_disk(tmp_path, 2)
    scenes = camvid.load(folder, "val").evaluated()
    for path, photo in zip(scenes.paths, scenes.photos, strict=True):
        torch.testing.assert_close(PREPROCESS(read_photo(path)), camvid.as_input(photo[None])[0])
    (file,) = mirrored(scenes.paths[:1], tmp_path / "mirrored")
    torch.testing.assert_close(PREPROCESS(read_photo(file)), camvid.as_input(scenes.photos[:1])[0].flip(2))


def test_some_scenes_are_spread_over_the_split(tmp_path) -> None:
    folder = scenes_on_disk(tmp_path, 6)
    assert [path.stem for path in camvid.load(folder, "val", 3).paths] == ["0", "2", "4"]


def test_a_folder_without_scenes_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="--data FOLDER"):
        camvid.load(tmp_path, "val")
