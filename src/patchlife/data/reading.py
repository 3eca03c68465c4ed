"""Read one photo safely: any bytes give an upright RGB image or an `ImageError`."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import ImageError
from .png import without_metadata

__all__ = ["MAX_BYTES", "MAX_PIXELS", "AnyPhoto", "Sample", "as_rgb", "read_photo"]

MAX_PIXELS = 64_000_000
"""Largest photo that is decoded, in pixels. A decoded photo takes 4 bytes per pixel: 256 MB."""

MAX_BYTES = 256 * 2**20
"""Largest file that is opened, in bytes."""

# A progressive JPEG may repeat a scan of the whole picture every 92 bytes: a file of 1.4 MB can need half an hour of
# decoding. Ordinary files have about ten scans; this limit allows 250 for a photo of MAX_PIXELS. (A photo with an
# embedded video, whose bytes can look like scan markers, stays far below the limit.)
_MAX_SCANNED_PIXELS = 250 * MAX_PIXELS

_EXPECTED = "a JPEG, PNG or WEBP photo"

# Formats that are often renamed to .jpg or downloaded by mistake: (signature, offset in bytes, name in errors).
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
_ORIENTATION = 0x0112  # the EXIF tag


class Sample(ABC):
    """A photo inside a shard or a data set. ``str`` gives its name in messages."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, like the name of a file."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The location: unique, and the same in every run. Samples are read fastest in the order of their locations."""

    @property
    @abstractmethod
    def label(self) -> str | int | None:
        """The label that is stored with the photo: a class name, a class index, or None."""

    @abstractmethod
    def content(self, max_bytes: int) -> bytes | Image.Image:
        """The bytes of the photo's file, or a picture if only the data set can decode it.

        Raises ImageError if the content cannot be read or is larger than ``max_bytes``.
        """


AnyPhoto = str | os.PathLike[str] | Sample
"""What `read_photo` accepts."""


def read_photo(photo: AnyPhoto, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Read a JPEG, PNG or WEBP file as an upright 8-bit RGB image.

    The size in the header is compared with ``max_pixels`` before any pixel is decoded. The EXIF orientation is
    applied. Only the first frame of an animation is read. Transparent pixels become white; 16-bit values are reduced
    to their high byte; colour profiles (as in timm) and text of any length are ignored.

    Args:
        photo: a file, or a sample of a shard or data set.
        max_pixels: limit on width x height, in pixels.
        max_bytes: limit on the size of the file, in bytes.

    Raises:
        ImageError: the photo cannot be read; the message says why. No other exception is raised.
    """
    path = photo if isinstance(photo, Sample) else Path(photo)
    content = path.content(max_bytes) if isinstance(path, Sample) else _read_bytes(path, max_bytes)
    try:
        image = _open(path, content) if isinstance(content, bytes) else content
        _check_pixels(path, image, max_pixels)
        if isinstance(content, bytes):
            _check_scans(path, image, content)
        image.load()
        return as_rgb(_upright(image, in_place=image is not content), path)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, for WEBP only
        raise _refusal(path, f"at most {max_pixels:,} pixels", str(error), "scale the photo down") from error
    # A damaged file can make Pillow raise almost any exception (OSError, ValueError, SyntaxError, struct.error,
    # MemoryError, ...). Only this photo must fail, not the run.
    except Exception as error:
        found = f"a damaged file ({error or type(error).__name__})"
        raise _refusal(path, _EXPECTED, found, "replace it with an intact copy") from error


def as_rgb(image: Image.Image, name: AnyPhoto = "image") -> Image.Image:
    """Convert a decoded image of any integer mode to 8-bit RGB; 16-bit values are scaled, not clipped.

    Args:
        image: an image in any mode but floating point; it is not changed.
        name: the name of the image in error messages.

    Raises:
        ImageError: pixel values of unknown range: floats, or integers beyond 16 bits.
    """
    if image.mode == "F":
        found = "floating-point values, whose range is unknown"
        raise _refusal(name, "8-bit or 16-bit values", found, "scale to 0..255 and save it as 8-bit")
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image, name)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    rgb = image.convert("RGB")
    rgb.info = {}  # an orientation tag left here would let a caller rotate the upright picture again
    return rgb


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most ``max_bytes``."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _refusal(path, _EXPECTED, "a folder", "give a file in it")
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
    """Parse the header. The first bytes decide the format, not the suffix.

    The format classes are called directly, because `Image.open` would try other formats, and would warn about large
    images (once per process) instead of raising an error.
    """
    stream = io.BytesIO(data)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(stream, str(path))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(without_metadata(data)), str(path))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(stream, str(path))
    raise _refusal(path, _EXPECTED, _other_format(data), "convert it to JPEG or PNG")


def _other_format(data: bytes) -> str:
    """The likely format of a file that is not a supported photo, for the error message."""
    if not data:
        return "an empty file"
    for signature, offset, name in _OTHER_FORMATS:
        if data[offset:].startswith(signature):
            return name
    return f"a file that begins with {data[:16]!r}"


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
        found = f"a JPEG with {scans} scans, which would take minutes to decode"
        raise _refusal(path, _EXPECTED, found, "save it again with another program")


def _upright(image: Image.Image, in_place: bool) -> Image.Image:
    """Apply the EXIF orientation; an orientation that cannot be read is ignored.

    Args:
        image: a decoded image.
        in_place: the image belongs to us and may be changed, which saves a copy.
    """
    try:
        if not in_place and image.getexif().get(_ORIENTATION, 1) != 1:
            image = image.copy()
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata; if only its update fails, the pixels have already been rotated in place
        return image
    return image


def _sixteen_to_eight_bits(image: Image.Image, name: AnyPhoto) -> Image.Image:
    """Keep the high byte, as Pillow does for 16-bit colour, so that grey and colour scans agree."""
    import numpy as np

    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        found = f"values from {values.min()} to {values.max()}"
        raise _refusal(name, "values within 0..65535", found, "scale to 0..255 and save it as 8-bit")
    if "transparency" in image.info:  # one grey value is transparent: it becomes white, as in other modes
        values = np.where(values == image.info["transparency"], 0xFFFF, values)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _refusal(name: AnyPhoto, expected: str, found: str, do: str) -> ImageError:
    return ImageError(
        f"{name if isinstance(name, Sample) else os.fspath(name)}: expected {expected}, found {found}; {do}"
    )
