"""How many photos are accepted, with a simulated service: one replica that computes batches in the order of arrival."""

from __future__ import annotations

from collections import deque
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from patchlife.serve.pace import Pace


class Simulated:
    """Photos come evenly spaced; those past their deadline are dropped from the queue, as the service does.

    Attributes:
        good: times at which photos were answered. late: photos that reached their deadline. refused: at once.
    """

    def __init__(self, pace: Pace, batch: int, seconds: float, rate: float, duration: float) -> None:
        self.good: list[float] = []
        self.late = self.refused = 0
        queue: deque[float] = deque()
        free, running = 0.0, list[float]()
        for number in count():
            now = number / rate
            if now > duration:
                break
            while (running and free <= now) or (not running and queue):  # a batch ends, or the first one begins
                at = free if running else max(free, queue[0])
                for place, begun in enumerate(running):
                    left = len(running) - place - 1 + len(queue)
                    if at - begun <= pace.deadline:
                        self.good.append(at)
                        pace.answered(left, at)
                    else:
                        self.late += 1
                waiting = [begun for begun in queue if at - begun <= pace.deadline]
                self.late += len(queue) - len(waiting)
                running, queue = waiting[:batch], deque(waiting[batch:])
                free = at + seconds * len(running)
            if len(running) + len(queue) < pace.limit:
                queue.append(now)
            else:
                self.refused += 1


@pytest.mark.parametrize("seconds", [0.02, 0.16, 0.5])
def test_at_twice_the_rate_that_can_be_answered_nothing_is_late_and_the_replica_has_no_rest(seconds):
    pace = Pace(8, 80, 10.0)
    run = Simulated(pace, 8, seconds, 2 / seconds, 600)
    after = [at for at in run.good if at > 60]
    assert len(after) > 0.97 * (600 - 60) / seconds
    assert run.late <= 80, "more than the first ones, before the time of a photo was measured"
    assert pace.seconds == pytest.approx(seconds, rel=0.3)


def test_without_it_most_photos_are_late():
    """The simulated service has the fault that `Pace` mends."""

    class Unlimited(Pace):
        limit = 80

    run = Simulated(Unlimited(8, 80, 10.0), 8, 0.16, 2 / 0.16, 600)
    assert run.late > 500


@settings(max_examples=50)
@given(some.integers(1, 32), some.floats(0.001, 2), some.floats(0.05, 5), some.floats(0.5, 60))
def test_it_is_never_shut_for_good(batch, seconds, load, deadline):
    """Whatever came before: with one photo after the other all are accepted again."""
    pace = Pace(batch, 10 * batch, deadline)
    Simulated(pace, batch, seconds, load / seconds, 400 * seconds)
    assert pace.limit >= 2


def test_a_hiccup_is_forgotten():
    pace = Pace(8, 80, 10.0)
    pace.seconds = 30.0
    assert pace.limit == 2
    Simulated(pace, 8, 0.05, 40, 60)
    assert pace.limit == 80


def test_a_rest_is_not_counted():
    pace = Pace(1, 10, 10.0)
    for second in range(10):
        pace.answered(0, 1000.0 * second)
    assert pace.seconds is None
    assert pace.limit == 10
