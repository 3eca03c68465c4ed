"""The panels of the page, and the options of its verb."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from patchlife.cli.main import main
from patchlife.config import ModelConfig
from patchlife.data import list_photos
from patchlife.explore import Explorer, panels
from patchlife.runtime.demo_model import DEMO, demo_folder
from patchlife.runtime.opening import open_pipeline

PHOTOS = list_photos(demo_folder() / "photos")


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(open_pipeline(ModelConfig(DEMO), device="cpu"), PHOTOS)


def parsed(html: str) -> ElementTree.Element:
    """Every panel is well-formed."""
    return ElementTree.fromstring(html.replace('href="data', 'link="data').replace("<img ", "<i ").replace('">', '">'))


@pytest.fixture
def view(explorer: Explorer):
    return explorer.view(explorer.open(PHOTOS[40]), 0.45)


def test_the_map_has_each_patch_with_its_text(explorer: Explorer, view) -> None:
    html = panels.life_map(view, explorer.pipeline.preprocess)
    titles = re.findall(r"<title>(.*?)</title>", html)
    assert len(titles) == 196
    life = view.lives.life[0].tolist()
    for patch, text in enumerate(titles):
        row, col = divmod(patch, 14)
        assert text.startswith(f"row {row + 1}, column {col + 1}: in ")
        assert ("all 12 blocks" in text) == (life[patch] == 12)
        assert ("merged into" in text) == (patch in view.merges.target)
    assert parsed(html) is not None


def test_many_patches_are_not_drawn_one_by_one() -> None:
    pipeline = open_pipeline(
        ModelConfig("vit_tiny_patch16_224", image_size=544), device="cpu", random_weights=True
    )  # 34 x 34 patches
    large = Explorer(pipeline)
    html = panels.life_map(large.view(large.open(PHOTOS[0]), 0.5), pipeline.preprocess)
    assert "<title>" not in html
    assert len(html) < 1_000_000


def test_a_changed_answer_is_marked(explorer: Explorer, view) -> None:
    names = explorer.pipeline.labels.names
    assert 'class="changed"' not in panels.answers(view, names)
    other = view.answer.output.roll(1)
    changed = type(view)(**view.__dict__ | {"answer": type(view.answer)(other, 1.0, 1.0)})
    html = panels.answers(changed, names)
    assert html.count('class="changed"') == 2
    assert "the answer changed" in html


def test_text_is_escaped(explorer: Explorer, view) -> None:
    evil = ["<script>alert(1)</script>"] * 10
    assert "<script" not in panels.answers(view, evil) + panels.message("<script>")


def test_bars_and_numbers_are_those_of_the_view(view) -> None:
    kept = view.lives.kept[0].tolist()
    assert re.findall(r'middle">(\d+)</text><text', panels.bars(view)) == [str(count) for count in kept]
    assert f"{view.answer.flops / view.dense_flops:.2f}</td>" in panels.numbers(view)


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["explore", DEMO, "--port", "70000"]) == 2
    assert "port must be 1 to 65535" in capsys.readouterr().err
    assert main(["explore", "vit_tiny_patch16_224"]) == 2
    assert "random weights" in capsys.readouterr().err
    assert main(["explore", DEMO, "no-such-folder"]) == 2
