"""Copy a fitted adapter for publication: with the name and checksum of its backbone, without local paths.

python recipes/vit_tiny/publish.py FITTED CHECKPOINT PUBLISHED
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import patchlife
from patchlife.config import ModelConfig
from patchlife.runtime.opening import open_pipeline


def main(fitted: str, checkpoint: str, published: str) -> None:
    model = open_pipeline(ModelConfig(fitted, checkpoint=Path(checkpoint))).model
    assert model.origin is not None
    model.origin = replace(model.origin, checkpoint=None)
    patchlife.save(model, published)


if __name__ == "__main__":
    main(*sys.argv[1:])
