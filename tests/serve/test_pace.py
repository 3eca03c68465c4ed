"""How many photos are accepted, with a simulated service: replicas that compute batches in the order of arrival."""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from patchlife.serve.pace import Pace


class Photo(NamedTuple):
    came: float
    front: int


class Simulated:
    """Photos come evenly spaced; those past their deadline leave the queue, as in the service.

    Attributes:
        good: times at which photos were answered. late: photos that reached their deadline. refused: at once.
    """

    def __init__(self, pace: Pace, batch: int, seconds: float, rate: float, duration: float, replicas: int = 1) -> None:
        self.pace, self.batch, self.seconds = pace, batch, seconds
        self.good: list[float] = []
        self.late = self.refused = 0
        self.queue: deque[Photo] = deque()
        self.running: list[tuple[float, int, list[Photo]]] = []  # (end, number, photos) of each busy replica
        for number in range(int(duration * rate)):
            now = number / rate
            while self.running and self.running[0][0] <= now:
                at, _, photos = heapq.heappop(self.running)
                self.finish(photos, at)
                self.begin(at, number)
            self.drop(now)
            pending = len(self.queue) + sum(len(photos) for *_, photos in self.running)
            if pending < pace.limit:
                self.queue.append(Photo(now, pending))
            else:
                self.refused += 1
            if len(self.running) < replicas:
                self.begin(now, number)

    def finish(self, photos: list[Photo], at: float) -> None:
        for photo in photos:
            if at - photo.came <= self.pace.deadline:
                self.good.append(at)
                self.pace.answered(photo.front, at - photo.came)
            else:
                self.late += 1
                self.pace.late(photo.front)

    def drop(self, at: float) -> None:
        while self.queue and at - self.queue[0].came > self.pace.deadline:
            self.late += 1
            self.pace.late(self.queue.popleft().front)

    def begin(self, at: float, number: int) -> None:
        self.drop(at)
        photos = [self.queue.popleft() for _ in range(min(self.batch, len(self.queue)))]
        if photos:
            heapq.heappush(self.running, (at + self.seconds * len(photos), number, photos))


def pace(batch: int = 8, replicas: int = 1, deadline: float = 10.0) -> Pace:
    return Pace(2 * batch * replicas, 64, deadline, max(2, replicas))


@pytest.mark.parametrize("load", [1.3, 2, 4, 20])
@pytest.mark.parametrize("seconds", [0.02, 0.16, 0.3, 0.5])
def test_under_overload_nearly_all_accepted_photos_are_answered_and_the_replica_has_no_rest(seconds, load):
    run = Simulated(pace(), 8, seconds, load / seconds, 600)
    assert len([at for at in run.good if at > 60]) > 0.97 * (600 - 60) / seconds
    assert run.late <= 100, "more than the first ones, before the time of a photo was known"


@pytest.mark.parametrize("load", [2, 4])
@pytest.mark.parametrize("seconds", [0.7, 1.0, 2.0])
def test_a_model_that_hardly_meets_the_deadline_answers_most_of_what_it_can(seconds, load):
    """Two batches take longer than the deadline: fewer photos are accepted than the replica has room for."""
    run = Simulated(pace(), 8, seconds, load / seconds, 2000)
    assert len([at for at in run.good if at > 200]) > 0.7 * (2000 - 200) / seconds


def test_with_the_length_of_the_queue_alone_most_photos_are_late():
    """The simulated service has the fault that `Pace` mends."""

    class Unlimited(Pace):
        limit = 80

    run = Simulated(Unlimited(16, 64, 10.0), 8, 0.16, 2 / 0.16, 600)
    assert run.late > 500


def test_replicas_that_work_side_by_side_are_not_taken_for_a_queue():
    """Four replicas without batches, 1.1 s a photo and 2 s of time: 3.6 photos a second can be answered, 3 come."""
    run = Simulated(pace(1, 4, 2.0), 1, 1.1, 3.0, 600, replicas=4)
    assert len(run.good) > 0.97 * 3.0 * 600


def test_a_model_that_becomes_slower_and_faster_again():
    own = pace()
    Simulated(own, 8, 0.02, 25, 60)
    slow = Simulated(own, 8, 1.0, 4, 1000)
    assert len([at for at in slow.good if at > 200]) > 0.7 * 800
    fast = Simulated(own, 8, 0.02, 100, 120)
    assert len([at for at in fast.good if at > 60]) > 0.97 * 60 / 0.02


@pytest.mark.parametrize("seconds", [0.02, 0.5, 2.0])
def test_below_what_can_be_answered_nothing_is_refused(seconds):
    run = Simulated(pace(), 8, seconds, 0.5 / seconds, 1000 * seconds)
    assert (run.late, run.refused) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 16), some.integers(1, 4), some.floats(1.2, 8), some.floats(0.002, 0.05))
def test_any_shape_of_service_answers_what_it_can(batch, replicas, load, share):
    """``share``: of the deadline that a photo takes a replica, so that two full batches are answered in time."""
    seconds = 10.0 * share / batch
    duration = 3000 * seconds / replicas
    run = Simulated(pace(batch, replicas), batch, seconds, load * replicas / seconds, duration, replicas)
    assert len(run.good) > 0.8 * duration * replicas / seconds
    assert len(run.good) / (len(run.good) + run.late) > 0.8
