"""Ratios of this project's speed to its floor and to what people run now: `make bench`, or `python -m bench`.

Prints a Markdown table and writes all numbers to a JSON file. Contestants take turns in one process, so a busy machine
is unfair to none of them; absolute numbers are of this machine.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from bench.settings import Settings
from bench.timing import Line, as_markdown, machine, write_json
from core.machine.network import Forward, Precision

_PARTS = {
    "engine": "bench.engine",
    "labels": "bench.engine",
    "forward": "bench.engine",
    "published": "bench.published",
    "budgets": "bench.budgets",
    "noise": "bench.noise",
    "shapes": "bench.shapes",
    "replicas": "bench.replicas",
    "scheduler": "bench.scheduler",
    "scale": "bench.scale",
    "startup": "bench.startup",
    "estimate": "bench.estimate",
}
"""Parts and their modules, imported when they are run."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    usual = ",".join(part for part in _PARTS if part != "published")  # made for a GPU
    parser.add_argument("--parts", default=usual, help="separated by commas (default: all but published: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the networks (default: cpu)")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="of engine and floor")
    parser.add_argument("--channels-last", action="store_true", help="for engine and floor")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("true", "graphs"),
        const="true",
        help="for engine and floor, and one more way in `forward`; graphs: with CUDA graphs; takes minutes on a CPU",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="turns of the short contestants (default: 5)")
    parser.add_argument(
        "--run", type=Path, default=Settings.run, help="trained digits, made if not there (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results.json"), help="JSON (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="as little as possible, to see that every part works")
    args = parser.parse_args()
    parts = [part for part in args.parts.split(",") if part]
    if unknown := set(parts) - _PARTS.keys():
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(_PARTS)}")
    if args.repetitions < 1:
        parser.error("--repetitions: at least 1")
    forward = Forward(args.precision, args.channels_last, "graphs" if args.compile == "graphs" else bool(args.compile))
    settings = Settings(args.device, args.tiny, args.repetitions, forward, args.run)

    lines: list[Line] = []
    for part in parts:
        start = time.perf_counter()
        print(f"{part} ...", file=sys.stderr, flush=True)
        function: Callable[[Settings], list[Line]] = getattr(import_module(_PARTS[part]), part)
        found = function(settings)
        lines += [replace(line, wanted="") for line in found] if args.tiny else found
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    facts: dict[str, Any] = machine(args.device)
    print(f"\n{', '.join(f'{name}: {value}' for name, value in facts.items())}, {forward}\n\n{as_markdown(lines)}")
    write_json(args.out, lines, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
