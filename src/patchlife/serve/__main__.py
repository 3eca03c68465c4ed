"""The service in a process of its own, as `supervisor.py` starts it; its settings come through standard input."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from dataclasses import replace

from ..config import ServeConfig
from ..errors import PatchLifeError
from .supervisor import die_with_parent


def main() -> int:
    """Run the service; returns the exit code, as `patchlife` would."""
    die_with_parent()
    config = pickle.load(sys.stdin.buffer)
    try:
        _run(config)
        return 0
    except KeyboardInterrupt:
        return 130
    except (PatchLifeError, OSError) as error:
        print(f"patchlife: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        print(f"patchlife: error: this is a bug ({type(error).__name__}); please report it", file=sys.stderr)
        return 70


def _run(config: ServeConfig) -> None:
    from .answering import open_answerer
    from .service import serve_until_signal

    # errors of the model are told here, before Ray runs; on the CPU, because the memory of a GPU is for the replicas
    description = open_answerer(replace(config, device="cpu"), warm_up=False).description
    serve_until_signal(config, description)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Ray's threads may still wait for processes that have ended
