"""The fastest schedule within an allowed drop of top-1: one for each batch size, chosen across targets."""

from __future__ import annotations

import pytest
import torch
from families import built, photos

from patchlife import wrap
from patchlife.benchmarks.fastest_within_drop import AccuracyDrop, fastest_within_drop, measure_drops
from patchlife.benchmarks.schedule_search import Key
from patchlife.evaluation.timing import Spread

DEFAULT: Key = (3, (3, 6))
LATE: Key = (4, (4,))


def entry(batch: int, target: float, **speeds: float) -> dict:
    """An entry of `advise`, with the default schedule at one speed and optionally a later one at another."""
    keys = {"default": DEFAULT, "fastest": LATE}
    schedules = {
        name: {"start": keys[name][0], "drops": list(keys[name][1]), "patches": "", "flops": target} for name in speeds
    }
    ratios = {name: vars(Spread(v, 0.98 * v, 1.02 * v)) for name, v in speeds.items()}
    return {"batch": batch, "target": target, "schedules": schedules, "ratios": ratios}


def dropped(points: float, half: float = 0.2) -> AccuracyDrop:
    return AccuracyDrop(1000, 75 - points, points, (points - half, points + half))


ADVICE = [entry(1, 0.8, default=1.1, fastest=1.2), entry(1, 0.6, default=1.5, fastest=1.6), entry(16, 0.8, default=0.9)]
DROPS = {
    (0.8, DEFAULT): dropped(0.1),
    (0.8, LATE): dropped(0.5),
    (0.6, DEFAULT): dropped(0.95),
    (0.6, LATE): dropped(1.4),
}


def test_the_fastest_within_the_drop_over_all_targets() -> None:
    one, _ = fastest_within_drop(ADVICE, DROPS, 1.0)
    assert (one["chosen"]["target"], one["chosen"]["start"]) == (0.6, 3)
    assert one["verdict"].startswith("start 3, drops 3, 6 at 0.6 of the FLOPs: 1.50x the dense speed")
    assert "0.95 points of top-1 lost (95 % interval 0.75 to 1.15, 1000 photos)" in one["verdict"]
    assert "evaluate more photos" in one["verdict"], "its interval exceeds 1 point"
    assert len(one["candidates"]) == 4
    strict, _ = fastest_within_drop(ADVICE, DROPS, 0.8)
    assert (strict["chosen"]["target"], strict["chosen"]["start"]) == (0.8, 4)
    assert "more photos" not in strict["verdict"]


def test_none_qualifies() -> None:
    one, _ = fastest_within_drop(ADVICE, DROPS, 0.05)
    assert one["chosen"] is None
    assert one["verdict"].startswith(
        "none of the 4 schedules that are faster than dense qualifies; start 3, drops 3, 6"
    )
    assert "allow more with --max-drop" in one["verdict"]


def test_slimming_that_does_not_pay_is_not_advised_at_any_drop() -> None:
    _, sixteen = fastest_within_drop(ADVICE, DROPS, 100)
    assert sixteen["chosen"] is None
    assert sixteen["verdict"].startswith("slimming does not pay here: at best 0.90x")
    assert sixteen["candidates"][0]["accuracy"] == vars(DROPS[0.8, DEFAULT]), "evaluated for another batch size"


def test_noise_gives_no_advice() -> None:
    noisy = {**entry(1, 0.8, default=1.5), "ratios": {"default": vars(Spread(1.5, 0.8, 2.0))}}
    (result,) = fastest_within_drop([noisy], {}, 1.0)
    assert "too noisy" in result["verdict"]


def test_drops_are_paired_with_the_dense_model() -> None:
    vit, images = built("vit"), photos("vit", 6)
    model = wrap(vit)
    advice = [entry(1, 1.0, default=1.5), entry(1, 0.65, default=1.2, fastest=0.7)]
    for row in advice:  # the small model has only five blocks
        row["schedules"]["default"] |= {"start": 1, "drops": [1, 3]}
    with torch.no_grad():
        labels = vit(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 10
    drops = measure_drops(model, advice, vit, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert set(drops) == {(1.0, (1, (1, 3))), (0.65, (1, (1, 3)))}, "a schedule that is not faster is not evaluated"
    assert drops[1.0, (1, (1, 3))] == AccuracyDrop(6, pytest.approx(100 * 5 / 6), 0, (0, 0))
    slimmed = drops[0.65, (1, (1, 3))]
    assert slimmed.drop == pytest.approx(100 * 5 / 6 - slimmed.top1)


def test_no_photo_is_read_when_nothing_pays() -> None:
    def unread():
        raise AssertionError("read")
        yield

    assert measure_drops(wrap(built("vit")), [entry(1, 0.65, default=0.7)], built("vit"), unread()) == {}
