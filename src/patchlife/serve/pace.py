"""How many photos may be accepted: as many as are answered long before their deadline."""

from __future__ import annotations

__all__ = ["Pace"]

_SHARE = 0.5  # of the deadline that the photos in front of a new one may take
_LEAST = 2  # photos that are accepted in any case: without a second one the time of a photo is not measured any more


class Pace:
    """The time of a photo while there is no rest, and with it the number of photos that may be accepted.

    Where more photos come than are answered, the queue grows until photos wait for as long as their deadline. Then most
    of them are refused after they were read and waited, or after they were computed. So a photo is accepted only if
    those in front of it take at most half of the deadline, at the rate of the latest answers.

    Args:
        in_work: photos that the replicas compute at once: batch size x replicas.
        most: photos that may be accepted whatever their time: those in the replicas and in the queue.
        deadline: seconds after which a photo is refused.

    Attributes:
        seconds: of a photo, the mean over the replicas; None until it was measured.
    """

    def __init__(self, in_work: int, most: int, deadline: float) -> None:
        self.most, self.deadline = most, deadline
        self.seconds: float | None = None
        self._window = 2 * in_work  # answers of one measurement; those of a batch come at once
        self._since: float | None = None
        self._answers = 0

    @property
    def limit(self) -> int:
        """Photos that may be accepted and not yet answered."""
        if not self.seconds:
            return self.most
        return min(self.most, max(_LEAST, int(_SHARE * self.deadline / self.seconds)))

    def answered(self, left: int, now: float) -> None:
        """A photo was answered at ``now``, in seconds; ``left`` others are accepted and not yet answered."""
        if not left:
            self._since = None  # the replicas rest
        elif self._since is None:
            self._since, self._answers = now, 0
        else:
            self._answers += 1
            if self._answers >= self._window:
                seconds = (now - self._since) / self._answers
                self.seconds = seconds if self.seconds is None else (self.seconds + seconds) / 2
                self._since, self._answers = now, 0
