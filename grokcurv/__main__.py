"""``python -m grokcurv``."""

import sys

from grokcurv.cli import main

sys.exit(main())
