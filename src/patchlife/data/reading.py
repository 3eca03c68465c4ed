"""Read one photo, or say why not. Any bytes in, an upright RGB image or an `ImageError` out."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import ImageError
from .png import seen_part

__all__ = ["MAX_BYTES", "MAX_PIXELS", "AnyPhoto", "Sample", "as_rgb", "read_photo"]

MAX_PIXELS = 64_000_000
"""Largest photo that is decoded, in pixels. Decoded, it takes 4 bytes a pixel: 256 MB."""

MAX_BYTES = 256 * 2**20
"""Largest file that is opened, in bytes."""

# A progressive JPEG may repeat a scan of the whole picture every 92 bytes: one of 1.4 MB can ask for half an
# hour of decoding. Honest files have about ten scans; this allows 250 for a photo of MAX_PIXELS. (Photos that
# carry a short film, whose bytes look like scans now and then, stay far below it.)
_MAX_SCANNED_PIXELS = 250 * MAX_PIXELS

_EXPECTED = "a JPEG, PNG or WEBP photo"

# What people rename to .jpg, or download by mistake: (first bytes, where they stand, what it is).
_OTHER_FORMATS = (
    (b"GIF8", 0, "a GIF"),
    (b"BM", 0, "a BMP"),
    (b"II*\0", 0, "a TIFF"),
    (b"MM\0*", 0, "a TIFF"),
    (b"ftypheic", 4, "a HEIC photo"),
    (b"ftypheix", 4, "a HEIC photo"),
    (b"ftypmif1", 4, "a HEIC photo"),
    (b"ftypavif", 4, "an AVIF photo"),
    (b"%PDF", 0, "a PDF"),
    (b"PK\3\4", 0, "a ZIP archive"),
    (b"\x1f\x8b", 0, "a gzip archive"),
)

# EXIF orientation -> what turns the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Sample(ABC):
    """A photo that is no file of its own, but part of a shard or of a data set. ``str`` is its name in messages."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, as a file's."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it lies: of this sample alone, the same in every run. In its order, samples are read fastest."""

    @property
    @abstractmethod
    def label(self) -> str | int | None:
        """What it says it shows: the name of a class, its index, or None."""

    @abstractmethod
    def content(self, max_bytes: int) -> bytes | Image.Image:
        """The bytes of its file, or a picture where only the data set can decode it.

        Raises ImageError when it cannot be had, or is larger than ``max_bytes``.
        """


AnyPhoto = str | os.PathLike[str] | Sample
"""What `read_photo` opens."""


def read_photo(photo: AnyPhoto, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Read a JPEG, PNG or WEBP file as an upright 8-bit RGB image.

    The size is taken from the header and held against ``max_pixels`` before a single pixel is decoded.
    EXIF orientation is applied first. Of an animation, the first frame is read. Transparency is laid on
    white; 16-bit samples keep their high byte; colour profiles are ignored, as in timm, and so is text of any length.

    Args:
        photo: the file, or a sample of something larger.
        max_pixels: limit on width x height, in pixels.
        max_bytes: limit on the size of the file, in bytes.

    Raises:
        ImageError: whatever is wrong with the file; the message names it. Nothing else is raised.
    """
    path = photo if isinstance(photo, Sample) else Path(photo)
    content = path.content(max_bytes) if isinstance(path, Sample) else _read_bytes(path, max_bytes)
    try:
        image = _open(path, content) if isinstance(content, bytes) else content
        _check_pixels(path, image, max_pixels)
        if isinstance(content, bytes):
            _check_scans(path, image, content)
        image.load()
        return as_rgb(_upright(image), path)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, much higher limit, for WEBP only
        raise _refusal(path, f"at most {max_pixels:,} pixels", str(error), "scale the photo down") from error
    # A damaged file can make Pillow raise nearly anything (OSError, ValueError, SyntaxError, struct.error,
    # MemoryError, ...). Its photo fails; the thousand others of the run must not.
    except Exception as error:
        found = f"a damaged one ({error or type(error).__name__})"
        raise _refusal(path, _EXPECTED, found, "replace the file by an intact copy") from error


def as_rgb(image: Image.Image, name: AnyPhoto = "image") -> Image.Image:
    """Convert a decoded image of any integer mode to 8-bit RGB, without clipping it to white.

    Args:
        image: any mode but floating point; not changed.
        name: what error messages call it.

    Raises:
        ImageError: samples whose range is unknown: floats, or integers beyond 16 bits.
    """
    if image.mode == "F":
        found = "floating-point samples, whose range is unknown"
        raise _refusal(name, "8-bit or 16-bit samples", found, "scale to 0..255 and save it as 8-bit")
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image, name)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    rgb = image.convert("RGB")
    rgb.info = {}  # an orientation tag left here would turn the upright picture a second time
    return rgb


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """The whole file, if it is a regular one of bearable size."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _refusal(path, _EXPECTED, "a folder", "name a file in it")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise _refusal(path, _EXPECTED, "a pipe or device", "save it as a file first")
        if status.st_size > max_bytes:
            found = f"{status.st_size:,} bytes"
            raise _refusal(path, f"at most {max_bytes:,} bytes", found, "save it as a smaller file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _refusal(path, _EXPECTED, "no such file", "check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = f"a file that cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise _refusal(path, _EXPECTED, found, "check the path and its permissions") from error


def _open(path: Path | Sample, data: bytes) -> Image.Image:
    """Parse the header. The format is what the first bytes say, never the file's name.

    The format classes are called directly: `Image.open` would warn about large images (once per process, in
    whichever thread comes first) where we want an error, and would guess among formats.
    """
    stream = io.BytesIO(data)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(stream, str(path))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(seen_part(data)), str(path))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(stream, str(path))
    raise _refusal(path, _EXPECTED, _what_is(data), "convert it to JPEG or PNG")


def _what_is(data: bytes) -> str:
    """A guess, for the error message, at what a file is that is no photo."""
    if not data:
        return "an empty file"
    for magic, start, what in _OTHER_FORMATS:
        if data[start:].startswith(magic):
            return what
    beginning = data[:16]
    return f"a file that begins with {beginning!r}"


def _check_pixels(path: Path | Sample, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _refusal(path, _EXPECTED, f"a size of {width} x {height} pixels", "replace the file")
    if width * height > max_pixels:
        found = f"{width} x {height} = {width * height:,}"
        raise _refusal(path, f"at most {max_pixels:,} pixels", found, "scale the photo down")


def _check_scans(path: Path | Sample, image: Image.Image, data: bytes) -> None:
    scans = data.count(b"\xff\xda") if isinstance(image, JpegImageFile) else 0
    if scans * image.width * image.height > _MAX_SCANNED_PIXELS:
        found = f"one of {scans} scans, which would take minutes to decode"
        raise _refusal(path, _EXPECTED, found, "save it anew")


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF orientation asks; a tag that cannot be read asks for nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata is no reason to lose a sound picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _sixteen_to_eight_bits(image: Image.Image, name: AnyPhoto) -> Image.Image:
    """Keep the high byte, as Pillow itself does for 16-bit colour, so grey and colour scans agree."""
    import numpy as np

    samples = np.asarray(image)
    if samples.size and (samples.min() < 0 or samples.max() > 0xFFFF):
        found = f"samples from {samples.min()} to {samples.max()}"
        raise _refusal(name, "samples within 0..65535", found, "scale to 0..255 and save it as 8-bit")
    if "transparency" in image.info:  # one 16-bit grey that counts as see-through: white, like all others
        samples = np.where(samples == image.info["transparency"], 0xFFFF, samples)
    return Image.fromarray((samples >> 8).astype(np.uint8))


def _refusal(name: AnyPhoto, expected: str, found: str, do: str) -> ImageError:
    return ImageError(
        f"{name if isinstance(name, Sample) else os.fspath(name)}: expected {expected}, found {found}; {do}"
    )
