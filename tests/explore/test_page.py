"""The page without a browser; `test_browser.py` has one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from patchlife.extras import installed


@pytest.mark.slow
@pytest.mark.skipif(not installed("gradio"), reason="needs gradio")
def test_the_callbacks_of_the_page(tmp_path: Path) -> None:
    script = Path(__file__).with_name("page_checks.py")
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "all checks passed" in run.stdout


def test_without_gradio_the_error_names_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from patchlife import extras
    from patchlife.cli.main import main

    monkeypatch.setattr(extras, "installed", lambda package: package != "gradio")
    assert main(["explore", "demo"]) == 2
    assert "patchlife[explore]" in capsys.readouterr().err
