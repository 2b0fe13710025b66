"""What every job's command line shares: --config, --out, overrides, errors as messages, exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from core.config import load_config, parse_config
from core.errors import ConfigError, DualRSError, LimitError
from distributed.store.lock import RunLock
from distributed.store.run_directory import RunDirectory

__all__ = ["EXIT_CODES", "job_parser", "number", "open_run", "retry_errors_option", "run_job", "run_step"]

EXIT_USAGE, EXIT_FAILED, EXIT_SPENT, EXIT_INTERRUPTED = 2, 3, 4, 130
EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or configuration, 3 data, model or findings, 4 compute.max_device_hours are spent, "
    "130 interrupted."
)


def job_parser(module: str, description: str, needs_out: bool = True) -> argparse.ArgumentParser:
    """The parser of `python -m jobs.<module>`; `needs_out`: --out has to be given."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("dual-rs ") else f"python -m jobs.{module}",
        description=description,
        epilog=f"{EXIT_CODES} What is committed stays; the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--out",
        required=needs_out,
        metavar="RUN",
        help="run directory, made if it is not there: a path, or a URI of an object store (s3://bucket/run, gs://...)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="configuration file; an existing run directory remembers its own"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override configuration values, for example certify.num_estimation=1000",
    )
    return parser


def retry_errors_option(parser: argparse.ArgumentParser) -> None:
    """Add --retry-errors."""
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="take up a finished step again for the examples that could not be run (errors/)",
    )


def number(text: str) -> int:
    """The type of an option that counts something: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError(text)  # argparse: "invalid number value: '-1'"
    return value


def open_run(args: argparse.Namespace, mode: Literal["dry", "look"] = "look") -> RunDirectory:
    """Open the run directory that the arguments name, with their configuration; `mode` as for `RunDirectory`."""
    if args.config is not None:
        return RunDirectory(args.out, load_config(args.config, args.overrides), mode)
    directory = RunDirectory(args.out, None, mode)
    if args.overrides:
        config = parse_config(
            directory.config.model_dump(mode="json"), args.overrides, source="the stored configuration"
        )
        directory = RunDirectory(args.out, config, mode)
    return directory


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_job(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> int:
    """Parse, run, and turn errors into one message and an exit code."""
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, _terminate)  # `ray job stop`, a spot notice: end as on Ctrl-C
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted; what is committed stays, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    except DualRSError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        kinds = {ConfigError: EXIT_USAGE, LimitError: EXIT_SPENT}
        return next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_FAILED)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if args.debug:
            raise
        print(f"error: a file or the storage failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def run_step(
    parser: argparse.ArgumentParser,
    run: Callable[[RunDirectory, argparse.Namespace], None],
    steps: Callable[[argparse.Namespace], Sequence[str]],
    after_dry_run: Callable[[RunDirectory], None] | None = None,
) -> int:
    """`run_job` for a job that writes into its run directory: with a check of all that it needs, and under the lock.

    Args:
        parser: of the job; gets --dry-run, --price, --rate and --max-cost.
        run: the job.
        steps: its steps, by their names in the manifest.
        after_dry_run: says what --dry-run does not count.
    """
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that the job needs, measure for a few seconds here (with random weights where files are "
        "missing), print what it will take, and stop: nothing is written",
    )
    parser.add_argument(
        "--price", type=float, metavar="PER_HOUR", help="of a device hour, for --dry-run and --max-cost"
    )
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="NAME=PER_S",
        help="for --dry-run, of one device: images through the denoiser, estimator, classifier, or noisy copies of a "
        "step, as a run elsewhere printed them; neither weights nor CIFAR-10 or ImageNet have to be here",
    )
    parser.add_argument(
        "--max-cost",
        type=float,
        metavar="MONEY",
        help="stop when the run's device hours have cost so much at --price: compute.max_device_hours in money",
    )

    def checked(args: argparse.Namespace) -> None:
        if args.price is not None and not ((args.dry_run or args.max_cost) and 0 <= args.price < float("inf")):
            raise ConfigError("--price: goes with --dry-run or --max-cost, and is a number of at least 0")
        if args.rate and not args.dry_run:
            raise ConfigError("--rate: goes with --dry-run")
        if args.max_cost is not None:
            if not args.price or not 0 < args.max_cost < float("inf"):
                raise ConfigError("--max-cost: is a number above 0, and needs --price, that of a device hour, above 0")
            args.overrides.append(f"compute.max_device_hours={args.max_cost / args.price:.6g}")
        directory = open_run(args, "dry")
        from distributed.checks.dry_run import dry_run  # torch takes its time: after what needs none
        from distributed.checks.preflight import check, refuse
        from distributed.cluster.cluster import placed

        directory.config = placed(directory.config)
        if args.dry_run:
            if args.rate:
                from distributed.checks.stated import parse_rates, price_at

                price_at(directory, steps(args), args.price, parse_rates(args.rate))
            else:
                dry_run(directory, steps(args), args.price)
            if after_dry_run is not None:
                after_dry_run(directory)
            return
        refuse(check(directory, steps(args)).problems)
        with RunLock(directory.folder):
            directory.begin()
            run(directory, args)

    return run_job(parser, checked)
