"""`python -m jobs`: the jobs, one line each."""

import argparse
import ast
import difflib
import importlib
import os
import sys
from pathlib import Path

__all__ = ["main", "summaries", "unknown"]

EXIT_USAGE = 2
SCRIPT = "dual-rs"
"""The console script's name."""


def summaries() -> dict[str, str]:
    """First line of the docstring of each job, by its name: those of the pipeline in its order, then the others.

    The files are parsed, not imported: neither torch nor Ray is loaded.
    """
    found = {}
    for file in Path(__file__).parent.glob("[!_]*.py"):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = text.partition("\n")[0]
    first = {"pipeline": ""} | {name: text for name, text in found.items() if text.startswith("Step ")}
    return dict(sorted(found.items(), key=lambda item: (first.get(item[0], "~"), item[0])))


def unknown(name: str) -> str:
    """The message for a name that no job has, with the nearest that one has."""
    jobs = summaries()
    close = difflib.get_close_matches(name, jobs, n=1)
    before = f"{SCRIPT} " if _by_script() else "python -m jobs."
    hint = f"did you mean {before}{close[0]}?" if close else f"known: {', '.join(jobs)}"
    return f"error: no job {name!r}; {hint}"


def _by_script() -> bool:
    return Path(sys.argv[0]).name.startswith(SCRIPT)


def main() -> int:
    """Command line: the list, or a job by its name, with its own options."""
    jobs = summaries()
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        name = sys.argv[1].removeprefix("jobs.")
        if name not in jobs:
            print(unknown(name), file=sys.stderr)
            return EXIT_USAGE
        sys.argv = [f"{SCRIPT} {name}" if _by_script() else f"jobs.{name}", *sys.argv[2:]]
        return int(importlib.import_module(f"jobs.{name}").main())
    width = max(map(len, jobs))
    prog, job = (SCRIPT, f"{SCRIPT} NAME") if _by_script() else ("python -m jobs", "python -m jobs.NAME")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Run a job with `{job}`; `{job} --help` explains it.",
        epilog="\n".join(f"  {name:<{width}}  {summary}" for name, summary in jobs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--names", action="store_true", help='names alone: complete -W "$(dual-rs --names)" dual-rs')
    try:
        print("\n".join(jobs) if parser.parse_args().names else parser.format_help().rstrip(), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
