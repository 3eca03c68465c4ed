"""The process that the user starts: it starts the service in a session of its own, and leaves no process behind.

Ctrl-C, `timeout` and service managers may signal all processes of a group at once. Ray's processes would then end
before the accepted photos are answered, so they are in another session, and only the service gets the signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..config import ServeConfig
from ..errors import ConfigError

__all__ = ["check_free", "descendants", "die_with_parent", "kill", "supervise"]

_END = 4.8  # seconds from the signal until all processes are killed
_SUBREAPER, _PARENT_DEATH_SIGNAL = 36, 1  # of prctl, from Linux's <sys/prctl.h>


def supervise(config: ServeConfig, module: str = "patchlife.serve") -> int:
    """Run the service in another process; returns its exit code, after the last of its processes has ended.

    ``module`` is that of the service; it gets the settings through standard input.
    """
    _prctl(_SUBREAPER)  # a process whose parent ends becomes a child of this one, so that it is found below
    command = [sys.executable, "-m", module]
    service = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    signalled: list[float] = []

    def forward(number: int, _: object) -> None:
        signalled.append(time.monotonic())
        service.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert service.stdin is not None
        with contextlib.suppress(BrokenPipeError), service.stdin as pipe:
            pickle.dump(config, pipe)
        while service.poll() is None and not (signalled and time.monotonic() - signalled[0] > _END):
            time.sleep(0.05)
    finally:
        kill(descendants(os.getpid()))
        for number, handler in before.items():
            signal.signal(number, handler)
    code = service.wait()
    return 0 if signalled else code if code >= 0 else 70


def check_free(host: str, port: int) -> None:
    """Raise ConfigError for an address that cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port"
            ) from None


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent of this process ends, even by signal 9."""
    _prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def descendants(root: int) -> set[int]:
    """The processes that ``root`` started, and those that they started; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found: set[int] = set()
    remaining = [root]
    while remaining:
        own = children.get(remaining.pop(), [])
        found.update(own)
        remaining += own
    return found


def kill(processes: set[int]) -> None:
    """End these processes at once."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _prctl(option: int, value: int = 1) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
