"""The top floor: each job parses its arguments, builds what it needs, runs it and returns an exit code."""

import sys
from pathlib import Path


def _named() -> str:
    """What follows `python -m`, as long as Python still looks for it; otherwise nothing."""
    given = sys.orig_argv
    return given[given.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in given[:-1] else ""


_given = _named()
_name = _given.removeprefix(f"{__name__}.")
if _name != _given and not (Path(__file__).parent / f"{_name}.py").exists():
    from jobs.__main__ import EXIT_USAGE, unknown

    print(unknown(_name), file=sys.stderr)  # Python would say "No module named", and no more
    sys.exit(EXIT_USAGE)
