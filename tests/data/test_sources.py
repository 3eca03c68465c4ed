"""Photos in shards and data sets: a fixed order, and the same limits as for files."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import encoded, scene

from patchlife.data import Preprocess, Sample, list_samples, load_batches, read_photo
from patchlife.errors import ConfigError, ImageError

JPEG, PNG = encoded(scene(), "JPEG"), encoded(scene(), "PNG")


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two shards."""
    shard(tmp_path / "0.tar", {"a.cls": b"3\n", "a.jpg": JPEG, "deep/b.PNG": PNG, "deep/b.json": b'{"label": "cat"}'})
    shard(
        tmp_path / "1.tar",
        {"c.webp": encoded(scene(), "WEBP"), "c.txt": b"a caption", "._c.jpg": b"", "d.seg.png": PNG},
    )
    return tmp_path


def test_shards_list_their_photos_in_order(two: Path) -> None:
    found = list_samples([f"{two}/*.tar"])
    assert [str(photo) for photo in found] == [f"{two}/0.tar/a.jpg", f"{two}/0.tar/deep/b.PNG", f"{two}/1.tar/c.webp"]
    assert [photo.name for photo in found] == ["a.jpg", "b.PNG", "c.webp"]
    assert [photo.label for photo in found] == ["3", "cat", None]
    assert sorted(photo.place for photo in found) == [photo.place for photo in found]
    assert [str(p) for p in list_samples([f"{two}/1.tar", f"{two}/*.tar"])] == [str(found[i]) for i in (2, 0, 1)]


def test_members_give_the_same_images_as_files(two: Path) -> None:
    for photo in list_samples([f"{two}/0.tar"]):
        file = two / photo.name
        file.write_bytes(JPEG if file.suffix == ".jpg" else PNG)
        assert np.array_equal(read_photo(photo), read_photo(file))


def test_files_come_first(two: Path) -> None:
    (two / "z.jpg").write_bytes(JPEG)
    assert [str(photo.name) for photo in list_samples([f"{two}/1.tar", str(two)])] == ["z.jpg", "c.webp"]


def test_a_member_that_cannot_be_read_fails_alone_and_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"a.jpg": JPEG, "b.jpg": JPEG[:200], "c.jpg": b"no photo", "d.jpg": JPEG})
    (batch,) = load_batches(list_samples([str(path)]), Preprocess(size=(16, 16)), 4)
    assert batch.indices == [0, 3]
    for name, (_, error) in zip("bc", batch.failures, strict=True):
        assert str(error).startswith(f"{path}/{name}.jpg: expected a JPEG")


def test_members_have_the_limits_of_files(two: Path) -> None:
    photo = list_samples([f"{two}/0.tar"])[0]
    with pytest.raises(ImageError, match=r"0\.tar/a\.jpg: expected at most 1,000 pixels"):
        read_photo(photo, max_pixels=1000)
    with pytest.raises(ImageError, match=r"0\.tar/a\.jpg: expected at most 100 bytes"):
        read_photo(photo, max_bytes=100)


def test_a_truncated_shard_is_refused(two: Path) -> None:
    whole = (two / "0.tar").read_bytes()
    for cut in (len(JPEG), 700, 3):
        (two / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=r"cut\.tar: expected a complete, uncompressed \.tar file"):
            list_samples([f"{two}/cut.tar"])


def test_a_damaged_header_is_not_read_as_the_end(two: Path) -> None:
    data = bytearray((two / "0.tar").read_bytes())
    at = data.index(b"deep/b.PNG")
    data[at + 3] ^= 1
    (two / "bad.tar").write_bytes(data)
    with pytest.raises(ImageError, match=r"a damaged header after a\.jpg"):
        list_samples([f"{two}/bad.tar"])


def test_a_shard_that_became_shorter_is_an_error(two: Path) -> None:
    photo = list_samples([f"{two}/0.tar"])[1]
    (two / "0.tar").write_bytes((two / "0.tar").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"b\.PNG: expected [\d,]+ bytes, found [\d,]+; copy the shard"):
        read_photo(photo)


def test_links_in_a_shard_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo(f"{kind.decode()}.jpg")
            entry.type, entry.linkname = kind, "/etc/hostname"
            tar.addfile(entry)
    with pytest.raises(ImageError, match="found none"):
        list_samples([str(tmp_path / "s.tar")])


@pytest.mark.parametrize(
    "name", ["none.tar", "no*.tar", "packed.tar.gz", "empty.tar"], ids=["missing", "glob", "compressed", "empty"]
)
def test_paths_that_are_not_shards_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz"):
        pass
    shard(tmp_path / "empty.tar", {})
    with pytest.raises(ImageError, match=f"{name.replace('*', '.')}: expected"):
        list_samples([str(tmp_path / name)])


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"label": 1.5}', b'{"label": true}', b"\xff"])
def test_an_invalid_label_is_an_error_and_the_photo_is_still_read(tmp_path: Path, content: bytes) -> None:
    (photo,) = list_samples([str(shard(tmp_path / "s.tar", {"a.jpg": JPEG, "a.json": content}))])
    with pytest.raises(ImageError, match=r"a\.jpg: expected a class name or index in its \.json file"):
        _ = photo.label
    assert read_photo(photo).size == scene().size


# ---- data sets of timm


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name, data in {"train/cat/a.jpg": JPEG, "train/dog/b.png": PNG, "val/dog/c.png": PNG}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "torch/folder"])
def test_a_folder_opened_by_timm(classes: Path, kind: str) -> None:
    data_set = f"timm:{kind}:train:{classes}"
    found = list_samples([data_set])
    assert [str(photo) for photo in found] == [f"{data_set}[0]", f"{data_set}[1]"]
    assert [photo.name for photo in found] == [f"{kind}[0]", f"{kind}[1]"]
    assert [photo.label for photo in found] == ["cat", "dog"]
    assert all(isinstance(photo, Sample) and read_photo(photo).size == scene().size for photo in found)
    assert len(list_samples([f"timm:{kind}:val:{classes}"])) == 1
    copies = pickle.loads(pickle.dumps(found))  # as it is sent to another process
    assert [str(copy) for copy in copies] == [str(photo) for photo in found]
    assert read_photo(copies[0]).tobytes() == read_photo(found[0]).tobytes()


@pytest.mark.parametrize("kind", ["folder", "torch/folder"])
def test_a_damaged_sample_is_not_replaced_by_the_next_one(classes: Path, kind: str) -> None:
    (classes / "train/cat/a.jpg").write_bytes(b"no photo")
    damaged, intact = list_samples([f"timm:{kind}:train:{classes}"])
    with pytest.raises(ImageError, match=r"\[0\]: expected a"):
        read_photo(damaged)
    assert read_photo(intact).size == scene().size


def test_a_picture_that_the_data_set_decodes_becomes_rgb(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data

    digits = [(Image.new("L", (28, 28), 7), 4)]
    monkeypatch.setattr(timm.data, "create_dataset", lambda *given, **more: digits)
    (photo,) = list_samples(["timm:torch/mnist"])
    assert read_photo(photo).getpixel((0, 0)) == (7, 7, 7)
    assert (photo.label, str(photo)) == (4, "timm:torch/mnist[0]")
    with pytest.raises(ImageError, match="at most 100 pixels"):
        read_photo(photo, max_pixels=100)


def test_data_sets_that_cannot_be_opened(classes: Path) -> None:
    with pytest.raises(ConfigError, match=r"timm:torch/nothing:train: expected timm:NAME"):
        list_samples(["timm:torch/nothing:train"])
    with pytest.raises(ConfigError, match=r"timm:wds/x: .* give the shards"):
        list_samples(["timm:wds/x"])


def test_a_json_label_may_be_an_index(tmp_path: Path) -> None:
    members = {"a.jpg": JPEG, "a.json": json.dumps({"label": 5}).encode(), "b.jpg": JPEG, "b.json": b"{}"}
    assert [photo.label for photo in list_samples([str(shard(tmp_path / "s.tar", members))])] == [5, None]


def test_a_member_of_negative_size_is_an_error(tmp_path: Path) -> None:
    """tarfile would seek back and read the same header endlessly."""
    path = shard(tmp_path / "0.tar", {"a.jpg": JPEG})
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(ImageError, match="a negative size"):
        list_samples([str(path)])


def test_labels_of_folders_are_their_names(tmp_path: Path) -> None:
    """The index of a class in a subset is not its index in the model."""
    for wordnet in ("n03000684", "n01440764"):
        (tmp_path / "train" / wordnet).mkdir(parents=True)
        (tmp_path / "train" / wordnet / "a.jpg").write_bytes(JPEG)
    found = list_samples([f"timm:folder:train:{tmp_path}"])
    assert sorted(str(photo.label) for photo in found) == ["n01440764", "n03000684"]
