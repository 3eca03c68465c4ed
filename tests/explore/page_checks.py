"""Checks of the page's callbacks, in a process of their own: gradio leaves event loops open, which pytest reports.

python tests/explore/page_checks.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from patchlife.config import ModelConfig
from patchlife.data import list_photos
from patchlife.explore import Explorer
from patchlife.explore import page as page_module
from patchlife.explore.page import _Page, page
from patchlife.runtime.demo_model import DEMO, demo_folder
from patchlife.runtime.opening import open_pipeline

PHOTOS = list_photos(demo_folder() / "photos")


def the_callbacks_show_photos_and_errors(explorer: Explorer, folder: Path) -> None:
    own = _Page(explorer, PHOTOS)
    opened, picture, *shown = own.first(0.5, False, False)
    assert opened.name == own.examples[0].name
    assert isinstance(picture, Image.Image)
    assert [("<svg" in html or "<table" in html or "<img" in html) for html in shown] == [True] * 5
    again, _, *others = own.example(SimpleNamespace(index=4), 0.5, True, True)
    assert again.name == own.examples[4].name
    assert others != shown
    (folder / "bad.jpg").write_bytes(b"")
    nothing, text, *empty = own.uploaded(str(folder / "bad.jpg"), 0.5, False, False)
    assert nothing is None
    assert empty == [""] * 4
    assert "bad.jpg" in text
    assert str(folder) not in text
    assert "Drop, paste or pick" in own.changed(None, 0.5, False, False)[0]
    assert own.removed()[0] is None


def a_budget_out_of_reach_is_a_message() -> None:
    pipeline = open_pipeline(ModelConfig(DEMO, life={"budget": 0.9, "start": 8, "drops": (8,)}), device="cpu")
    own = _Page(Explorer(pipeline), PHOTOS[:1])
    opened, *_ = own.first(0.9, False, False)
    assert "out of reach" in own.changed(opened, 0.3, False, False)[0]


def the_page_is_built_with_and_without_photos(explorer: Explorer) -> None:
    written = set(Path(page_module.__file__).parent.iterdir())
    for photos in (PHOTOS[:3], []):
        blocks = page(explorer, photos)
        labels = [str(component.get("props", {}).get("label")) for component in blocks.config["components"]]
        assert any("Budget" in text for text in labels)
        assert ("A folder" in labels) == bool(photos)
        assert not [d for d in blocks.config["dependencies"] if d.get("api_visibility") == "public"]
    assert set(Path(page_module.__file__).parent.iterdir()) == written, "gradio writes beside subclasses"


def main(folder: Path) -> None:
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    explorer = Explorer(open_pipeline(ModelConfig(DEMO), device="cpu"), PHOTOS)
    the_callbacks_show_photos_and_errors(explorer, folder)
    a_budget_out_of_reach_is_a_message()
    the_page_is_built_with_and_without_photos(explorer)
    print("all checks passed", flush=True)
    os._exit(0)  # gradio's threads may keep the process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
