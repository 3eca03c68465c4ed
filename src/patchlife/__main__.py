"""``python -m patchlife`` is ``patchlife``."""

import sys

from .cli.main import main

sys.exit(main())
