"""Run the command line in this process, on a small model and a few generated photos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small import NAME, checkpoint, write_photos

from patchlife.cli.main import main
from patchlife.runtime import inference


@dataclass(frozen=True)
class CommandResult:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def patchlife(capfd) -> Callable[..., CommandResult]:
    """A function that runs a command line; arguments are converted by ``str``."""

    def run(*argv: object) -> CommandResult:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return CommandResult(code, *capfd.readouterr())

    return run


@pytest.fixture
def interrupted(monkeypatch) -> Callable[[], AbstractContextManager[pytest.MonkeyPatch]]:
    """A function that gives a context in which a run on photos is interrupted (Ctrl-C) after three of them."""
    real = inference.predict_photos

    def after_three(*args: Any) -> Iterator[Any]:
        for count, prediction in enumerate(real(*args)):
            if count == 3:
                raise KeyboardInterrupt
            yield prediction

    @contextmanager
    def context() -> Iterator[pytest.MonkeyPatch]:
        with monkeypatch.context() as patched:
            patched.setattr(inference, "predict_photos", after_three)
            yield patched

    return context


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture
def model(vit_file) -> list[object]:
    """The arguments that select the small model."""
    return [NAME, "--checkpoint", vit_file]


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return write_photos(tmp_path / "photos", 7)
