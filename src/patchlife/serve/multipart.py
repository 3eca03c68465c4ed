"""The photo in a multipart body. The whole body is in memory, so its limit is the limit of this module."""

from __future__ import annotations

from email.message import Message

from .errors import RequestError

__all__ = ["photo_in"]

_MOST_PARTS = 16
_EXPECTED = "expected a multipart body with one file, as curl -F photo=@photo.jpg sends it"


def photo_in(content_type: str, body: bytes) -> bytes:
    """The content of the only file in a multipart/form-data body.

    Raises RequestError for another body than one with exactly one file.
    """
    try:
        return _photo(_boundary(content_type), body)
    except (ValueError, LookupError):  # of the standard library, at a parameter with an unknown or wrong encoding
        raise RequestError(422, f"{_EXPECTED}, got a header that cannot be decoded") from None


def _photo(boundary: bytes, body: bytes) -> bytes:
    sections = (b"\r\n" + body).split(b"\r\n--" + boundary, _MOST_PARTS + 1)
    if len(sections) < 3 or not sections[-1].startswith(b"--"):
        raise RequestError(422, f"{_EXPECTED}, got a body that does not end with its boundary")
    files = [content for section in sections[1:-1] if (content := _file(section)) is not None]
    if len(files) != 1:
        raise RequestError(422, f"{_EXPECTED}, got {len(files)} files; send one photo a request")
    return files[0]


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary("")
    if not 1 <= len(boundary) <= 70:
        raise RequestError(422, f"{_EXPECTED}, got no boundary in its Content-Type")
    return boundary.encode("latin-1", "replace")


def _file(section: bytes) -> bytes | None:
    """The content of a part that is a file; None for a field."""
    head, blank, content = section.partition(b"\r\n\r\n")
    if not blank or len(head) > 8192:
        raise RequestError(422, f"{_EXPECTED}, got a part without headers")
    message = Message()
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            message["content-disposition"] = value.strip()
    is_file = message.get_filename() is not None or message.get_param("name", None, "content-disposition") == "photo"
    return content if is_file else None
