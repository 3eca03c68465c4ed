"""On three Ray nodes: the bytes of one process, also if workers are killed or a node is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import photo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def lines(folder: Path) -> list[bytes]:
    """The sorted lines of all parts."""
    return sorted(line for path in folder.glob("part-*.jsonl") for line in path.read_bytes().splitlines())


def test_killed_workers_lose_nothing_and_a_photo_that_kills_them_is_given_up(nodes, patchlife, model, photos, tmp_path):
    photo(20).save(photos / "once.png")
    (photos / "kills.png").write_bytes(b"")  # one process reads it as a photo that cannot be read
    line = ["predict", *model, photos]
    assert patchlife(*line, "--out", tmp_path / "whole.jsonl").code == 1
    result = patchlife(*line, "--out", tmp_path / "parts", "--part-size", 4, "--ray", "auto")
    assert result.code == 1, result.err
    assert "13 photos, 2 failed" in result.err
    whole, found = (tmp_path / "whole.jsonl").read_bytes().splitlines(), lines(tmp_path / "parts")
    given_up = [json.loads(row) for row in found if b"kills.png" in row]
    assert [row["path"] for row in given_up] == [str(photos / "kills.png")]
    assert "found that it ended 2 worker processes" in given_up[0]["error"]
    assert (photos / "once.begun").exists()
    assert [row for row in found if b"kills.png" not in row] == sorted(row for row in whole if b"kills.png" not in row)
    assert len(found) == len(whole)


def test_a_removed_node_loses_nothing(nodes, patchlife, model, photos, tmp_path):
    for index in range(6):
        photo(30 + index).save(photos / f"unplug{index}.png")
    note, removed = photos / "node.begun", []

    def unplug() -> None:
        while not (note.exists() and note.read_text()):
            time.sleep(0.1)
        node = next(node for node in nodes.worker_nodes if node.node_id == note.read_text())
        nodes.remove_node(node, allow_graceful=False)
        removed.append(node)

    thread = threading.Thread(target=unplug, daemon=True)
    thread.start()
    out = tmp_path / "vectors.parquet"
    result = patchlife("embed", *model, photos, "--out", out, "--part-size", 2, "--ordered", "--ray", "auto")
    assert result.code == 1, result.err
    assert removed
    assert patchlife("embed", *model, photos, "--out", tmp_path / "whole.parquet").code == 1
    tables = [pq.read_table(part) for part in sorted(out.glob("part-*.parquet"))]
    assert len(tables) == 9
    assert pa.concat_tables(tables).equals(pq.read_table(tmp_path / "whole.parquet"))


def test_a_local_cluster_listens_on_this_machine_only_and_continues_a_run(model, photos, tmp_path):
    """Uses the command as a process of its own, because Ray reads some settings when it is imported."""
    import psutil

    words = list(map(str, ["predict", *model, photos]))
    command = [sys.executable, "-m", "patchlife", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    assert subprocess.run([*command, "--out", tmp_path / "whole.jsonl"], env=environment).returncode == 1
    ray = [*command, "--out", tmp_path / "parts", "--part-size", "4", "--ray"]
    with subprocess.Popen(ray, env=environment, stderr=subprocess.PIPE, text=True) as running:
        listening: set[str] = set()
        while running.poll() is None:
            for process in psutil.Process(running.pid).children(recursive=True):
                try:
                    found = process.net_connections("inet")
                except psutil.Error:
                    continue
                listening |= {connection.laddr.ip for connection in found if connection.status == "LISTEN"}
            time.sleep(0.5)
        assert running.returncode == 1, running.stderr.read()
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert lines(tmp_path / "parts") == sorted((tmp_path / "whole.jsonl").read_bytes().splitlines())
