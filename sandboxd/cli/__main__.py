"""``python -m sandboxd.cli`` is ``sandboxctl``."""

import sys

from sandboxd.cli import main

sys.exit(main())
