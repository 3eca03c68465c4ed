"""Small photos as bytes, and bytes that are not photos, each with a part of its message."""

from __future__ import annotations

import io
import struct
import zlib

from small import photo


def encoded(seed: int, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    photo(seed, 150, 120).save(stream, kind, **options)
    return stream.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes whose header states 3.6 billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


BAD = {
    "0 bytes": (b"", "an empty file"),
    "not an image": (bytes(range(1, 100)), "a file that begins with"),
    "truncated": (encoded(1, "JPEG")[:900], "a damaged file"),
    "bomb": (bomb(), "at most 64,000,000 pixels"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a file that begins with b.<svg"),
    "HTML": (b"<!doctype html><html></html>", "a file that begins with b.<!doctype"),
    "GIF": (b"GIF89a" + b"0" * 50, "a GIF"),
}
