from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from patchlife.visual.html import code, figure, heading, note, page, paragraph, save_page, table

NASTY = '<script>alert("1")</script> & co'


class Checker(HTMLParser):
    """Fails if a tag is not closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_complete_and_needs_no_network(tmp_path):
    picture = Image.new("RGB", (8, 6), "red")
    sections = [
        heading("Part"),
        paragraph("Words."),
        note("Small print."),
        table(["model", "top-1"], [["dense", "82.2 %"]], "Conditions."),
        figure(picture, "A picture."),
        code("x < 1"),
    ]
    html = save_page(tmp_path / "report.html", "Report", sections).read_text()
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert {"h1", "h2", "p", "table", "caption", "figure", "img", "pre"} <= set(checker.seen)
    assert "script" not in checker.seen
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", html)


@pytest.mark.parametrize("make", [heading, paragraph, note, code, lambda text: page(text, [])])
def test_text_is_escaped(make):
    assert "<script" not in make(NASTY)
    assert "&lt;script&gt;" in make(NASTY)


def test_text_in_tables_and_figures_is_escaped():
    made = table([NASTY], [[NASTY]], NASTY) + figure(Image.new("L", (2, 2)), NASTY)
    assert "<script" not in made
    assert 'alt="&lt;script&gt;alert(&quot;1&quot;)' in made


def test_columns_of_numbers_are_aligned_to_the_right():
    made = table(["model", "ms", "gain"], [["slimmed", 1.5, "-3 %"], ["dense", None, "1.6x"]], marked=0)
    assert made.count('<td class="number">') == 4
    assert '<td>slimmed</td><td class="number">1.5</td><td class="number">-3 %</td>' in made
    assert '<th>model</th><th class="number">ms</th>' in made
    assert made.count('<tr class="marked">') == 1


def test_a_row_of_the_wrong_length_is_a_bug():
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [[1, 2, 3]])


def test_pictures_are_embedded():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    made = figure(picture, "noise", lossless=True)
    data = re.search(r"data:image/png;base64,([^\"]+)", made).group(1)
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), picture)
    assert 'width="8" height="6"' in made
    assert "data:image/jpeg;base64," in figure(picture, "noise")
