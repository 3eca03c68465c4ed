"""``python -m patchlife`` is ``patchlife``."""

import sys

from .cli import main

sys.exit(main())
