"""A worker finds the photos that kill it, without losing a photo and with a bounded number of killed workers."""

from __future__ import annotations

import pickle
import platform
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchlife.archive.worker import TRIES, Done, Journal, Part, Work, Worker, _GivenUp
from patchlife.errors import CheckpointError, ConfigError, ImageError, MissingExtraError


class KilledError(BaseException):
    """Stands for the end of the process."""


def record_of(photo: object) -> dict:
    if isinstance(photo, _GivenUp):
        with pytest.raises(ImageError) as error:
            photo.content(1)
        return {"path": str(photo), "error": str(error.value)}
    return {"path": str(photo)}


def work(deadly: set[str], most: int = 1000, runs: list[list[str]] | None = None, **changes) -> Work:
    """Work whose records say nothing but the path. ``deadly`` photos kill, and more than ``most`` photos at once."""

    def records(pipeline: None, photos: Sequence[object]):
        if runs is not None:
            runs.append(list(map(str, photos)))
        for photo in photos:
            if photo in deadly or len(photos) > most:
                raise KilledError
            yield record_of(photo)

    settings = {
        "folder": ".",
        "opened": lambda: None,
        "records": records,
        "summary": lambda record: record,
        "encoded": lambda records: pickle.dumps(list(records)),
    }
    return Work(**{**settings, **changes})


def finish(work: Work, part: Part) -> tuple[Done, int]:
    """(result, number of killed workers); a killed worker is replaced by a new one, as Ray does."""
    journal = Journal()
    for killed in range(1000):
        try:
            return Worker(work, journal).done(part), killed
        except KilledError:
            continue
    raise AssertionError("it never ends")


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_exactly_the_deadly_photos_are_given_up(fates):
    photos = tuple(f"{index}.png" for index in range(len(fates)))
    deadly = {photo for photo, kills in zip(photos, fates, strict=True) if kills}
    done, killed = finish(work(deadly), Part(7, photos))
    records = pickle.loads(done.content)
    assert [record["path"] for record in records] == list(photos)
    assert {record["path"] for record in records if "error" in record} == deadly
    assert all(f"ended {TRIES} worker processes" in record["error"] for record in records if "error" in record)
    assert killed == (1 + TRIES * len(deadly) if deadly else 0)
    assert list(done.summaries) == records
    assert done.number == 7


def test_the_others_run_together_again_at_the_end():
    runs: list[list[str]] = []
    finish(work({"b"}, runs=runs), Part(0, ("a", "b", "c")))
    assert runs[0] == runs[-1] == ["a", "b", "c"]
    assert runs[1:-1] == [["a"], ["b"], ["b"], ["c"]]  # a photo that has ended alone is not run alone again


def test_a_worker_that_is_killed_once_for_another_reason_gives_up_no_photo():
    attempts = iter([True])

    def records(pipeline, photos):
        if next(attempts, False):
            raise KilledError
        return map(record_of, photos)

    done, killed = finish(work(set(), records=records), Part(0, ("a", "b")))
    assert pickle.loads(done.content) == [{"path": "a"}, {"path": "b"}]
    assert killed == 1


def test_photos_that_kill_only_together_run_alone():
    done, killed = finish(work({"b"}, most=2), Part(0, ("a", "b", "c")))
    records = pickle.loads(done.content)
    assert [record["path"] for record in records] == ["a", "b", "c"]
    assert [("error" in record) for record in records] == [False, True, False]
    assert killed == 1 + TRIES + TRIES


def test_the_notes_of_a_finished_part_are_dropped():
    journal = Journal()
    Worker(work(set()), journal).done(Part(0, ("a",)))
    assert journal.begin(0, "whole") == 0


def test_a_worker_writes_the_part_if_the_command_does_not():
    written = {}
    done = Worker(work(set(), write=written.__setitem__), Journal()).done(Part(3, ("a",)))
    assert done.content is None
    assert pickle.loads(written[3]) == [{"path": "a"}]

    def full(number, content):
        raise OSError(28, "No space left on device")

    failure = Worker(work(set(), write=full), Journal()).done(Part(3, ("a",))).failure
    assert failure == "part 3 cannot be written: [Errno 28] No space left on device"


def test_a_machine_without_the_folder_of_the_command_reads_addresses_and_absolute_paths_only():
    there = Part(0, ("s3://bucket/a.jpg", "/disk/b.jpg"))
    assert finish(work(set(), folder="/no/such/folder"), there)[0].failure == ""
    failure = finish(work(set(), folder="/no/such/folder"), Part(1, ("a.jpg",)))[0].failure
    assert "has no folder /no/such/folder, to which paths of photos are relative; give absolute paths" in failure


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no such model"),
        CheckpointError("no such file"),
        MissingExtraError("ray", "ray", "--ray"),
        OSError("no disk"),
    ],
)
def test_a_model_that_cannot_be_opened_ends_the_run_with_the_name_of_the_machine(error):
    def opened():
        raise error

    failure = finish(work(set(), opened=opened), Part(0, ("a",)))[0].failure
    assert failure == f"the model cannot be opened on machine {platform.node()}: {error}"
