"""The photo in a multipart body, and what is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as some

from patchlife.serve.errors import RequestError
from patchlife.serve.multipart import photo_in

TYPE = "multipart/form-data; boundary=edge"


def body(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    sections = [
        b"--edge\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content for head, content in parts
    ]
    return b"\r\n".join([*sections, b"--edge"]) + end


@given(some.binary(max_size=300).filter(lambda content: b"\r\n--edge" not in content))
def test_the_content_is_the_same_bytes(content):
    assert photo_in(TYPE, body(('name="photo"; filename="a.jpg"', content))) == content


@pytest.mark.parametrize("head", ['name="photo"', 'name="x"; filename="a"', 'name="x"; filename="../../etc/passwd"'])
def test_fields_beside_the_file_are_ignored(head):
    assert photo_in(TYPE, body(('name="comment"', b"hello"), (head, b"bytes"))) == b"bytes"


@pytest.mark.parametrize(
    ("content_type", "content", "message"),
    [
        ("multipart/form-data", body(('filename="a"', b"1")), "got no boundary"),
        ("multipart/form-data; boundary=" + "x" * 71, b"", "got no boundary"),
        (TYPE, b"", "does not end with its boundary"),
        (TYPE, body(('filename="a"', b"1"), end=b""), "does not end with its boundary"),
        (TYPE, body(('name="comment"', b"1")), "got 0 files"),
        (TYPE, body(('filename="a"', b"1"), ('filename="b"', b"2")), "got 2 files"),
        (TYPE, b"--edge\r\nno headers\r\n--edge--", "a part without headers"),
        (TYPE, body(*[('name="c"', b"")] * 40), "does not end with its boundary"),
        *((TYPE, body((f"filename*={charset}''x", b"1")), "cannot be decoded") for charset in ("undefined", "idna")),
        ("multipart/form-data; boundary*=idna''x", body(), "cannot be decoded"),
    ],
)
def test_another_body_is_refused(content_type, content, message):
    with pytest.raises(RequestError, match=message) as refused:
        photo_in(content_type, content)
    assert refused.value.status == 422


@given(some.binary(max_size=200))
def test_any_bytes_give_a_photo_or_an_error_of_the_client(content):
    with suppress(RequestError):
        assert isinstance(photo_in(TYPE, content), bytes)
