"""``python -m fbkernels``."""

import sys

from fbkernels.cli import main

sys.exit(main())
