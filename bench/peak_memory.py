"""Measures the peak resident memory of a model's first call, above that of the process with the built model.

    python bench/peak_memory.py merging vit_small_patch16_224 1024           # prints the bytes as JSON

The measurement is for one process: `first_call` starts a new one. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from compared_runs import RUNS, backbone_model, build, random_images

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def first_call(run: str, model: str, pixels: int, budget: float, threads: int, tiny: bool = False) -> int:
    """Peak bytes of the first call of ``run``, one of `RUNS`, above the built model, measured in a new process.

    Raises RuntimeError with the output of the process if it fails.
    """
    options = ["--budget", str(budget), "--threads", str(threads), *(["--tiny"] if tiny else [])]
    command = [sys.executable, __file__, run, model, str(pixels), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {run} at {pixels} px failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def measure(run: str, name: str, pixels: int, budget: float, tiny: bool) -> int:
    """Peak bytes of the first call of ``run`` in this process, which must not have run a model before."""
    images = random_images(1, pixels)
    model = build(run, backbone_model(name, pixels, tiny), images, budget)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that building has freed: the call would use it, and it would not be counted
    _RESET.write_text("5")  # the peak so far is forgotten
    before = _kilobytes("VmRSS")
    with torch.inference_mode():
        model(images)
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {field}"
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("model")
    parser.add_argument("pixels", type=int)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="few channels and blocks, to try the script")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps({"bytes": measure(args.run, args.model, args.pixels, args.budget, args.tiny)}))


if __name__ == "__main__":
    main()
