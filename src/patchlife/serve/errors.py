"""Errors of requests: a status and a message, which the client reads."""

from __future__ import annotations

__all__ = ["RETRY_AFTER", "RequestError", "busy"]

RETRY_AFTER = 1
"""Seconds after which a refused client may try again."""


class RequestError(Exception):
    """A request that gets an error as its answer.

    Attributes:
        status: HTTP status.
        message: for the client; it holds nothing of the server's files and code.
        reason: one word for the metrics.
    """

    def __init__(self, status: int, message: str, reason: str = "invalid") -> None:
        super().__init__(status, message, reason)  # all of them, so that the error can be pickled
        self.status, self.message, self.reason = status, message, reason

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"Retry-After": str(RETRY_AFTER)} if self.status == 503 else {}


def busy(message: str, reason: str = "queue_full") -> RequestError:
    """The error of a service that cannot answer now."""
    return RequestError(503, f"{message}; try again in {RETRY_AFTER} s", reason)
