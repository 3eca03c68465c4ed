"""Write the weights of a timm classifier without its classifier, as a checkpoint of the model with num_classes=0.

python recipes/headless_vit_tiny/headless.py CHECKPOINT OUT
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file


def main(checkpoint: str, out: str) -> None:
    """Leave out the tensors of the classifier."""
    save_file({name: value for name, value in load_file(checkpoint).items() if not name.startswith("head.")}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
