"""The parent process: no process is left, whatever the service does; errors before Ray starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from patchlife.config import ServeConfig
from patchlife.errors import ConfigError
from patchlife.serve.supervisor import check_free, descendants

SUPERVISE = """
import sys
from patchlife.config import ModelConfig, ServeConfig
from patchlife.serve.supervisor import supervise
sys.exit(supervise(ServeConfig(ModelConfig("demo")), sys.argv[1]))
"""

CHILD = """
import os, pickle, signal, subprocess, sys, time
config = pickle.load(sys.stdin.buffer)
assert config.model.model == "demo"
sleeper = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"]
orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", orphan, *sleeper])   # its parent has ended
print(subprocess.Popen(sleeper).pid, os.getpid(), "started", flush=True)
"""

ENDS = {
    "returns": "sys.exit(3)",
    "waits": "time.sleep(300)",
    "ignores SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("ends", "number", "code"),
    [
        ("returns", None, 3),
        ("waits", signal.SIGTERM, 0),
        ("waits", signal.SIGINT, 0),
        pytest.param("ignores SIGTERM", signal.SIGTERM, 0, marks=pytest.mark.slow),  # is killed after 4.8 s
    ],
)
def test_no_process_is_left(tmp_path, ends, number, code):
    (tmp_path / "child.py").write_text(CHILD + ENDS[ends])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", SUPERVISE, "child"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline().split(), process.stdout.readline().split()
        pids = [int(word) for word in [*first, *second[:2]]]
        if number is not None:
            assert set(pids) <= descendants(process.pid)  # the orphan too
            time.sleep(0.5 if ends == "ignores SIGTERM" else 0)
            process.send_signal(number)
        assert process.wait(60) == code
    end = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if runs(pid)]


def test_a_port_in_use_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)


def test_the_settings_pass_through_a_pipe():
    import pickle

    from patchlife.config import ModelConfig

    config = ServeConfig(ModelConfig("demo", life={"budget": 0.5}), max_batch=3)
    assert pickle.loads(pickle.dumps(config)) == config
