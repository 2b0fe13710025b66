"""`python -m jobs`: the jobs, one line each."""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

__all__ = ["main", "summaries"]

EXIT_USAGE = 2


def summaries() -> dict[str, str]:
    """First line of the docstring of each job, by its name: those of the pipeline in its order, then the others.

    The files are parsed, not imported: neither torch nor Ray is loaded.
    """
    found = {}
    for file in Path(__file__).parent.glob("[!_]*.py"):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = text.partition("\n")[0]
    return dict(sorted(found.items(), key=lambda item: (_place(*item), item[0])))


def _place(name: str, summary: str) -> int:
    """`pipeline` first, its steps by their number, and the rest."""
    step = re.match(r"Step (\d+)", summary)
    return 0 if name == "pipeline" else int(step[1]) if step else sys.maxsize


def main() -> int:
    """Command line."""
    jobs = summaries()
    width = max(map(len, jobs))
    parser = argparse.ArgumentParser(
        prog="python -m jobs",
        description="Run a job with `python -m jobs.NAME`; `python -m jobs.NAME --help` explains it.",
        epilog="\n".join(f"  {name:<{width}}  {summary}" for name, summary in jobs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.name is None:
        print(parser.format_help(), end="")
        return 0
    name = args.name.removeprefix("jobs.")
    if name in jobs:
        message = f"{name} is a module of its own: python -m jobs.{name}"
    else:
        close = difflib.get_close_matches(name, jobs, n=1)
        message = f"no job {name!r}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(jobs)}")
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
