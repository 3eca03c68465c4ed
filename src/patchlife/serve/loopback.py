"""Ray's ports on 127.0.0.1 only, in a cluster that belongs to one command."""

from __future__ import annotations

from typing import Any

from ..config import ServeConfig

__all__ = ["keep_to_loopback"]

_EVERYWHERE, _HERE = "[::]:", "127.0.0.1:"
_UNKNOWN = (
    "with this version of Ray patchlife serve cannot keep its replicas to 127.0.0.1; install an older Ray, or start a "
    "cluster yourself and give --address"
)


def keep_to_loopback(config: ServeConfig) -> None:
    """Let this replica listen for other replicas on 127.0.0.1; called by its constructor, before it listens.

    Ray itself follows its node's address; only Ray Serve's replicas listen on all addresses, and there is no setting.
    On an existing cluster nothing changes. A test reads the addresses of all processes.

    Raises RuntimeError if this version of Ray listens in another way, which nobody has looked at yet.
    """
    if config.address is not None:
        return
    from ray.serve._private import replica

    add = getattr(replica, "add_port_to_grpc_server", None)
    if add is None:
        raise RuntimeError(_UNKNOWN)

    def add_here(server: Any, address: str) -> Any:
        if not address.startswith(_EVERYWHERE):
            raise RuntimeError(_UNKNOWN)
        return add(server, address.replace(_EVERYWHERE, _HERE))

    replica.add_port_to_grpc_server = add_here
