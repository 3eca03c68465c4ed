"""The command line in this process, on a small model and a few made-up photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small import NAME, checkpoint, write_photos

from patchlife.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def patchlife(capfd) -> Callable[..., Said]:
    """Runs a command line; every argument may be anything that ``str`` takes."""

    def run(*argv: object) -> Said:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture
def model(vit_file) -> list[object]:
    """How a user names the small model."""
    return [NAME, "--checkpoint", vit_file]


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return write_photos(tmp_path / "photos", 7)


def error_line(said: Said) -> str:
    """The one line on stderr that a failed command line must end with, and nothing else."""
    (line,) = said.err.splitlines()
    assert line.startswith("patchlife: error: ")
    return line
