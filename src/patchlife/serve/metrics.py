"""Numbers of a service, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of one process; nothing is registered outside of this object.

    Attributes:
        requests: by path and status.
        answers: by budget.
        refused: by reason.
        disconnected: clients that left before their answer.
        seconds: from the whole body to the answer.
        pending: photos that are accepted and not yet answered.
        step: of the budgets of --degrade, 0 is the first.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "patchlife_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.answers = Counter("patchlife_answers", "Photos answered, by budget.", ["budget"], registry=registry)
        self.refused = Counter("patchlife_refused", "Photos refused, by reason.", ["reason"], registry=registry)
        self.disconnected = Counter(
            "patchlife_disconnected", "Clients that left before their answer.", registry=registry
        )
        self.seconds = Histogram(
            "patchlife_answer_seconds",
            "Seconds from the whole body to the answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.pending = Gauge("patchlife_pending", "Photos accepted and not yet answered.", registry=registry)
        self.step = Gauge("patchlife_degrade_step", "Index of the budget that answers now.", registry=registry)

    def text(self) -> bytes:
        """All numbers."""
        return generate_latest(self._registry)
