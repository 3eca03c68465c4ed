"""Remove from a PNG file what does not change the picture: text, colour profiles, unknown chunks.

Pillow decompresses text and profiles when it opens a file, and rejects a file with more than 1 MB of them as damaged.
This module removes these chunks before Pillow parses the file. It never decompresses more than 1 MB.
"""

from __future__ import annotations

import zlib

__all__ = ["without_metadata"]

# Ancillary chunks that are kept: transparency, animation (to find the first frame), EXIF.
_KEPT = {b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf"}

# Text chunks that are kept, because they may hold the orientation.
_ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")

_MAX_DECOMPRESSED = 2**20  # bytes
_MAX_TEXT = 2**25  # bytes


def without_metadata(data: bytes) -> bytes:
    """The bytes of a PNG file without chunks that do not change the picture; malformed parts are left unchanged."""
    view, parts, part_start, position = memoryview(data), [], 0, 8
    keywords: set[bytes] = set()  # one text per keyword is enough, and bounds the total size of the texts
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        if end > len(data) or kind == b"IEND":
            break
        keyword = _orientation_keyword(kind, view[position + 8 : end - 4])
        if keyword not in keywords if keyword else _changes_picture(kind):
            keywords.add(keyword)
        else:
            parts.append(view[part_start:position])
            part_start = end
        position = end
    return b"".join([*parts, view[part_start:]]) if parts else data


def _changes_picture(kind: bytes) -> bool:
    critical = not kind[0] & 32  # an upper-case first letter
    return critical or kind in _KEPT


def _orientation_keyword(kind: bytes, body: memoryview) -> bytes:
    """The keyword of a text chunk that may hold the orientation and is small enough; empty for all other chunks."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or len(body) > _MAX_TEXT:
        return b""
    keyword, _, rest = bytes(body).partition(b"\0")
    compressed = b""
    if kind == b"zTXt":
        compressed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":  # the compression flag; then method, language, translated keyword, text
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return keyword if keyword in _ORIENTATION_KEYWORDS and _decompresses_small(compressed) else b""


def _decompresses_small(compressed: bytes) -> bool:
    """Whether data decompresses to at most 1 MB; true for no data."""
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(compressed, _MAX_DECOMPRESSED)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail
