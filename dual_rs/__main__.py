"""`dual-rs` and `python -m dual_rs`: the jobs."""

import sys

from jobs.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
