"""PNG files reduced to what is seen: no text, no colour profile, nothing else that could be too large or ill-formed.

Pillow unpacks compressed text and profiles while it opens a file, and takes a photo with more than 1 MB of them for a
damaged one. They are left out here before Pillow sees the file; nothing is unpacked beyond 1 MB.
"""

from __future__ import annotations

import zlib

__all__ = ["seen_part"]

# Beside the critical chunks: transparency, frames of an animation (so that the first is told from them), EXIF.
_SEEN = {b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf"}

# The only texts that are read: either may hold the orientation.
_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")

_LARGEST_UNPACKED = 2**20
_LARGEST_TEXT = 2**25


def seen_part(data: bytes) -> bytes:
    """A PNG file's bytes without the chunks that do not matter here; what is not well-formed stays as it is."""
    view, kept, begin, at = memoryview(data), [], 0, 8
    texts: set[bytes] = set()  # one of each is enough, and bounds what they take together
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if end > len(data) or kind == b"IEND":
            break
        text = _orientation_text(kind, view[at + 8 : end - 4])
        if text not in texts if text else _is_seen(kind):
            texts.add(text)
        else:
            kept.append(view[begin:at])
            begin = end
        at = end
    return b"".join([*kept, view[begin:]]) if kept else data


def _is_seen(kind: bytes) -> bool:
    critical = not kind[0] & 32  # an upper-case first letter
    return critical or kind in _SEEN


def _orientation_text(kind: bytes, body: memoryview) -> bytes:
    """The keyword of a text that may hold the orientation and is small enough to be read; empty for all else."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or len(body) > _LARGEST_TEXT:
        return b""
    keyword, _, rest = bytes(body).partition(b"\0")
    packed = b""
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":  # compressed: method, language, translated keyword, text
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return keyword if keyword in _ORIENTATION and _unpacks_small(packed) else b""


def _unpacks_small(packed: bytes) -> bool:
    """Whether what is packed takes at most 1 MB; nothing does."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _LARGEST_UNPACKED)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail
