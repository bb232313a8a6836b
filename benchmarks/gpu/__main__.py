"""``python -m benchmarks.gpu``; what it does is said in the package's docstring."""

from __future__ import annotations

import signal
import sys

from .schedule import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends with it
    sys.exit(main())
