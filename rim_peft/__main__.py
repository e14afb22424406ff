"""``python -m rim_peft``: the command ``rim-peft``, for launchers that start modules."""

import sys

from rim_peft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
