"""Photos per second of `patchlife predict --ray` on this machine's cores, against one process on the same cores.

    python bench/ray_archive.py MODEL photos/ --checkpoint vit_tiny.safetensors --out result.json

Each command runs twice, on --few and on --many photos (those of the folder, repeated if it has fewer). Seconds per
photo are the difference of the two times divided by the difference of the two numbers, so the start of processes, of
Ray and of the model does not count; it is reported by itself. The commands take turns; medians of --rounds are
compared. One process uses as many threads as Ray has workers with one thread each. Other arguments are those of
`predict`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from patchlife.data import list_photos
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic


def seconds(words: list[str]) -> float:
    """Seconds of a command, from start to exit."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "patchlife", *words], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos")
    parser.add_argument("--few", type=int, default=256)
    parser.add_argument("--many", type=int, default=1280)
    parser.add_argument("--part-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    args, words = parser.parse_known_args()
    cores = os.cpu_count() or 1
    photos = [str(path.resolve()) for path in list_photos(args.photos)]
    times: dict[str, dict[int, list[float]]] = {"one process": {}, "ray": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for count in (args.few, args.many):
                table = Path(folder) / f"{count}.parquet"
                pq.write_table(pa.table({"path": list(islice(cycle(photos), count))}), table)
                line = ["predict", args.model, str(table), *words, "--no-progress", "--out"]
                commands = {
                    "one process": [*line, f"{folder}/{number}-{count}.jsonl", "--threads", str(cores)],
                    "ray": [*line, f"{folder}/{number}-{count}", "--ray", "--part-size", str(args.part_size)],
                }
                for name, command in commands.items():
                    times[name].setdefault(count, []).append(seconds(command))
                    print(name, count, f"{times[name][count][-1]:.1f} s", flush=True)
    found = {}
    for name, by_count in times.items():
        few, many = (statistics.median(by_count[count]) for count in (args.few, args.many))
        each = (many - few) / (args.many - args.few)
        found[name] = {
            "photos_per_second": round(1 / each, 2),
            "start_seconds": round(few - each * args.few, 1),
            "seconds": {str(count): [round(value, 2) for value in values] for count, values in by_count.items()},
        }
    overhead = found["one process"]["photos_per_second"] / found["ray"]["photos_per_second"] - 1
    result = {
        "model": args.model,
        "options": [word for word in words if "/" not in word],
        "photos": {"few": args.few, "many": args.many, "part_size": args.part_size},
        "cores": cores,
        "one_process_threads": cores,
        "ray_workers": cores,
        "ray_threads_per_worker": 1,
        "found": found,
        "overhead": round(overhead, 4),
        "note": args.note,
        "conditions": conditions(torch.device("cpu")) | {"ray": ray.__version__},
    }
    print(json.dumps({**found, "overhead": result["overhead"]}, indent=1))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
