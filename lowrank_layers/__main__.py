"""``python -m lowrank_layers``."""

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
