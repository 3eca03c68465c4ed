"""Cached pixels are those of the photos; their size is bounded, and each photo is decoded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_targets import PREPROCESS, in_shards, some_photos
from PIL import Image

from patchlife.data import Preprocess, read_photo
from patchlife.errors import ConfigError, ImageError
from patchlife.training import photo_cache
from patchlife.training.photo_cache import PhotoCache, collect_photos, stored_size
from patchlife.training.target_cache import Photo

PIXELS = 3 * 64 * 64  # bytes of a photo: 9/7 of 48 is 62


def gather(photos: list[Photo], folder: Path, preprocess: Preprocess = PREPROCESS, **changes) -> PhotoCache:
    return collect_photos(photos, preprocess, folder, **{"batch_size": 5, **changes})


def test_the_stored_size_is_a_multiple_of_eight() -> None:
    assert stored_size((224, 224)) == (288, 288)
    assert stored_size((384, 224)) == (496, 288)
    assert stored_size((48, 7)) == (64, 16)


def test_rows_hold_whole_upright_photos_and_their_aspect_ratio(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide = Image.fromarray(np.arange(30 * 90 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 90, 3))
    wide.save(photos[7].path, exif=exif)
    cache = gather(photos, tmp_path / "cache")
    assert len(cache) == 12
    rows = [7, 0, 11]  # in any order
    pixels, aspects = cache.pixels(rows), cache.aspects(rows)
    assert aspects.tolist() == pytest.approx([1 / 3, 1, 1])
    for found, row in zip(pixels, rows, strict=True):
        expected = read_photo(photos[row].path).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert cache.names([7]) == [str(photos[7].path)]
    assert cache.labels(rows).tolist() == [1, 0, 2]


def test_cropping_of_the_preprocessing_does_not_count_but_the_channels_do(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos", 4)
    plain = gather(photos, tmp_path / "plain").pixels(range(4))
    other = replace(PREPROCESS, crop_fraction=0.5, crop_mode="border")
    assert torch.equal(gather(photos, tmp_path / "plain", other).pixels(range(4)), plain)
    grey = gather(photos, tmp_path / "grey", replace(PREPROCESS, mean=(0.5,), std=(0.2,)))
    expected = np.asarray(read_photo(photos[2].path).convert("L").resize((64, 64), Image.Resampling.BICUBIC))
    assert grey.pixels([2]).shape == (1, 1, 64, 64)
    assert np.abs(grey.pixels([2])[0, 0].numpy().astype(int) - expected).max() <= 1


def test_an_interrupted_collection_is_resumed_and_a_complete_one_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, read, original = some_photos(tmp_path / "photos"), [], photo_cache.load_pixels

    def interrupted(paths, *more):
        for batch in original(paths, *more):
            if len(read) == 2:
                raise KeyboardInterrupt
            read.append([paths[index].name for index in batch.indices])
            yield batch

    monkeypatch.setattr(photo_cache, "load_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gather(photos, tmp_path / "cache")
    read.append([])  # no more interruptions
    resumed = gather(photos, tmp_path / "cache")
    assert [name for batch in read for name in batch] == [photo.path.name for photo in photos]
    assert torch.equal(resumed.pixels(range(12)), gather(photos, tmp_path / "whole").pixels(range(12)))
    read.clear()
    gather(photos, tmp_path / "cache")
    assert not read


def test_disk_is_bounded(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    cache = gather(photos, tmp_path / "cache", limit_bytes=7.5 * (PIXELS + 4))
    assert [photo.path for photo in cache.photos] == [photo.path for photo in photos[:7]]
    assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.npy")) <= 7.5 * (PIXELS + 4) + 2 * 128
    with pytest.raises(ConfigError, match=r"the pixels of one photo take .* raise cache_gb"):
        gather(photos, tmp_path / "none", limit_bytes=PIXELS)


def test_unreadable_photos_are_named_and_skipped_up_to_a_limit(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    photos[3].path.write_bytes(b"not a photo")
    cache = gather(photos, tmp_path / "cache", max_unreadable=0.1)
    assert [entry["path"] for entry in cache.skipped] == [str(photos[3].path)]
    assert [photo.path for photo in cache.photos] == [p.path for i, p in enumerate(photos) if i != 3]
    assert torch.equal(cache.pixels([3]), gather([photos[4]], tmp_path / "alone").pixels([0]))
    with pytest.raises(ImageError, match=r"1 of 12 photos cannot be read.*03\.png"):
        gather(photos, tmp_path / "strict", max_unreadable=0.05)


def test_samples_of_shards_and_a_selection_keep_their_pixels(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    drawn = [photos[index] for index in (7, 2, 11, 0, 5, 9)]
    files, shards = gather(drawn, tmp_path / "files"), gather(in_shards(tmp_path, drawn, 2), tmp_path / "shards")
    assert torch.equal(files.pixels(range(6)), shards.pixels(range(6)))
    rest = shards.without([shards.photos[1], shards.photos[4]])
    assert [photo.path.name for photo in rest.photos] == ["07.png", "11.png", "00.png", "09.png"]
    assert torch.equal(rest.pixels([3, 0]), files.pixels([5, 0]))


def test_other_photos_and_replaced_ones_have_other_content(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    first = gather(photos, tmp_path / "cache").content
    assert gather(photos, tmp_path / "elsewhere").content == first
    assert gather(photos[1:], tmp_path / "cache").content != first
    photos[2].path.write_bytes(photos[3].path.read_bytes())
    after = gather(photos, tmp_path / "cache")
    assert after.content != first
    assert torch.equal(after.pixels([2]), after.pixels([3]))
