"""How long the page of `patchlife explore` takes to answer a move of the slider, in headless Chromium.

    python bench/explore_latency.py recipes/vit_tiny/adapter photos/ --checkpoint vit_tiny.safetensors --out result.json

It serves the page on this machine, moves the slider up and down by the keyboard, and waits each time until the browser
has the life map of the new budget. Times are from the key press to it, in milliseconds. All arguments but --moves and
--out are those of `patchlife explore`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import sync_playwright

from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic

_KEYS = ("ArrowLeft", "ArrowRight", "PageUp", "PageDown")
_SHOWN = """before => {
  const map = document.querySelector('#map svg'), budget = document.querySelector('#budget input[type=range]').value
  return budget != before && map && Number(map.dataset.budget) == Number(budget)
}"""


def moves(page: Any, count: int) -> list[float]:
    """Milliseconds of each of ``count`` moves of the slider, until the life map of the new budget is there."""
    chance, slider, times = random.Random(0), page.locator("#budget input[type=range]"), []
    slider.focus()
    for _ in range(count):
        before = slider.input_value()
        key = "ArrowLeft" if float(before) > 0.9 else "ArrowRight" if float(before) < 0.35 else chance.choice(_KEYS)
        started = time.perf_counter()
        slider.press(key)
        page.wait_for_function(_SHOWN, arg=before, polling=5)
        times.append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    """Serve, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args, words = parser.parse_known_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "patchlife", "explore", *words, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout is not None
        server.stdout.readline()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#map svg", timeout=120_000)
            moves(page, 5)  # the first ones load fonts and allocate
            times = sorted(moves(page, args.moves))
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    result = {
        "arguments": words,
        "moves": len(times),
        "milliseconds": {f"p{p}": round(times[min(len(times) - 1, p * len(times) // 100)], 1) for p in (10, 50, 95)},
        "slowest": round(times[-1], 1),
        "conditions": conditions(torch.device("cpu")),
    }
    print(json.dumps(result["milliseconds"]))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
