"""Lessons on disk: the same as asked directly, bounded, and never asked twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lessons import PREPROCESS, small_model, some_photos
from torch import Tensor

from patchlife.errors import ConfigError, ImageError, NumericalError
from patchlife.images import read_photo
from patchlife.learn.cache import LessonCache, Photo, collect
from patchlife.learn.targets import Lesson, teach


def ask(images: Tensor) -> Lesson:
    model = small_model()
    return teach(model.backbone, images, model.start)


def gather(photos: list[Photo], folder: Path, **changes) -> LessonCache:
    return collect(
        photos, **{"ask": ask, "preprocess": PREPROCESS, "folder": folder, "about": {}, "batch_size": 5, **changes}
    )


def test_rows_hold_what_the_teacher_said(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    cache = gather(photos, tmp_path / "cache")
    assert len(cache) == len(photos)
    rows = [7, 0, 11]  # in any order
    images = torch.stack([PREPROCESS(read_photo(photos[row].path)) for row in rows])
    for stored, said in zip(cache.lessons(rows), ask(images), strict=True):
        torch.testing.assert_close(stored, said, atol=5e-3, rtol=5e-3)
    assert cache.labels(rows).tolist() == [1, 0, 2]
    assert cache.names([7]) == [str(photos[7].path)]


def test_an_interrupted_collection_goes_on(tmp_path: Path) -> None:
    photos, asked = some_photos(tmp_path / "photos"), []

    def interrupted(images: Tensor) -> Lesson:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(images))
        return ask(images)

    with pytest.raises(KeyboardInterrupt):
        gather(photos, tmp_path / "cache", ask=interrupted)
    cache = gather(photos, tmp_path / "cache", ask=lambda images: asked.append(len(images)) or ask(images))
    assert asked == [5, 5, 2]
    whole = gather(photos, tmp_path / "whole")
    for a, b in zip(cache.lessons(range(12)), whole.lessons(range(12)), strict=True):
        assert torch.equal(a, b)


def test_a_finished_collection_is_only_opened(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    gather(photos, tmp_path / "cache")

    def never(images: Tensor) -> Lesson:
        raise AssertionError("asked again")

    assert len(gather(photos, tmp_path / "cache", ask=never)) == 12
    with pytest.raises(AssertionError, match="asked again"):  # other weights, other lessons
        gather(photos, tmp_path / "cache", ask=never, about={"backbone": "another"})


def test_disk_is_bounded(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    each = sum(2 * values[0].numel() for values in ask(torch.zeros(1, 3, 48, 48)))
    cache = gather(photos, tmp_path / "cache", limit_bytes=7.5 * each)
    assert len(cache) == 7
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.npy"))
    assert written <= 7.5 * each + 4 * 128  # four headers
    with pytest.raises(ConfigError, match="raise cache_gb"):
        gather(photos, tmp_path / "none", limit_bytes=each - 1)


def test_unreadable_photos_are_named_and_skipped_up_to_a_cap(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photos[3].path.write_bytes(b"not a photo")
    cache = gather(photos, tmp_path / "cache", max_unreadable=0.1)
    assert [entry["path"] for entry in cache.skipped] == [str(photos[3].path)]
    assert [photo.path for photo in cache.photos] == [p.path for i, p in enumerate(photos) if i != 3]
    alone = gather([photos[4]], tmp_path / "alone")
    assert torch.equal(cache.lessons([3]).tokens, alone.lessons([0]).tokens)
    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*03\.png"):
        gather(photos, tmp_path / "strict", max_unreadable=0.05)


def test_a_teacher_that_says_nan_is_stopped(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")

    def broken(images: Tensor) -> Lesson:
        lesson = ask(images)
        lesson.logits[2] = torch.nan
        return lesson

    with pytest.raises(NumericalError, match=r"02\.png"):
        gather(photos, tmp_path / "cache", ask=broken)
