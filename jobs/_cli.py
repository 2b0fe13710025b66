"""What every job's command line shares: --config, --out, overrides, errors as messages, exit codes."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.config import load_config, parse_config
from core.errors import ConfigError, DualRSError
from distributed.lock import RunLock
from distributed.run_directory import RunDirectory
from distributed.storage import Folder

__all__ = ["job_parser", "open_run", "retry_errors_option", "run_job", "run_step"]

EXIT_USAGE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 130


def job_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m jobs.<module>`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{module}",
        description=description,
        epilog="Exit codes: 0 done, 2 usage or configuration, 3 data or model, 130 interrupted. What is committed "
        "stays; the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--out",
        required=True,
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


def open_run(args: argparse.Namespace) -> RunDirectory:
    """Open the run directory that the arguments name, with their configuration."""
    if args.config is not None:
        return RunDirectory(args.out, load_config(args.config, args.overrides))
    directory = RunDirectory(args.out, None)
    if args.overrides:
        config = parse_config(
            directory.config.model_dump(mode="json"), args.overrides, source="the stored configuration"
        )
        directory = RunDirectory(args.out, config)
    return directory


@contextmanager
def _working_on(args: argparse.Namespace) -> Iterator[RunDirectory]:
    """`open_run` for a job that writes: with the lock of the run directory.

    Raises:
        ConfigError: when another job is at work there, or nothing can be written.
    """
    if args.config is not None:
        load_config(args.config, args.overrides)  # refused before anything is made
    else:
        RunDirectory(args.out, None)
    folder = Folder(args.out)
    folder.check_writable()
    with RunLock(folder):
        yield open_run(args)


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
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return 0


def run_step(parser: argparse.ArgumentParser, run: Callable[[RunDirectory, argparse.Namespace], None]) -> int:
    """`run_job` for a job that writes into its run directory."""

    def locked(args: argparse.Namespace) -> None:
        with _working_on(args) as directory:
            run(directory, args)

    return run_job(parser, locked)
