from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from scenes import encoded, scene

from patchlife.data import MAX_PIXELS, Sample, as_rgb, read_photo
from patchlife.errors import ImageError

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}}


@pytest.fixture
def saved(tmp_path):
    """A function that writes bytes, or an image as PNG, and returns the path."""

    def save(content: bytes | Image.Image, name: str = "photo.png") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, "PNG"))
        return path

    return save


def refusal(path: Path, **limits: int) -> str:
    """The error message for a file."""
    with pytest.raises(ImageError) as caught:
        read_photo(path, **limits)
    assert str(path) in str(caught.value)
    return str(caught.value)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with any size in its header and the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


# --- photos that are read


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_every_pixel(saved, kind):
    read = read_photo(saved(encoded(scene(), kind, **LOSSLESS[kind]), f"photo.{kind.lower()}"))
    assert read.mode == "RGB"
    assert np.array_equal(read, scene())


def test_jpeg_reads_as_pillow_reads_it(saved):
    data = encoded(scene(), "JPEG")
    assert np.array_equal(read_photo(saved(data)), Image.open(io.BytesIO(data)))


def test_the_first_bytes_decide_the_format(saved):
    assert np.array_equal(read_photo(saved(encoded(scene(), "PNG"), "misnamed.jpg")), scene())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(saved, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), kind, exif=exif, **LOSSLESS.get(kind, {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    read = read_photo(saved(data))
    assert np.array_equal(read, upright)
    assert 0x0112 not in read.getexif()  # so that no caller applies it again


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photo_with_damaged_exif_is_read_without_rotation(saved):
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(read_photo(saved(data)), Image.open(io.BytesIO(encoded(scene(), "JPEG"))))


class Decoded(Sample):
    """A photo that only its data set can decode."""

    name, place, label = "decoded", "decoded", None

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def content(self, max_bytes: int) -> Image.Image:
        return self.image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_applied_if_other_exif_tags_are_damaged(saved, kind):
    """The width is stored as text, so Pillow can read the orientation but cannot rewrite the EXIF data."""
    tags = struct.pack("<HHHIHHHHII", 2, 0x0112, 3, 1, 6, 0, 0x0100, 2, 4, 0x41414141)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + bytes(4)
    data = encoded(scene(), kind, exif=exif, **LOSSLESS.get(kind, {}))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    plain = Image.open(io.BytesIO(encoded(scene(), kind, **LOSSLESS.get(kind, {}))))
    upright = plain.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(read_photo(saved(data)), upright)
    decoded = Image.open(io.BytesIO(data))
    assert np.array_equal(read_photo(Decoded(decoded)), upright), "a picture that a data set decodes is rotated too"
    assert decoded.size == plain.size, "the data set's own picture is not changed"


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_are_read(saved, size):
    assert read_photo(saved(Image.new("RGB", size, "red"))).size == size


def test_cmyk_becomes_rgb(saved):
    read = read_photo(saved(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert read.mode == "RGB"
    red, green, blue = read.getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(saved, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    image.putpixel((0, 0), (0, 0, 0, 255)[-len(mode) :])
    read = read_photo(saved(image))
    assert read.getpixel((0, 0)) == (0, 0, 0)
    assert read.getpixel((3, 3)) == (255, 255, 255)


def test_transparent_palette_colours_become_white(saved):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    read = read_photo(saved(encoded(image, "PNG", transparency=bytes([255, 0]))))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_becomes_white(saved, mode):
    image = Image.new(mode, (2, 1))
    clear = 7 if mode == "L" else (7, 7, 7)
    image.putpixel((1, 0), clear)
    read = read_photo(saved(encoded(image, "PNG", transparency=clear)))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_sixteen_bit_grey_is_scaled_not_clipped(saved):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    read = np.asarray(read_photo(saved(Image.fromarray(grey))))
    assert np.array_equal(read[..., 0], grey >> 8)
    assert np.array_equal(read[..., 0], read[..., 2])


def test_transparent_sixteen_bit_grey_becomes_white(saved):
    grey = np.array([[300, 40000]], dtype=np.uint16)
    stored = encoded(Image.fromarray(grey), "PNG", transparency=300)
    assert [read_photo(saved(stored)).getpixel((x, 0))[0] for x in (0, 1)] == [255, 40000 >> 8]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(saved, kind):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
    assert np.array_equal(read_photo(saved(encoded(scene(), kind, **frames, **LOSSLESS[kind]))), scene())


def test_integers_are_scaled_and_floats_are_refused():
    wide = Image.fromarray(np.full((2, 2), 40000, dtype=np.int32))
    assert as_rgb(wide).getpixel((0, 0)) == (40000 >> 8,) * 3
    with pytest.raises(ImageError, match=r"expected values within 0\.\.65535, found values from -1 to -1"):
        as_rgb(Image.fromarray(np.full((2, 2), -1, dtype=np.int32)))
    with pytest.raises(ImageError, match=r"scan\.tif: .* found floating-point values.*; scale to 0\.\.255"):
        as_rgb(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "scan.tif")


# --- files that are refused, and their error messages


def test_a_missing_file(tmp_path):
    message = refusal(tmp_path / "gone.jpg")
    assert message.endswith("gone.jpg: expected a JPEG, PNG or WEBP photo, found no such file; check the path")


def test_a_folder(tmp_path):
    assert "found a folder; give a file in it" in refusal(tmp_path)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "found a pipe or device" in refusal(tmp_path / "pipe.jpg")


def test_an_unreadable_file(saved, monkeypatch):
    path = saved(scene())

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "cannot be opened (Permission denied); check the path and its permissions" in refusal(path)


def test_invalid_paths():
    with pytest.raises(ImageError, match="cannot be opened"):
        read_photo("null\0byte.jpg")
    with pytest.raises(ImageError, match="File name too long"):
        read_photo("x" * 5000)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"hello, not a photo", "a file that begins with b'hello, not a pho'"),
        (b"GIF89a...", "a GIF"),
        (b"\0\0\0\x18ftypheic....", "a HEIC photo"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
def test_other_formats(saved, content, found):
    message = refusal(saved(content, "photo.jpg"))
    assert f"found {found}; convert it to JPEG or PNG" in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_files(saved, kind, keep):
    data = encoded(scene(400, 300), kind)
    message = refusal(saved(data[: int(keep * len(data))]))
    assert "found a damaged file (" in message
    assert message.endswith("replace it with an intact copy")


def test_a_bomb_is_refused_by_its_header(saved):
    bomb = png(60000, 60000, (b"IDAT", zlib.compress(b"")))
    assert len(bomb) < 100
    message = refusal(saved(bomb))
    assert "expected at most 64,000,000 pixels, found 60000 x 60000 = 3,600,000,000" in message
    assert message.endswith("scale the photo down")


@pytest.mark.parametrize(("side", "found"), [(9999, "9999 x 9999"), (16383, "268402689 pixels|16383 x 16383")])
def test_a_webp_bomb_is_refused_by_its_header(saved, side, found):
    small = encoded(scene(), "WEBP", save_all=True, append_images=[scene().rotate(180)])
    assert small[12:16] == b"VP8X"
    stored = (side - 1).to_bytes(3, "little")
    message = refusal(saved(small[:24] + stored + stored + small[30:], "bomb.webp"))
    assert "expected at most 64,000,000 pixels" in message
    assert re.search(found, message)  # the message of Pillow, or of patchlife if Pillow has no limit


def test_a_jpeg_with_thousands_of_scans_is_refused(saved):
    data = encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert read_photo(saved(data[:-2] + 10 * scan + data[-2:])).size == (2000, 2000)
    message = refusal(saved(data[:-2] + 4000 * scan + data[-2:]))
    assert "found a JPEG with 4010 scans, which would take minutes to decode; save it again" in message


def test_limits_can_be_changed(saved):
    path = saved(scene(40, 30))
    assert read_photo(path, max_pixels=1200).size == (40, 30)
    assert "at most 1,199 pixels, found 40 x 30 = 1,200" in refusal(path, max_pixels=1199)
    size = path.stat().st_size
    assert f"at most 10 bytes, found {size:,} bytes; save it as a smaller file" in refusal(path, max_bytes=10)
    assert MAX_PIXELS == 64_000_000


def with_chunks(*chunks: tuple[bytes, bytes], at_end: bool = False) -> bytes:
    """A valid PNG of the scene with chunks added after its header, or before its end."""
    data = encoded(scene(), "PNG")
    place = data.index(b"IEND") - 4 if at_end else 33
    return data[:place] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[place:]


LONG = zlib.compress(bytes(20_000_000))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "chunks",
    {
        "compressed": [(b"zTXt", b"Comment\0\0" + LONG)],
        "international": [(b"iTXt", b"Comment\0\1\0en\0Comment\0" + LONG)],
        "XMP": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)],
        "plain XMP": [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(3_000_000))],
        "raw EXIF": [(b"zTXt", b"Raw profile type exif\0\0" + LONG)],
        "plain": [(b"tEXt", b"Comment\0" + bytes(3_000_000))],
        "many": [(b"tEXt", b"%d\0" % i + bytes(1_000_000)) for i in range(70)],
        "much XMP": [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(1_000_000))] * 70,
        "one long": [(b"tEXt", b"Comment\0" + bytes(70_000_000))],
        "profile": [(b"iCCP", b"large\0\0" + LONG)],
        "invalid profile": [(b"iCCP", b"none")],
        "unknown compression": [(b"zTXt", b"Comment\0\7" + LONG), (b"iCCP", b"p\0\7" + LONG)],
        "short": [(b"pHYs", b""), (b"gAMA", b""), (b"cHRM", b"1"), (b"sRGB", b""), (b"tIME", b""), (b"zTXt", b"")],
        "private": [(b"prVt", bytes(5_000_000))],
    }.items(),
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_valid_png_is_read_with_any_metadata(saved, chunks, at_end):
    assert np.array_equal(read_photo(saved(with_chunks(*chunks[1], at_end=at_end))), scene())


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>' + bytes(3_000_000)),
        (b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    ],
)
def test_the_orientation_in_png_metadata_is_applied(saved, chunk):
    data = with_chunks((b"zTXt", b"Comment\0\0" + LONG), chunk)
    assert np.array_equal(read_photo(saved(data)), scene().transpose(Image.Transpose.ROTATE_270))


def test_compressed_metadata_does_not_exhaust_memory(saved):
    """A file of one megabyte with a gigabyte of compressed text is read in little memory."""
    import tracemalloc

    packer = zlib.compressobj(9)
    bomb = b"".join([packer.compress(bytes(2**24)) for _ in range(64)] + [packer.flush()])
    path = saved(with_chunks((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), (b"iCCP", b"p\0\0" + bomb)))
    tracemalloc.start()
    try:
        assert np.array_equal(read_photo(path), scene())
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_jpeg_with_a_large_profile_is_read(saved):
    data = encoded(scene(), "JPEG", icc_profile=bytes(3_000_000), comment=bytes(60_000))
    assert np.array_equal(read_photo(saved(data)), Image.open(io.BytesIO(encoded(scene(), "JPEG"))))


def test_a_webp_with_a_large_profile_is_read(saved):
    data = encoded(scene(), "WEBP", lossless=True, icc_profile=bytes(3_000_000), xmp=bytes(3_000_000))
    assert np.array_equal(read_photo(saved(data)), scene())


def test_a_png_with_plain_text_is_read(saved):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "taken on a Tuesday")
    assert np.array_equal(read_photo(saved(encoded(scene(), "PNG", pnginfo=notes))), scene())


def with_large_profile(data: bytes) -> bytes:
    return data[:33] + png_chunk(b"iCCP", b"large\0\0" + LONG) + data[33:]


def test_transparency_of_a_png_is_kept_when_metadata_is_removed(saved):
    image = scene().convert("P")
    indices = np.asarray(image)
    transparent = int(indices[0, 0])
    expected = np.asarray(image.convert("RGB")).copy()
    expected[indices == transparent] = 255
    assert not np.array_equal(expected, image.convert("RGB"))
    data = encoded(image, "PNG", transparency=transparent)
    assert np.array_equal(read_photo(saved(with_large_profile(data))), expected)


def test_the_first_frame_of_a_png_is_kept_when_metadata_is_removed(saved):
    data = encoded(scene(), "PNG", save_all=True, append_images=[scene().rotate(180)])
    assert np.array_equal(read_photo(saved(with_large_profile(data))), scene())


# --- any bytes give an image or an ImageError

SEEDS = [
    encoded(scene(), "JPEG"),
    encoded(scene(), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"),
    encoded(scene(), "PNG"),
    encoded(scene().convert("P"), "PNG", transparency=b"\0\x80"),
    encoded(scene(), "PNG", save_all=True, append_images=[scene().rotate(180)]),
    encoded(scene(), "WEBP"),
    encoded(scene(), "WEBP", save_all=True, append_images=[scene().rotate(180)]),
]


def read_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with contextlib.suppress(ImageError):
        assert read_photo(path, max_pixels=100_000).mode == "RGB"


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "photo.jpg"


@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=300), head=st.sampled_from([0, 4, 16, 40]), seed=st.sampled_from(SEEDS))
@example(data=b"\xff\xd8\xff", head=0, seed=b"")
@example(data=b"\x89PNG\r\n\x1a\n", head=0, seed=b"")
@example(data=b"RIFF\0\0\0\0WEBP", head=0, seed=b"")
def test_random_bytes(target, data, head, seed):
    read_or_refuse(target, seed[:head] + data)


@settings(deadline=None, max_examples=400)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_damaged_photos(target, seed, data):
    """Flip some bits, mostly in the header, then truncate the file or not."""
    damaged = bytearray(seed)
    last = len(seed) - 1
    places = st.one_of(st.integers(0, min(200, last)), st.integers(0, last))
    for place, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=12)):
        damaged[place] ^= 1 << bit
    keep = data.draw(st.one_of(st.just(len(seed)), st.integers(0, len(seed))))
    read_or_refuse(target, bytes(damaged[:keep]))


@settings(deadline=None, max_examples=200)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_damaged_png_chunks_with_valid_checksums(target, seed, data):
    """Damage PNG chunks and correct their checksums, so that the damage reaches the parsers."""
    if not seed.startswith(b"\x89PNG"):
        return
    damaged, place = bytearray(seed), 8
    while place < len(damaged):
        (length,) = struct.unpack_from(">I", damaged, place)
        if length and data.draw(st.booleans()):
            damaged[place + 8 + data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
        body = damaged[place + 4 : place + 8 + length]
        struct.pack_into(">I", damaged, place + 8 + length, zlib.crc32(body))
        place += 12 + length
    read_or_refuse(target, bytes(damaged))
