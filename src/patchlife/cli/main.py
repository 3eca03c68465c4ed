"""The command line ``patchlife VERB ...``.

To add a verb, add a row to `VERBS` and a module with the name of the verb in this folder. The row names the dataclass
of the verb's options (in `config/`); the module has a function ``run(config)`` that returns the exit code.
Torch and other slow modules are imported only after the options have been parsed.

Exit codes: 0 success; 1 some photos failed, the others are done; 2 invalid arguments or input; 70 a bug in patchlife;
130 interrupted; 141 the reader of the output closed it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from ..config import (
    BenchConfig,
    DemoConfig,
    DrawConfig,
    EmbedConfig,
    EvalConfig,
    ExploreConfig,
    ExportConfig,
    FitConfig,
    InfoConfig,
    PredictConfig,
    ServeConfig,
    TuneConfig,
)
from ..errors import PatchLifeError
from ..malloc import keep_freed_memory
from ..version import __version__
from .arguments import Parser, add_options, from_options

__all__ = ["VERBS", "main"]

VERBS: dict[str, type] = {
    "demo": DemoConfig,
    "predict": PredictConfig,
    "embed": EmbedConfig,
    "draw": DrawConfig,
    "explore": ExploreConfig,
    "serve": ServeConfig,
    "info": InfoConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "fit": FitConfig,
    "tune": TuneConfig,
    "eval": EvalConfig,
}
"""Each verb with the dataclass of its options. The code of a verb is ``run`` in the module with its name."""

_EXAMPLES = """examples:
  patchlife demo
  patchlife predict vit_tiny_patch16_224 photos/ --checkpoint vit.safetensors --budget 0.6 --out results.jsonl
  patchlife embed hf-hub:timm/vit_small_patch14_dinov2.lvd142m photos/ --out embeddings.parquet
  patchlife draw vit_tiny_patch16_224 dog.jpg --pretrained --strip
  patchlife explore demo --open
  patchlife serve my-adapter --degrade 1.0,0.8,0.6,0.45
  patchlife info vit_small_patch14_dinov2 --budget 0.5
  patchlife fit vit_tiny_patch16_224 photos/ --pretrained --out my-adapter
  patchlife tune my-adapter photos/ --out my-tuned-adapter"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the arguments of this process; returns the exit code."""
    # set before torch is imported: threads that wait actively slow other processes down
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        verb, config = _parse(sys.argv[1:] if argv is None else argv)
        keep_freed_memory()  # before torch allocates
        code = importlib.import_module(f".{verb}", __package__).run(config)
        sys.stdout.flush()  # here, so that a closed output raises BrokenPipeError inside this try
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids an error message at exit
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (PatchLifeError, OSError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"this is a bug ({type(error).__name__}); please report it with the lines above", 70)


def _parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The verb and its options."""
    parser = Parser(
        prog="patchlife",
        usage="patchlife VERB ... [options]",
        description="Faster Vision Transformers: image patches are dropped when the model no longer needs them.",
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
