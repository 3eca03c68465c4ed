"""The page in a real browser: headless Chromium of the system, driven by playwright, against a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchlife.runtime.demo_model import demo_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]

PATIENCE = 120_000  # milliseconds; a busy machine is slow
PHOTO = demo_folder() / "photos" / "watch"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "patchlife", "explore", "demo", "--port", str(port), "--threads", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a background job
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    signal.signal(signal.SIGINT, before)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line
    yield f"http://127.0.0.1:{port}/"
    server.send_signal(signal.SIGINT)
    with server.stdout:
        assert server.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, loaded; afterwards: no errors in the console, no failed request, none to another host."""
    errors, hosts = [], set()
    opened = browser.new_page(viewport={"width": 1300, "height": 1000})
    opened.set_default_timeout(PATIENCE)
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url[:9] else None)
    opened.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)
    opened.goto(address)
    opened.wait_for_selector("#map svg")
    yield opened
    opened.close()
    assert errors == []
    assert hosts == {address.split("/")[2]}


def label(page: Any) -> str:
    """What the life map says of itself."""
    return page.get_attribute("#map svg", "aria-label")


def kept(page: Any) -> int:
    return int(re.search(r"(\d+) of 196 patches", label(page))[1])


def test_the_first_photo_is_shown_with_all_its_panels(page: Any) -> None:
    assert kept(page) < 196
    assert page.locator("#map .patch").count() == 196
    assert page.locator("#answers tr").count() == 6
    assert "FLOPs" in page.locator("#numbers").inner_text()
    assert page.locator("#bars rect").count() == 12
    assert page.locator("#strips img").count() == 1


def test_the_slider_moves_by_the_keyboard_and_the_map_changes(page: Any) -> None:
    before, first = label(page), kept(page)
    slider = page.locator("#budget input[type=range]")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('#numbers').innerText.includes('0.40')")
    assert kept(page) < first
    assert label(page) != before
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelector('#map svg').getAttribute('aria-label').includes('196 of 196')")
    assert "same answer; KL divergence 0.0000" in page.locator("#answers").inner_text()


def test_everything_can_be_reached_by_the_keyboard(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id.replace(/-.*/, '') ?? ''"))
        reached.add(
            page.evaluate("document.activeElement.closest('#budget,#adaptive,#lines,#photo,#examples')?.id ?? ''")
        )
    assert {"photo", "budget", "adaptive", "lines", "examples"} <= reached


def test_a_photo_is_uploaded(page: Any, tmp_path: Path) -> None:
    before = label(page)
    Image.open(next(PHOTO.iterdir())).rotate(90).save(tmp_path / "turned.jpg")
    page.locator("#photo button[aria-label='Remove Image']").click()
    page.wait_for_selector("#map [role=alert]")
    page.set_input_files("#photo input[type=file]", str(tmp_path / "turned.jpg"))
    page.wait_for_selector("#map svg")
    assert label(page).startswith("Life map")
    assert page.locator("#answers tr").count() == 6
    assert before


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<html>", "expected a JPEG, PNG or WEBP photo"), (b"", "empty"), (b"\xff\xd8\xff\xe0" + bytes(50), "bad.jpg")],
)
def test_a_broken_photo_gets_its_message(page: Any, tmp_path: Path, content: bytes, message: str) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content)
    page.locator("#photo button[aria-label='Remove Image']").click()
    page.wait_for_selector("#map [role=alert]")
    page.set_input_files("#photo input[type=file]", str(bad))
    page.wait_for_function("() => document.querySelector('#map').innerText.includes('bad.jpg')")
    text = page.locator("#map").inner_text()
    assert message in text
    assert "/" not in text.replace("JPEG/PNG", ""), "no path of the server"
    page.locator("#examples button").nth(3).click()
    page.wait_for_selector("#map svg")


def test_an_example_is_picked(page: Any) -> None:
    before = page.locator("#answers").inner_text()
    page.locator("#examples button").nth(9).click()
    page.wait_for_function("before => document.querySelector('#answers').innerText != before", arg=before)


def test_adaptive_mode_and_lines(page: Any) -> None:
    page.locator("#adaptive input").check()
    page.locator("#lines input").check()
    page.wait_for_selector("#map g.all")
    page.locator("#lines input").uncheck()
    page.wait_for_selector("#map g.one")
    patch = page.locator("#map .patch:has(path.merge)").first
    assert patch.locator("path").first.evaluate("path => getComputedStyle(path).visibility") == "hidden"
    patch.locator("rect").hover()
    assert patch.locator("path").first.evaluate("path => getComputedStyle(path).visibility") == "visible"
    assert "blocks" in patch.locator("title").text_content()


def test_the_folder_has_a_curve_and_the_photos_that_change(page: Any) -> None:
    page.get_by_role("tab", name="A folder").click()
    page.locator("#measure").click()
    page.wait_for_selector("#curve .plot")
    assert "top-1" in page.locator("#curve").inner_text()
    assert page.locator("#curve circle").count() == 10
    assert "100 photos" in page.locator("#curve").inner_text()


def test_a_phone(browser: Any, address: str) -> None:
    phone = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    phone.set_default_timeout(PATIENCE)
    phone.goto(address)
    phone.wait_for_selector("#map svg")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    budget, life_map = phone.locator("#budget").bounding_box(), phone.locator("#map").bounding_box()
    assert life_map["y"] > budget["y"], "one column"
    assert life_map["width"] > 250
    phone.close()


def test_nothing_but_the_page_is_served(address: str) -> None:
    """Files of this machine are not readable, and no callback is a public API."""
    import urllib.error
    import urllib.request

    own = Path(__file__).resolve()
    for path in (f"gradio_api/file={own}", "gradio_api/file=/etc/passwd", "gradio_api/file=../../../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + path)
        with refused.value as answer:  # holds the connection
            assert answer.code in (403, 404)
    with urllib.request.urlopen(address + "gradio_api/info") as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "patchlife", "explore", "demo", "--port", str(taken.getsockname()[1])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "port" in run.stderr
