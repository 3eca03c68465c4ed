"""Ray's ports on 127.0.0.1 only, in a cluster that belongs to one command."""

from __future__ import annotations

from ..config import ServeConfig

__all__ = ["keep_to_loopback"]

_EVERYWHERE, _HERE = "[::]:", "127.0.0.1:"


def keep_to_loopback(config: ServeConfig) -> None:
    """Let this replica listen for other replicas on 127.0.0.1; called by its constructor, before it listens.

    Ray itself follows its node's address; only Ray Serve's replicas listen on all addresses, and there is no setting.
    On an existing cluster nothing changes. A test reads the addresses of all processes.
    """
    if config.address is not None:
        return
    from ray.serve._private import replica

    if (add := getattr(replica, "add_port_to_grpc_server", None)) is not None:
        replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace(_EVERYWHERE, _HERE))
