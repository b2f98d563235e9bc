"""``python -m sb3_safe`` is the command ``sb3-safe``."""

import sys

from sb3_safe.cli import main

if __name__ == "__main__":
    sys.exit(main())
