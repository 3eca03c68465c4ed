"""CONTRIBUTING.md and docs/architecture.md agree with the layers that import-linter checks, and their links work."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "patchlife"


def layers() -> list[list[str]]:
    """The subpackages of each layer in pyproject.toml, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    lines = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("patchlife.") for name in line.split("|")] for line in lines]


def test_the_table_of_subpackages_equals_the_layers() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert [re.findall(r"`(\w+)`", row) for row in rows] == layers()


def test_the_layers_of_the_architecture_page_are_the_same() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers")[2]
    lines = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0].splitlines()
    assert [[part.split()[0] for part in line.split("│")] for line in lines] == layers()


def test_every_subpackage_is_in_a_layer() -> None:
    subpackages = {path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert subpackages - {"__init__", "__main__", "__pycache__", "assets", "version"} == {
        r for line in layers() for r in line
    }


def test_files_that_the_architecture_page_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"(?<![\w/.])((?:\w+/)+\w+\.py)", text))
    named = {name for name in named if not name.startswith(("bench/", "tests/"))}
    assert len(named) > 40
    assert not [name for name in named if not (SOURCE / name).is_file()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]
