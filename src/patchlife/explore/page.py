"""The page of ``patchlife explore``, by gradio. Nothing is fetched from other hosts, and nothing is sent to any."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import Mode
from ..data import evenly_spaced, read_photo
from ..errors import ImageError, MissingExtraError, PatchLifeError
from . import panels
from .explorer import Explorer, Opened
from .folder import curve_of

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ImportError:
    raise MissingExtraError("gradio", "explore", "patchlife explore") from None

__all__ = ["launch", "page"]

_LOWEST, _STEP = 0.25, 0.01
_EXAMPLES, _THUMBNAIL = 24, 200
_CHANGES = 24  # photos shown that change their answer
_UPLOAD = "64mb"
_CHOOSE = "Drop, paste or pick a photo."
_INTRODUCTION = "At an early block the model decides, once, in how many blocks each patch takes part."
_FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")

Shown = tuple[str, str, str, str, str]
"""Life map, answers, numbers, bars and strip."""


class _Page:
    """The callbacks of the page."""

    def __init__(self, explorer: Explorer, photos: Sequence[Path]) -> None:
        self.explorer, self.photos = explorer, list(photos)
        self.examples = evenly_spaced(self.photos, _EXAMPLES)

    def uploaded(self, path: str, budget: float, adaptive: bool, lines: bool) -> tuple[Any, ...]:
        """A photo was dropped, pasted or picked."""
        return self._open(Path(path), budget, adaptive, lines)

    def removed(self) -> tuple[Any, ...]:
        """The photo was removed."""
        return None, *self._message(_CHOOSE)

    def example(self, event: gr.SelectData, budget: float, adaptive: bool, lines: bool) -> tuple[Any, ...]:
        """An example was picked."""
        opened, *shown = self._open(self.examples[event.index], budget, adaptive, lines)
        return opened, opened.picture if opened else None, *shown

    def first(self, budget: float, adaptive: bool, lines: bool) -> tuple[Any, ...]:
        """The page was opened."""
        if not self.examples:
            return None, None, *self._message(_CHOOSE)
        opened, *shown = self._open(self.examples[0], budget, adaptive, lines)
        return opened, opened.picture if opened else None, *shown

    def changed(self, opened: Opened | None, budget: float, adaptive: bool, lines: bool) -> Shown:
        """Budget or mode was changed."""
        if opened is None:
            return self._message(_CHOOSE)
        mode: Mode = "adaptive" if adaptive else "fixed"
        try:
            view = self.explorer.view(opened, budget, mode)
        except PatchLifeError as error:
            return self._message(str(error))
        preprocess, names = self.explorer.pipeline.preprocess, self.explorer.pipeline.labels.names
        return (
            panels.life_map(view, preprocess, lines),
            panels.answers(view, names),
            panels.numbers(view),
            panels.bars(view),
            panels.strips(view, preprocess),
        )

    def caption(self, path: Path) -> str:
        """The folder of a photo, which often is its class; its name where all are in one folder."""
        return path.parent.name if len({photo.parent for photo in self.photos}) > 1 else path.stem

    def measured(self, progress: gr.Progress = gr.Progress()) -> tuple[str, list[tuple[Image.Image, str]]]:  # noqa: B008
        """The curve of the folder, and the photos that change their answer first."""
        try:
            found = curve_of(self.explorer, self.photos, progress=lambda done, total: progress((done, total)))
        except PatchLifeError as error:
            return panels.message(str(error)), []
        shown = [
            (thumbnail(change.photo), f"{change.before} → {change.after} at {change.budget:g}")
            for change in found.changes[:_CHANGES]
        ]
        return panels.curve(found), shown

    def _open(self, path: Path, budget: float, adaptive: bool, lines: bool) -> tuple[Any, ...]:
        try:
            opened = self.explorer.open(path)
        except PatchLifeError as error:
            return None, *self._message(str(error).replace(str(path), path.name))
        return opened, *self.changed(opened, budget, adaptive, lines)

    def _message(self, text: str) -> Shown:
        return panels.message(text), "", "", "", ""


def thumbnail(path: Path) -> Image.Image:
    """A small picture of a photo; grey if it cannot be read."""
    try:
        picture = read_photo(path)
    except ImageError:
        return Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "grey")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def page(explorer: Explorer, photos: Sequence[Path] = ()) -> gr.Blocks:
    """The page for a model; ``photos`` are the examples, and the folder of the second tab."""
    own, settings = _Page(explorer, photos), explorer.pipeline.model.settings
    private: dict[str, Any] = {"api_visibility": "private"}
    # one event for all controls, so that the last change is shown last; gradio's queue would add 0.05 s
    quick: dict[str, Any] = private | {"show_progress": "hidden", "trigger_mode": "always_last", "queue": False}
    with gr.Blocks(title=f"PatchLife: {explorer.pipeline.name}", analytics_enabled=False) as blocks:
        opened = gr.State()
        gr.Markdown(f"## PatchLife · {explorer.pipeline.name}\n{_INTRODUCTION}")
        with gr.Tab("One photo"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    photo = _photo_input()
                    budget = _budget_input(explorer)
                    adaptive = gr.Checkbox(
                        settings.mode == "adaptive" and explorer.can_adapt,
                        label="adaptive: simple photos keep fewer patches, crowded ones more",
                        interactive=explorer.can_adapt,
                        visible=explorer.slim is not None,
                        elem_id="adaptive",
                    )
                    lines = gr.Checkbox(
                        False, label="lines from each dropped patch to where it was merged", elem_id="lines"
                    )
                with gr.Column(scale=3, min_width=300):
                    life_map = gr.HTML(elem_id="map")
                with gr.Column(scale=3, min_width=300):
                    answers = gr.HTML(elem_id="answers")
                    numbers = gr.HTML(elem_id="numbers")
                    bars = gr.HTML(elem_id="bars")
            strips = gr.HTML(elem_id="strips")
            gallery = gr.Gallery(
                [(thumbnail(path), own.caption(path)) for path in own.examples],
                label="Examples",
                columns=8,
                height=220,
                allow_preview=False,
                interactive=False,
                buttons=[],
                visible=bool(own.examples),
                elem_id="examples",
            )
        shown, inputs = [life_map, answers, numbers, bars, strips], [budget, adaptive, lines]
        blocks.load(own.first, inputs, [opened, photo, *shown], show_progress="hidden", **private)
        photo.upload(own.uploaded, [photo, *inputs], [opened, *shown], show_progress="hidden", **private)
        photo.clear(own.removed, None, [opened, *shown], show_progress="hidden", **private)  # its value is the old one
        gallery.select(own.example, inputs, [opened, photo, *shown], show_progress="hidden", **private)
        gr.on([control.input for control in inputs], own.changed, [opened, *inputs], shown, **quick)
        if photos:
            with gr.Tab("A folder"):
                gr.Markdown(
                    f"{len(photos)} photos; up to 200, evenly spaced, are measured at every budget in fixed mode."
                )
                button = gr.Button("Measure", variant="primary", elem_id="measure")
                with gr.Row():
                    curve = gr.HTML(elem_id="curve")
                    changes = gr.Gallery(
                        label="Photos that change their answer, the first ones first",
                        columns=2,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="changes",
                    )
                button.click(own.measured, None, [curve, changes], **private)
    return blocks


def _photo_input() -> Any:
    """An image input that gives the path of the uploaded file, which `read_photo` reads with its limits."""
    photo = gr.Image(
        type="filepath",
        sources=["upload", "clipboard"],
        label="Photo: drop, paste or pick one",
        height=260,
        buttons=[],
        elem_id="photo",
    )
    # gradio's own would decode the file without limits; a subclass of a component writes a file beside its module
    photo.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return photo


def _budget_input(explorer: Explorer) -> Any:
    """A slider; for an exported file or bundle a choice among the budgets in it."""
    present = explorer.pipeline.model.settings.budget
    if explorer.budgets is not None:
        choices = [(f"{budget:g}", budget) for budget in explorer.budgets]
        return gr.Radio(choices, value=present, label="Budget (in this file)", elem_id="budget")
    return gr.Slider(
        _LOWEST,
        1.0,
        present,
        step=_STEP,
        label="Budget: fraction of the dense model's FLOPs",
        buttons=[],
        elem_id="budget",
    )


def launch(blocks: gr.Blocks, host: str, port: int | None, open_browser: bool, wait: bool = True) -> str:
    """Serve the page until Ctrl-C, or in the background without ``wait``; returns its address.

    Raises OSError if the port is not free.
    """
    theme = gr.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace"))
    _, local, _ = blocks.queue(default_concurrency_limit=1, api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        quiet=True,
        show_error=True,
        max_file_size=_UPLOAD,
        footer_links=[],
        theme=theme,
        css=panels.STYLE,
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    print(f"open {local}  (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return str(local)
