"""Cached targets equal computed ones, their size is bounded, and they are computed once."""

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


def targets_of(images: Tensor) -> Targets:
    model = small_model()
    return compute_targets(model.backbone, images, model.start)


def gather(photos: list[Photo], folder: Path, **changes) -> TargetCache:
    return collect(
        photos,
        **{
            "targets_of": targets_of,
            "preprocess": PREPROCESS,
            "folder": folder,
            "depends_on": {},
            "batch_size": 5,
            **changes,
        },
    )


def test_rows_hold_the_computed_targets(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    cache = gather(photos, tmp_path / "cache")
    assert len(cache) == len(photos)
    rows = [7, 0, 11]  # in any order
    images = torch.stack([PREPROCESS(read_photo(photos[row].path)) for row in rows])
    for stored, computed in zip(cache.targets(rows), targets_of(images), strict=True):
        torch.testing.assert_close(stored, computed, atol=5e-3, rtol=5e-3)
    assert cache.labels(rows).tolist() == [1, 0, 2]
    assert cache.names([7]) == [str(photos[7].path)]


def test_an_interrupted_collection_is_resumed(tmp_path: Path) -> None:
    photos, batches = some_photos(tmp_path / "photos"), []

    def interrupted(images: Tensor) -> Targets:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(images))
        return targets_of(images)

    with pytest.raises(KeyboardInterrupt):
        gather(photos, tmp_path / "cache", targets_of=interrupted)
    cache = gather(
        photos, tmp_path / "cache", targets_of=lambda images: batches.append(len(images)) or targets_of(images)
    )
    assert batches == [1, 5, 5, 2]  # one image for the shapes
    whole = gather(photos, tmp_path / "whole")
    for a, b in zip(cache.targets(range(12)), whole.targets(range(12)), strict=True):
        assert torch.equal(a, b)


def test_a_complete_collection_is_not_computed_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    gather(photos, tmp_path / "cache")

    def never(images: Tensor) -> Targets:
        raise AssertionError("computed again")

    assert len(gather(photos, tmp_path / "cache", targets_of=never)) == 12
    with pytest.raises(AssertionError, match="computed again"):  # other weights, other targets
        gather(photos, tmp_path / "cache", targets_of=never, depends_on={"backbone": "another"})


def test_disk_is_bounded(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photo_bytes = sum(2 * values[0].numel() for values in targets_of(torch.zeros(1, 3, 48, 48)))
    cache = gather(photos, tmp_path / "cache", limit_bytes=7.5 * photo_bytes)
    assert len(cache) == 7
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.npy"))
    assert written <= 7.5 * photo_bytes + 4 * 128  # four headers
    with pytest.raises(ConfigError, match="raise cache_gb"):
        gather(photos, tmp_path / "none", limit_bytes=photo_bytes - 1)


def test_unreadable_photos_are_named_and_skipped_up_to_a_limit(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photos[3].path.write_bytes(b"not a photo")
    cache = gather(photos, tmp_path / "cache", max_unreadable=0.1)
    assert [entry["path"] for entry in cache.skipped] == [str(photos[3].path)]
    assert [photo.path for photo in cache.photos] == [p.path for i, p in enumerate(photos) if i != 3]
    alone = gather([photos[4]], tmp_path / "alone")
    assert torch.equal(cache.targets([3]).tokens, alone.targets([0]).tokens)
    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*03\.png"):
        gather(photos, tmp_path / "strict", max_unreadable=0.05)


def test_nan_targets_raise_an_error_that_names_the_photo(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")

    def broken(images: Tensor) -> Targets:
        targets = targets_of(images)
        targets.output[2:3] = torch.nan
        return targets

    with pytest.raises(NumericalError, match=r"02\.png"):
        gather(photos, tmp_path / "cache", targets_of=broken)


def test_shards_are_read_sequentially_and_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = some_photos(tmp_path / "photos")
    drawn = [photos[index] for index in (7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4)]
    read: list[str] = []
    original = cache_module.load_batches
    monkeypatch.setattr(
        cache_module,
        "load_batches",
        lambda paths, *more: read.extend(path.name for path in paths) or original(paths, *more),
    )
    photo_bytes = sum(2 * values[0].numel() for values in targets_of(torch.zeros(1, 3, 48, 48)))
    files = gather(drawn, tmp_path / "files", limit_bytes=9.5 * photo_bytes)
    read.clear()
    shards = gather(in_shards(tmp_path, drawn, 2), tmp_path / "shards", limit_bytes=9.5 * photo_bytes)
    assert read == [photo.path.name for photo in drawn[0:9:2] + drawn[1:9:2]]  # two shards, one after the other
    assert (
        [p.path.name for p in shards.photos] == [p.path.name for p in files.photos] == [p.path.name for p in drawn[:9]]
    )
    for from_shards, from_files in zip(shards.split(2), files.split(2), strict=True):
        rows = list(range(len(from_files)))[::-1]
        assert from_shards.labels(rows).tolist() == from_files.labels(rows).tolist()
        for a, b in zip(from_shards.targets(rows), from_files.targets(rows), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_a_corrupt_member_is_named_and_skipped_in_a_resumed_run_too(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photos[4].path.write_bytes(photos[4].path.read_bytes()[:60])
    samples, batches = in_shards(tmp_path, photos), []

    def interrupted(images: Tensor) -> Targets:
        batches.append(len(images))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return targets_of(images)

    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*1\.tar/04\.png"):
        gather(samples, tmp_path / "strict", max_unreadable=0.05)
    with pytest.raises(KeyboardInterrupt):
        gather(samples, tmp_path / "cache", targets_of=interrupted, max_unreadable=0.1)
    cache = gather(samples, tmp_path / "cache", max_unreadable=0.1)
    assert [entry["path"] for entry in cache.skipped] == [str(tmp_path / "1.tar/04.png")]
    assert [photo.path.name for photo in cache.photos] == [p.path.name for i, p in enumerate(photos) if i != 4]
    whole = gather([p for i, p in enumerate(photos) if i != 4], tmp_path / "whole")
    for a, b in zip(cache.targets(range(11)), whole.targets(range(11)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    assert cache.names([4]) == [str(tmp_path / "2.tar/05.png")]


def test_other_files_in_the_cache_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    photos = some_photos(tmp_path / "photos")
    gather(photos, tmp_path)
    gather(photos[:5], tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "mine"
    assert photos[0].path.is_file()


def test_relative_paths_of_the_same_photos_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreadable photos too are found by their index, not by their path."""
    photos = some_photos(tmp_path / "photos")
    photos[3].path.write_bytes(b"no photo")
    first = gather(photos, tmp_path / "cache", max_unreadable=0.5)
    monkeypatch.chdir(tmp_path)
    relative = [Photo(photo.path.relative_to(tmp_path), photo.label) for photo in photos]
    again = gather(relative, tmp_path / "cache", max_unreadable=0.5)
    assert len(first) == len(again) == len(photos) - 1
    assert again.labels(range(len(again))).tolist() == first.labels(range(len(first))).tolist()


def test_two_runs_that_share_a_folder_take_turns(tmp_path: Path) -> None:
    """The second run, on other photos, starts while the first collects; each gets its own rows."""
    photos, results, threads = some_photos(tmp_path / "photos"), {}, []

    def second() -> None:
        results["second"] = gather(photos[:5], tmp_path / "cache")

    def slow(images: Tensor) -> Targets:
        if not threads:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            time.sleep(0.3)
        return targets_of(images)

    first = gather(photos, tmp_path / "cache", targets_of=slow)
    threads[0].join()
    for cache, count in ((first, 12), (results["second"], 5)):
        alone = gather(photos[:count], tmp_path / f"alone-{count}")
        assert len(cache) == count
        for a, b in zip(cache.targets(range(count)), alone.targets(range(count)), strict=True):
            assert torch.equal(a, b)
    again = gather(photos, tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(again.targets(range(12)), first.targets(range(12)), strict=True))


def test_replaced_photos_are_computed_again_and_moved_ones_have_the_same_content(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    before = gather(photos, tmp_path / "cache")
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    moved = gather([Photo(tmp_path / "moved" / photo.path.name) for photo in photos], tmp_path / "elsewhere")
    assert moved.content == before.content
    assert moved.labelled_content != before.labelled_content  # their labels are unknown
    for place in (0, 3000, -1):  # of a large file: its beginning, its middle, its end
        content = bytearray(120_000)
        content[place if place != 3000 else 60_000] = 1
        photos[2].path.write_bytes(content)
        assert content_of(photos) != content_of([*photos[:2], Photo(tmp_path / "moved" / "02.png"), *photos[3:]])
    photos[2].path.write_bytes(photos[3].path.read_bytes())
    after = gather(photos, tmp_path / "cache")
    assert after.content != before.content
    assert torch.equal(after.targets([2]).tokens, after.targets([3]).tokens)


def test_missing_arrays_are_computed_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    before = gather(photos, tmp_path / "cache").targets(range(12))
    (tmp_path / "cache" / "importance.npy").unlink()
    again = gather(photos, tmp_path / "cache").targets(range(12))
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
