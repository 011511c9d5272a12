"""`python -m memrt` is `memrt`."""

from __future__ import annotations

import sys

from memrt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
