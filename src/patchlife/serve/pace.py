"""How many photos may be accepted: as many as are answered long before their deadline."""

from __future__ import annotations

__all__ = ["Pace"]

_SHARE = 0.5  # of the deadline is the time that an accepted photo should need, if it waits for a replica


class Pace:
    """The number of photos that may be accepted and not yet answered, from the times of those before.

    Where more photos come than are answered, the queue grows until photos wait for as long as their deadline. Then most
    of them are refused after they waited, or even after they were computed. So the queue is only as long as photos that
    wait are answered after half of their deadline: a photo that was the n-th and took t seconds tells that n times half
    of the deadline / t photos fit. Photos that need not wait, since the replicas have room for them, are refused only
    if such photos missed their deadline.

    Args:
        in_work: photos that the replicas take at once: the ones that they compute, and their next batches.
        queue: the most photos that wait for a replica.
        deadline: seconds after which a photo is refused.
        least: photos that are accepted in any case, 2 or more.
    """

    def __init__(self, in_work: int, queue: int, deadline: float, least: int = 2) -> None:
        self.deadline = deadline
        self._in_work, self._most, self._least = in_work, in_work + queue, least
        self._room = float(in_work)  # in the replicas, for photos that are answered in time
        self._fit: float | None = None  # photos, the last one of which is answered after half of the deadline

    @property
    def limit(self) -> int:
        """Photos that may be accepted and not yet answered."""
        if self._room < self._in_work:
            return int(self._room)
        return self._most if self._fit is None else min(self._most, max(self._in_work, int(self._fit)))

    def answered(self, front: int, seconds: float) -> None:
        """A photo was answered after ``seconds``; ``front`` others were not yet when it was accepted."""
        if front + 1 >= self._in_work:
            self._fits((front + 1) * _SHARE * self.deadline / max(seconds, 1e-9))
        if self._room < self._in_work:  # one more photo after ten times as many answers in time
            self._room = min(self._in_work, self._room + 0.1 / self._room)

    def late(self, front: int) -> None:
        """A photo was not answered within the deadline."""
        if front + 1 >= self._in_work:
            self._fits((front + 1) * _SHARE)
        elif front < self._room:
            self._room = float(max(self._least, front))

    def _fits(self, photos: float) -> None:
        """By one photo so many fit; the mean over about as many as the replicas take counts."""
        self._fit = photos if self._fit is None else self._fit + (photos - self._fit) / self._in_work
