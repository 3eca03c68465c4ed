"""The command line: ``patchlife VERB ...``.

A verb is a row of `VERBS` and a file of its own name in `commands/`, whose ``run(config)`` returns the exit
code. What can be said to it is its dataclass in `config.py`. Nothing heavy is imported before the command
line is understood.

Exit codes: 0 all well; 1 some photos failed, the others are done; 2 nothing could be done as asked;
70 a bug in patchlife; 130 interrupted; 141 whoever read the output went away.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from ..config import BenchConfig, DemoConfig, DrawConfig, EvalConfig, ExportConfig, FitConfig, InfoConfig, PredictConfig
from ..errors import PatchLifeError
from ..version import __version__
from .arguments import Parser, add_options, from_options

__all__ = ["VERBS", "main"]

VERBS: dict[str, type] = {
    "demo": DemoConfig,
    "predict": PredictConfig,
    "draw": DrawConfig,
    "info": InfoConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "fit": FitConfig,
    "eval": EvalConfig,
}
"""Every verb and what it can be told."""

_EXAMPLES = """examples:
  patchlife demo
  patchlife predict vit_tiny_patch16_224 photos/ --checkpoint vit.safetensors --budget 0.6 --out results.jsonl
  patchlife draw vit_tiny_patch16_224 dog.jpg --pretrained --strip
  patchlife info vit_small_patch14_dinov2 --budget 0.5
  patchlife fit vit_tiny_patch16_224 photos/ --pretrained --out my-adapter"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's own); returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve shared cores
    try:
        verb, config = _parse(sys.argv[1:] if argv is None else argv)
        code = importlib.import_module(f".{verb}", __package__).run(config)
        sys.stdout.flush()  # here, where a reader that went away is still caught
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it exits
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (PatchLifeError, OSError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"this is a bug ({type(error).__name__}); please report it with the lines above", 70)


def _parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The verb, and its config filled with what was said."""
    parser = Parser(
        prog="patchlife",
        usage="patchlife VERB ... [options]",
        description="Faster Vision Transformers: every image patch lives only as long as it is needed.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"patchlife {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", prog="patchlife", required=True)
    for name, config in VERBS.items():
        summary = (config.__doc__ or "").partition("\n")[0]
        verb = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_options(verb, config)
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    given = vars(parser.parse_args(argv))
    return given["verb"], from_options(VERBS[given["verb"]], given)


def _fail(message: str, code: int) -> int:
    print(f"patchlife: error: {' '.join(message.split())}", file=sys.stderr)
    return code
