from __future__ import annotations

import threading
from itertools import count

import pytest
import torch
from scenes import encoded, scene

import patchlife.data.loading as loading
from patchlife.data import Preprocess, load_batches, read_photo
from patchlife.errors import ConfigError

SMALL = Preprocess(size=(16, 16))


@pytest.fixture
def photos(tmp_path):
    """Ten files; the third and the sixth are not photos."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(encoded(scene(40 + i, 30), "PNG"))
    (tmp_path / "2.png").write_bytes(b"text")
    (tmp_path / "5.png").write_bytes(b"")
    return [tmp_path / f"{i}.png" for i in range(10)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 50])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_path_appears_once_and_in_order(photos, batch_size, workers):
    batches = list(load_batches(photos, SMALL, batch_size, workers))
    seen = [sorted([*batch.indices, *(index for index, _ in batch.failures)]) for batch in batches]
    assert seen == [list(range(10))[i : i + batch_size] for i in range(0, 10, batch_size)]
    assert [index for batch in batches for index, _ in batch.failures] == [2, 5]
    images = torch.cat([batch.images for batch in batches])
    indices = [index for batch in batches for index in batch.indices]
    assert torch.equal(images, torch.stack([SMALL(read_photo(photos[index])) for index in indices]))


def test_failures_have_a_message_and_no_traceback(photos):
    (batch,) = load_batches(photos, SMALL, 10)
    (_, first), (_, second) = batch.failures
    assert "2.png: expected a JPEG, PNG or WEBP photo, found a file that begins with b'text'" in str(first)
    assert "5.png: expected a JPEG, PNG or WEBP photo, found an empty file" in str(second)
    assert first.__traceback__ is None
    assert first.__cause__ is None


def test_a_batch_without_readable_photos_is_an_empty_tensor(photos):
    (batch,) = load_batches([photos[2]], SMALL, 4)
    assert batch.indices == []
    assert batch.images.shape == (0, 3, 16, 16)
    assert len(batch.failures) == 1


def test_no_paths_no_batches():
    assert list(load_batches([], SMALL, 4)) == []


def test_look_ahead_is_bounded(photos):
    """The paths may be endless: at most two batches are taken ahead."""
    taken = count()
    endless = (photos[next(taken) * 0] for _ in count())
    batches = load_batches(endless, SMALL, 3, workers=2)
    next(batches)
    assert next(taken) == 6
    batches.close()


def test_stopping_early_ends_the_threads(photos):
    before = threading.active_count()
    batches = load_batches(photos * 100, SMALL, 2, workers=3)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_bug_is_raised_and_not_reported_as_a_failed_photo(photos, monkeypatch):
    def broken(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "read_photo", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        list(load_batches(photos, SMALL, 4))


def test_invalid_settings(photos):
    with pytest.raises(ConfigError, match="batch_size and workers must be at least 1, got 0 and 2"):
        load_batches(photos, SMALL, 0, workers=2)
