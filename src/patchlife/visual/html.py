"""Write a report as a single HTML file without scripts or network access; pictures are embedded.

A report is a list of sections. Each function here makes one section:

    page("Demo", [heading("Accuracy"), table(["model", "top-1"], rows), figure(picture, "Ten photos")])
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from ..io.files import write_atomic

__all__ = ["Section", "code", "data_uri", "figure", "heading", "note", "page", "paragraph", "save_page", "table"]

Section = str
"""A piece of finished HTML. The functions below take plain text and escape it."""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #23232b; --paper: #fff; --soft: #6b6b78; --line: #dedee6; --tint: #f5f5f9; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e6ee; --paper: #17171d; --soft: #9d9dab; --line: #35353f; --tint: #202028; } }
body { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; color: var(--ink);
  background: var(--paper); font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 1rem 0; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
p { max-width: 44rem; }
.note, figcaption, caption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .4rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
th { border-bottom-width: 2px; }
.number { text-align: right; white-space: nowrap; }
tr.marked td { background: var(--tint); font-weight: 600; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { padding: .9rem 1.1rem; background: var(--tint); border-radius: 6px; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, monospace; }
"""


def page(title: str, sections: Iterable[Section]) -> str:
    """The text of a complete HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def save_page(path: str | os.PathLike[str], title: str, sections: Iterable[Section]) -> Path:
    """Write a complete HTML document to a file, whose folder must exist; returns the path."""
    return write_atomic(path, page(title, sections))


def heading(text: str) -> Section:
    """A heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> Section:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> Section:
    """A paragraph in small print, for the conditions of a measurement."""
    return f'<p class="note">{escape(text)}</p>'


def code(text: str) -> Section:
    """Code or a command line, in a fixed-width font."""
    return f"<pre>{escape(text)}</pre>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", marked: int | None = None
) -> Section:
    """A table. Columns of numbers, or of text such as "1.5x" or "80.4 %", are aligned to the right.

    Args:
        columns: the column names.
        rows: one cell per column each, converted by ``str``; None gives an empty cell.
        caption: the text below the table.
        marked: the index of a row to emphasise.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    head = _row("th", columns, numeric)
    body = "\n".join(_row("td", row, numeric, i == marked) for i, row in enumerate(cells))
    below = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    inner = f"{below}<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table>\n{inner}\n</table></div>'


def figure(picture: Image.Image, caption: str, lossless: bool = False) -> Section:
    """An embedded picture with a caption.

    Args:
        picture: any PIL image.
        caption: the text below the picture.
        lossless: store a PNG, for plots. A JPEG is stored otherwise; for a photo it takes a fifth of the space.
    """
    return (
        f'<figure><img src="{data_uri(picture, lossless)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def data_uri(picture: Image.Image, lossless: bool = False) -> str:
    """A picture as the address of an image, which embeds it in a page; ``lossless`` as for `figure`."""
    stream = io.BytesIO()
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:  # no chroma subsampling: life maps have sharp edges between colours
        picture.convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{data}"


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool], marked: bool = False) -> str:
    style = {True: ' class="number"', False: ""}
    filled = zip(cells, numeric, strict=True)
    inner = "".join(f"<{tag}{style[right]}>{escape(text)}</{tag}>" for text, right in filled)
    return f'<tr class="marked">{inner}</tr>' if marked else f"<tr>{inner}</tr>"


def _is_number(text: str) -> bool:
    return not text or text.lstrip("+-.\N{MINUS SIGN}±")[:1].isdigit()
