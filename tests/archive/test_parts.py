"""The command with --ray: the bytes of one process, parts, continuing a run. The cluster is this process."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import write_photos

from patchlife.archive import PartFolder, cluster
from patchlife.cli import parts
from patchlife.errors import ConfigError, MissingExtraError


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))


@pytest.mark.parametrize("options", [[], ["--mode", "adaptive"], ["--dtype", "bfloat16"], ["--top", 2]])
def test_parts_hold_the_bytes_of_one_process(options, here, patchlife, model, photos, tmp_path):
    line = ["predict", *model, photos, *options]
    alone = patchlife(*line, "--out", tmp_path / "whole.jsonl")
    result = patchlife(*line, "--out", tmp_path / "parts", "--ray", "--part-size", 3)
    assert (alone.code, result.code) == (1, 1)
    assert here == [2, 1, 0]  # a part size of 3 is 4 in batches of 2
    assert joined(tmp_path / "parts") == (tmp_path / "whole.jsonl").read_bytes()
    assert "parts: 3 in" in result.err
    assert "11 photos, 1 failed (the first: " in result.err
    assert ("calibrated it on 10 of the photos" in result.err) == ("adaptive" in options)


def test_a_part_size_that_is_not_given_depends_on_the_number_of_workers(here, patchlife, model, photos, tmp_path):
    assert patchlife("predict", *model, photos, "--out", tmp_path / "parts", "--ray").code == 1
    assert len(here) == 6  # of 2 photos: about four for each of two workers


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_parquet_parts_hold_the_rows_of_one_process(verb, here, patchlife, model, photos, tmp_path):
    line = [verb, *model, photos]
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    assert patchlife(*line, "--out", whole).code == 1
    assert patchlife(*line, "--out", parts, "--ray", "--part-size", 4).code == 1
    tables = [pq.read_table(part) for part in sorted(parts.glob("part-*.parquet"))]
    assert pa.concat_tables(tables).equals(pq.read_table(whole))
    assert pq.read_table(parts).num_rows == 11  # the folder is a data set


def test_embeddings_as_json_lines(here, patchlife, model, photos, tmp_path):
    from patchlife.io.parquet import EMBEDDINGS

    line = ["embed", *model, photos, "--normalize"]
    assert patchlife(*line, "--out", tmp_path / "whole.parquet").code == 1
    assert patchlife(*line, "--out", tmp_path / "parts.jsonl", "--ray").code == 1
    found = list(map(json.loads, joined(tmp_path / "parts.jsonl").splitlines()))
    assert found == list(EMBEDDINGS.read(tmp_path / "whole.parquet"))  # vectors as base64: bit for bit


def test_resume_computes_the_absent_parts_only(here, patchlife, model, photos, tmp_path):
    line = ["predict", *model, photos, "--out", tmp_path / "parts", "--ray", "--part-size", 4]
    first = patchlife(*line)
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert set(before) == {"_run.json", *(f"part-{number:06}.jsonl" for number in range(3))}
    refused = patchlife(*line)
    assert refused.code == 2
    assert "parts already exists; continue it with --resume, or choose another --out" in refused.err
    (tmp_path / "parts" / "part-000001.jsonl").unlink()
    (tmp_path / "parts" / ".part-000001.jsonl.half").write_bytes(b"{")  # of a writer that was killed
    here.clear()
    again = patchlife(*line[:-2], "--resume")  # the part size is that of the run
    assert here == [1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("[!.]*")} == before
    assert again.err.partition(", 0.")[0] == first.err.partition(", 0.")[0]
    here.clear()
    assert patchlife(*line, "--resume").code == 1
    assert here == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budget", 0.5], "was started with another model or other settings: expected run"),
        (["--part-size", 6], "has parts of 4 photos, got 6; remove --part-size"),
        (["{more}"], "was started with another list of photos (11 photos, now 12)"),
    ],
)
def test_another_run_is_not_continued(change, message, here, patchlife, model, photos, tmp_path):
    extra = write_photos(tmp_path / "more", 1)
    line = ["predict", *model, photos, "--out", tmp_path / "parts", "--ray", "--part-size", 4]
    patchlife(*line)
    (tmp_path / "parts" / "part-000001.jsonl").unlink()
    here.clear()
    words = [*line, "--resume"]
    words[words.index(photos) + 1 : words.index(photos) + 1] = extra if change == ["{more}"] else change
    if "--part-size" in change:
        words = [*line[:-1], 6, "--resume"]
    result = patchlife(*words)
    assert result.code == 2
    assert message in result.err
    assert here == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"path": "a", "ru', "(its last line is incomplete); delete it"),
        (b'{"path": "a", "run": "00000000", "error": "e"}\n', "part 1 in .* is of another run; delete it"),
        (b"", "(its last line is incomplete); delete it"),
    ],
)
def test_a_damaged_part_is_not_taken_for_finished(content, message, here, patchlife, model, photos, tmp_path):
    import re

    line = ["predict", *model, photos, "--out", tmp_path / "parts", "--ray", "--part-size", 4]
    patchlife(*line)
    (tmp_path / "parts" / "part-000001.jsonl").write_bytes(content)
    result = patchlife(*line, "--resume")
    assert result.code == 2
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), result.err)


def test_a_folder_of_something_else_is_not_used(here, patchlife, model, photos, tmp_path):
    for out in (photos, photos / "00.png"):
        result = patchlife("predict", *model, photos, "--out", out, "--ray", "--resume")
        assert result.code == 2
        assert "choose another --out" in result.err
    assert len(list(photos.iterdir())) == 11


def test_the_accuracy_is_that_of_one_process(here, patchlife, model, photos, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{index:02}.png,{index % 10}\n" for index in range(11)))
    line = ["predict", *model, photos, "--labels-from", table]
    alone = patchlife(*line, "--out", tmp_path / "whole.jsonl").err
    found = patchlife(*line, "--out", tmp_path / "parts", "--ray").err
    assert "top-1" in alone
    assert alone.partition("top-1")[2].split(",")[0] == found.partition("top-1")[2].split(",")[0]


def expecting_others(verb, config, first, real=parts._open_again):
    """Opens the model of a worker as if the first worker had had other weights."""
    return real(verb, config, dataclasses.replace(first, base="00000000"))


def test_a_machine_with_other_weights_is_refused(here, patchlife, model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_open_again", expecting_others)
    result = patchlife("predict", *model, photos, "--out", tmp_path / "parts", "--ray")
    assert result.code == 2
    assert f"on machine {platform.node()}: other weights or settings than on the first one: expected 0000" in result.err


# ---- inputs and outputs at addresses, in tables and in shards


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_addresses_tables_and_shards_give_the_same_predictions(here, memory, patchlife, model, photos, tmp_path):
    paths = sorted(photos.iterdir())
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    pq.write_table(pa.table({"path": [f"photos/{path.name}" for path in paths]}), tmp_path / "list.parquet")
    for path in paths:
        memory.pipe_file(f"/bucket/photos/{path.name}", path.read_bytes())
    memory.pipe_file("/bucket/photos/.hidden.png", b"")
    memory.pipe_file("/bucket/photos/notes.txt", b"")
    memory.pipe_file("/bucket/shard.tar", (tmp_path / "shard.tar").read_bytes())
    memory.pipe_file("/bucket/list.parquet", (tmp_path / "list.parquet").read_bytes())
    assert patchlife("predict", *model, photos, "--out", tmp_path / "expected.jsonl").code == 1
    expected = list(map(json.loads, (tmp_path / "expected.jsonl").read_text().splitlines()))
    inputs = [
        tmp_path / "list.parquet",
        tmp_path / "shard.tar",
        "memory://bucket/photos",
        "memory://bucket/photos/*.png",
        "memory://bucket/list.parquet",
        "memory://bucket/*.tar",
        f"file://{photos}",
    ]
    for number, given in enumerate(inputs):
        result = patchlife("predict", *model, given, "--out", f"memory://out/{number}", "--ray")
        assert result.code == 1, result.err
        assert ("1 file is left out" in result.err) == (given == "memory://bucket/photos")
        content = b"".join(memory.cat(f"/out/{number}/part-*.jsonl").values())
        records = list(map(json.loads, content.splitlines()))
        assert [{**record, "path": 0, "error": 0} for record in records] == [
            {**record, "path": 0, "error": 0} for record in expected
        ], given
        names = [record["path"].rpartition("/")[2] for record in records]
        assert names == [path.name for path in paths]
        assert patchlife("predict", *model, given, "--out", tmp_path / f"{number}.jsonl").code == 1
        assert content == (tmp_path / f"{number}.jsonl").read_bytes()


def test_a_run_at_an_address_is_continued(here, memory, patchlife, model, photos):
    line = ["predict", *model, photos, "--out", "memory://out/run", "--ray", "--part-size", 4]
    assert patchlife(*line).code == 1
    before = memory.cat("/out/run/*")
    memory.rm("/out/run/part-000002.jsonl")
    here.clear()
    assert patchlife(*line, "--resume").code == 1
    assert here == [2]
    assert memory.cat("/out/run/*") == before


class Denied(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
    """A file system with an error of its own, which is not an OSError."""

    protocol = "denied"

    def exists(self, *_, **__):
        raise RuntimeError("no credentials")


def test_an_error_of_the_file_system_of_the_results_is_told(here, patchlife, model, photos):
    fsspec.register_implementation("denied", Denied, clobber=True)
    result = patchlife("predict", *model, photos, "--out", "denied://bucket/run", "--ray")
    assert result.code == 2
    assert "denied://bucket/run: expected an address that can be written and read, found no credentials" in result.err


def test_an_error_while_a_shard_at_an_address_is_read_is_told(here, memory, patchlife, model, tmp_path, monkeypatch):
    class Lost(io.BytesIO):
        def read(self, *_):
            raise RuntimeError("connection lost")

    memory.pipe_file("/bucket/shard.tar", b"x" * 2000)
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Lost())
    result = patchlife("predict", *model, "memory://bucket/shard.tar", "--out", tmp_path / "parts", "--ray")
    assert result.code == 2
    assert "memory://bucket/shard.tar: expected an address that can be read, found connection lost" in result.err


def test_a_folder_inside_a_file_at_an_address_is_refused(here, patchlife, model, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(write_photos(tmp_path, 1)[0], "p/00.png")
    result = patchlife("predict", *model, f"zip://p::file://{tmp_path}/a.zip", "--out", tmp_path / "out", "--ray")
    assert result.code == 2
    assert "found a folder inside another file (::)" in result.err
    result = patchlife("predict", *model, f"zip://p/00.png::file://{tmp_path}/a.zip", "--out", tmp_path / "o", "--ray")
    assert (result.code, result.err.count("1 photos, 0 failed")) == (0, 1)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("memory://nothing/here", "memory://nothing/here: expected an address that can be read, found no such file"),
        ("no-such://bucket/photos", "expected an address that can be read, found Protocol not known: no-such"),
        ("no-such.parquet", "no-such.parquet: expected a Parquet table, found no such file"),
    ],
)
def test_an_input_that_is_not_there_is_named(paths, message, here, patchlife, model, tmp_path):
    result = patchlife("predict", *model, paths, "--out", tmp_path / "parts", "--ray")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "parts").exists()


def test_tables_that_list_no_photos_are_refused(here, patchlife, model, tmp_path):
    cases = {
        "expected a text column 'path', found the columns photo": pa.table({"photo": ["a.png"]}),
        "expected a text column 'path', found the columns path": pa.table({"path": [1]}),
        "expected paths of photos, found no row": pa.table({"path": pa.array([], pa.string())}),
        "expected a path in every row, found an empty one": pa.table({"path": ["a.png", None]}),
    }
    for message, table in cases.items():
        pq.write_table(table, tmp_path / "list.parquet")
        result = patchlife("predict", *model, tmp_path / "list.parquet", "--out", tmp_path / "parts", "--ray")
        assert result.code == 2
        assert message in result.err
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    assert "expected a Parquet table, found" in patchlife("predict", *model, tmp_path / "list.parquet").err


def test_photos_that_a_table_lists_and_that_are_not_there_are_errors_of_their_rows(here, patchlife, model, tmp_path):
    write_photos(tmp_path, 1)
    pq.write_table(pa.table({"path": ["00.png", "gone.png"]}), tmp_path / "list.parquet")
    result = patchlife("predict", *model, tmp_path / "list.parquet", "--out", tmp_path / "parts", "--ray")
    assert result.code == 1
    assert "2 photos, 1 failed" in result.err
    assert "found no such file" in result.err


# ---- options and packages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predict m p --ray", "--ray writes a folder of parts, got none; give it with --out FOLDER"),
        ("predict m p --part-size 4", "--part-size is about the parts of a run on Ray; add --ray, or remove"),
        ("predict m p --out o --ordered", "--ordered is about the parts of a run on Ray; add --ray, or remove"),
        ("predict m p --out o --part-size 0 --ray", "part_size must be at least 1, got 0"),
        ("predict m p --out s3://b/o", "one process writes to a file of this machine, got --out s3://b/o"),
        ("embed m p --out s3://b/o.parquet", "one process writes to a file of this machine"),
        ("embed m p --out o.npy --ray", "--ray writes a folder of .parquet or .jsonl files, got o.npy"),
        ("predict m p --out o --ray ray://h:1", "expected HOST:PORT or auto after --ray, got ray://h:1"),
    ],
)
def test_options_that_do_not_fit(line, message, patchlife):
    result = patchlife(*line.split())
    assert result.code == 2
    assert message in result.err


def test_a_missing_package_is_named_with_its_install_line(patchlife, model, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = patchlife("predict", *model, photos, "--out", tmp_path / "parts", "--ray")
    assert result.code == 2
    assert "--ray needs ray, which is not installed: pip install 'patchlife[ray]'" in result.err
    assert not (tmp_path / "parts").exists()
    with pytest.raises(MissingExtraError), cluster.connected("auto"):
        pass


def test_workers_are_one_per_gpu_or_per_number_of_threads(monkeypatch):
    import ray

    nodes = [{"CPU": 16.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}, {"memory": 1.0}]
    found = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*found, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    assert cluster.workers_of("auto", 1, None) == cluster.Workers(5, 2, 1)
    assert cluster.workers_of("auto", 1, 1) == cluster.Workers(5, 1, 1)
    assert cluster.workers_of("cpu", 3, None) == cluster.Workers(5 + 1 + 2, 3, 0)
    with pytest.raises(ConfigError, match="got --device mps; choose --device cpu"):
        cluster.workers_of("mps", 1, None)
    with pytest.raises(ConfigError, match="of one machine \\(--threads\\), the Ray cluster has 16; give fewer"):
        cluster.workers_of("cpu", 17, None)
    found[1:3] = []
    assert cluster.workers_of("auto", 1, None) == cluster.Workers(16, 1, 0)
    with pytest.raises(ConfigError, match="has no GPU; choose --device auto"):
        cluster.workers_of("cuda", 1, None)


def test_a_part_is_complete_or_absent(tmp_path, monkeypatch):
    folder = PartFolder(tmp_path, None)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        folder.write_part(0, b"content")
    assert folder.finished() == set()
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
    assert folder.finished() == set()
