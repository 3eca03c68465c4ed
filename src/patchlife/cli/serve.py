"""``patchlife serve``: answer photos over HTTP, by Ray Serve."""

from __future__ import annotations

from ..config import ServeConfig
from ..extras import require
from .common import check_engine, say

__all__ = ["run"]


def run(config: ServeConfig) -> int:
    """Serve until it is interrupted; returns the exit code."""
    require("ray", "ray", "patchlife serve")
    require("fastapi", "ray", "patchlife serve")
    check_engine(config.model.model, config.engine, config.trust, config.dtype)
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        say(
            f"the service is open to everyone who can reach {config.host}, without a password; --host 127.0.0.1 is for "
            "this machine only"
        )
    from ..serve.supervisor import check_free, supervise

    if config.address is None:
        check_free(config.host, config.port)
    return supervise(config)
