"""Takes the picture of the page of ``patchlife explore``, explore.png, in headless Chromium.

    python docs/images/make_explore.py ADAPTER PHOTO --checkpoint WEIGHTS

All arguments are those of ``patchlife explore``. The machine should be idle: the page shows times.
"""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

BUDGET, PATCH = "0.45", 17
WIDTH, HEIGHT = 1300, 1080
READY = f"document.querySelector('#map svg')?.dataset.budget === '{BUDGET}'"


def picture(address: str) -> Image.Image:
    """The page at ``BUDGET``, with the line of one patch."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.wait_for_selector("#map svg", timeout=120_000)
        for value in ("0.5", BUDGET):  # the first one warms up
            page.locator("#budget input[type=number]").fill(value)
            page.keyboard.press("Enter")
            page.wait_for_function(READY.replace(BUDGET, value), timeout=60_000)
        page.wait_for_timeout(1000)
        page.locator("#map .cell").nth(PATCH).hover(force=True)
        taken = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(taken)).convert("RGB")


def main() -> None:
    """Serve the page, take the picture, and write it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "patchlife", "explore", *sys.argv[1:], "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout is not None
        server.stdout.readline()
        taken = picture(f"http://127.0.0.1:{port}/")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    smaller = taken.resize((1000, 1000 * HEIGHT // WIDTH))
    smaller.quantize(200).save(Path(__file__).with_name("explore.png"), optimize=True)


if __name__ == "__main__":
    main()
