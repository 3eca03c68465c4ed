"""Lessons on disk: the same as asked directly, bounded, and never asked twice."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, in_shards, small_model, some_photos
from torch import Tensor

from patchlife.data import read_photo
from patchlife.errors import ConfigError, ImageError, NumericalError
from patchlife.training import target_cache as cache_module
from patchlife.training.target_cache import Photo, TargetCache, collect, content_of
from patchlife.training.targets import Targets, compute_targets


def ask(images: Tensor) -> Targets:
    model = small_model()
    return compute_targets(model.backbone, images, model.start)


def gather(photos: list[Photo], folder: Path, **changes) -> TargetCache:
    return collect(
        photos, **{"ask": ask, "preprocess": PREPROCESS, "folder": folder, "depends_on": {}, "batch_size": 5, **changes}
    )


def test_rows_hold_what_the_teacher_said(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    cache = gather(photos, tmp_path / "cache")
    assert len(cache) == len(photos)
    rows = [7, 0, 11]  # in any order
    images = torch.stack([PREPROCESS(read_photo(photos[row].path)) for row in rows])
    for stored, said in zip(cache.targets(rows), ask(images), strict=True):
        torch.testing.assert_close(stored, said, atol=5e-3, rtol=5e-3)
    assert cache.labels(rows).tolist() == [1, 0, 2]
    assert cache.names([7]) == [str(photos[7].path)]


def test_an_interrupted_collection_goes_on(tmp_path: Path) -> None:
    photos, asked = some_photos(tmp_path / "photos"), []

    def interrupted(images: Tensor) -> Targets:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(images))
        return ask(images)

    with pytest.raises(KeyboardInterrupt):
        gather(photos, tmp_path / "cache", ask=interrupted)
    cache = gather(photos, tmp_path / "cache", ask=lambda images: asked.append(len(images)) or ask(images))
    assert asked == [1, 5, 5, 2]  # one image for the shapes
    whole = gather(photos, tmp_path / "whole")
    for a, b in zip(cache.targets(range(12)), whole.targets(range(12)), strict=True):
        assert torch.equal(a, b)


def test_a_finished_collection_is_only_opened(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    gather(photos, tmp_path / "cache")

    def never(images: Tensor) -> Targets:
        raise AssertionError("asked again")

    assert len(gather(photos, tmp_path / "cache", ask=never)) == 12
    with pytest.raises(AssertionError, match="asked again"):  # other weights, other targets
        gather(photos, tmp_path / "cache", ask=never, depends_on={"backbone": "another"})


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
    assert torch.equal(cache.targets([3]).tokens, alone.targets([0]).tokens)
    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*03\.png"):
        gather(photos, tmp_path / "strict", max_unreadable=0.05)


def test_a_teacher_that_says_nan_is_stopped(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")

    def broken(images: Tensor) -> Targets:
        targets = ask(images)
        targets.logits[2:3] = torch.nan
        return targets

    with pytest.raises(NumericalError, match=r"02\.png"):
        gather(photos, tmp_path / "cache", ask=broken)


def test_shards_are_read_in_their_order_and_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = some_photos(tmp_path / "photos")
    drawn = [photos[index] for index in (7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4)]
    read: list[str] = []
    real = cache_module.load_batches
    monkeypatch.setattr(
        cache_module,
        "load_batches",
        lambda paths, *more: read.extend(path.name for path in paths) or real(paths, *more),
    )
    each = sum(2 * values[0].numel() for values in ask(torch.zeros(1, 3, 48, 48)))
    files = gather(drawn, tmp_path / "files", limit_bytes=9.5 * each)
    read.clear()
    shards = gather(in_shards(tmp_path, drawn, 2), tmp_path / "shards", limit_bytes=9.5 * each)
    assert read == [photo.path.name for photo in drawn[0:9:2] + drawn[1:9:2]]  # two shards, one after the other
    assert (
        [p.path.name for p in shards.photos] == [p.path.name for p in files.photos] == [p.path.name for p in drawn[:9]]
    )
    for ours, theirs in zip(shards.split(2), files.split(2), strict=True):
        rows = list(range(len(theirs)))[::-1]
        assert ours.labels(rows).tolist() == theirs.labels(rows).tolist()
        for a, b in zip(ours.targets(rows), theirs.targets(rows), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_a_corrupt_member_is_named_and_skipped_also_by_a_resumed_run(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photos[4].path.write_bytes(photos[4].path.read_bytes()[:60])
    samples, asked = in_shards(tmp_path, photos), []

    def interrupted(images: Tensor) -> Targets:
        asked.append(len(images))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(images)

    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*1\.tar/04\.png"):
        gather(samples, tmp_path / "strict", max_unreadable=0.05)
    with pytest.raises(KeyboardInterrupt):
        gather(samples, tmp_path / "cache", ask=interrupted, max_unreadable=0.1)
    cache = gather(samples, tmp_path / "cache", max_unreadable=0.1)
    assert [entry["path"] for entry in cache.skipped] == [str(tmp_path / "1.tar/04.png")]
    assert [photo.path.name for photo in cache.photos] == [p.path.name for i, p in enumerate(photos) if i != 4]
    whole = gather([p for i, p in enumerate(photos) if i != 4], tmp_path / "whole")
    for a, b in zip(cache.targets(range(11)), whole.targets(range(11)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    assert cache.names([4]) == [str(tmp_path / "2.tar/05.png")]


def test_a_cache_folder_loses_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    photos = some_photos(tmp_path / "photos")
    gather(photos, tmp_path)
    gather(photos[:5], tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "mine"
    assert photos[0].path.is_file()


def test_rows_stay_right_when_a_photo_is_called_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key knows resolved paths; so must the photos that failed."""
    photos = some_photos(tmp_path / "photos")
    photos[3].path.write_bytes(b"no photo")
    first = gather(photos, tmp_path / "cache", max_unreadable=0.5)
    monkeypatch.chdir(tmp_path)
    relative = [Photo(photo.path.relative_to(tmp_path), photo.label) for photo in photos]
    again = gather(relative, tmp_path / "cache", max_unreadable=0.5)
    assert len(first) == len(again) == len(photos) - 1
    assert again.labels(range(len(again))).tolist() == first.labels(range(len(first))).tolist()


def test_two_runs_that_share_a_folder_do_not_mix(tmp_path: Path) -> None:
    """The second begins while the first collects, on other photos: it waits, and neither reads the other's rows."""
    photos, results, threads = some_photos(tmp_path / "photos"), {}, []

    def second() -> None:
        results["second"] = gather(photos[:5], tmp_path / "cache")

    def slow(images: Tensor) -> Targets:
        if not threads:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            time.sleep(0.3)
        return ask(images)

    first = gather(photos, tmp_path / "cache", ask=slow)
    threads[0].join()
    for cache, count in ((first, 12), (results["second"], 5)):
        alone = gather(photos[:count], tmp_path / f"alone-{count}")
        assert len(cache) == count
        for ours, theirs in zip(cache.targets(range(count)), alone.targets(range(count)), strict=True):
            assert torch.equal(ours, theirs)
    again = gather(photos, tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(again.targets(range(12)), first.targets(range(12)), strict=True))


def test_replaced_photos_are_asked_about_again_and_moved_ones_have_the_same_content(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    before = gather(photos, tmp_path / "cache")
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    moved = gather([Photo(tmp_path / "moved" / photo.path.name) for photo in photos], tmp_path / "elsewhere")
    assert moved.content == before.content
    assert moved.seen != before.seen  # their labels are not known
    for place in (0, 3000, -1):  # of a large file: its beginning, its middle, its end
        content = bytearray(120_000)
        content[place if place != 3000 else 60_000] = 1
        photos[2].path.write_bytes(content)
        assert content_of(photos) != content_of([*photos[:2], Photo(tmp_path / "moved" / "02.png"), *photos[3:]])
    photos[2].path.write_bytes(photos[3].path.read_bytes())
    after = gather(photos, tmp_path / "cache")
    assert after.content != before.content
    assert torch.equal(after.targets([2]).tokens, after.targets([3]).tokens)


def test_arrays_that_are_gone_are_made_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    before = gather(photos, tmp_path / "cache").targets(range(12))
    (tmp_path / "cache" / "importance.npy").unlink()
    again = gather(photos, tmp_path / "cache").targets(range(12))
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
