"""Distribution shift: certify corrupted versions of the test set with a run's networks as they are.

The digits are corrupted here; CIFAR-10-C and ImageNet-C are read from their files. Finished sets are skipped, one that
was interrupted goes on.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from core.config import Config
from core.errors import ConfigError
from core.progress import clock
from distributed.store.lock import RunLock
from distributed.store.run_directory import RunDirectory
from jobs import report
from jobs._cli import job_parser, open_run, run_job


def checked_of(config: Config) -> tuple[str, ...]:
    """What each set is certified with, by the names in the manifest."""
    return "certify-standard", f"certify-{config.certify.routed}"


def run(directory: RunDirectory, sets: Sequence[tuple[str, int]], path: str | None = None, every: int = 1) -> None:
    """Commit every shard of RUN/shift/<corruption>-<severity>/certificates/ that is not there yet, then report."""
    from contextlib import ExitStack

    from distributed.checks.preflight import check, refuse
    from distributed.cluster.cluster import connected
    from distributed.execution.launch import certify_store
    from distributed.studies.shift import open_set, shifted_config

    configs = [shifted_config(directory.config, *each, path, every) for each in sets]
    start, worked = time.monotonic(), 0
    with ExitStack() as stack:
        for number, config in enumerate(configs, 1):
            found = check(open_set(directory, config, "dry"), checked_of(config))
            refuse(found.problems)
            following = open_set(directory, config, "write")
            if found.steps and not worked and config.compute.executor == "ray":
                stack.enter_context(connected(config.compute))  # once for all sets
            name = f"{config.dataset.corruption}, severity {config.dataset.severity}"
            elapsed, left = time.monotonic() - start, len(configs) - number + 1
            eta = f", ETA {clock(elapsed / worked * left)}" if worked else ""
            print(f"[{number}/{len(configs)}] {name}{eta}" + ("" if found.steps else ": finished"), flush=True)
            worked += bool(found.steps)
            for step in checked_of(config):
                certify_store(following, step.replace("certify-", "certificates/"))
    if "certify-standard" in directory.manifest["steps"]:
        report.run(directory)
    else:
        print("jobs.certify has not certified the clean test set: once it has, jobs.report shows these sets beside it")


def _dry_run(directory: RunDirectory, sets: Sequence[tuple[str, int]], args: argparse.Namespace) -> None:
    from distributed.checks.dry_run import dry_run
    from distributed.studies.shift import open_set, shifted_config

    print(f"{len(sets)} sets; this is {sets[0][0]}, severity {sets[0][1]}, the others take as much unless finished\n")
    config = shifted_config(directory.config, *sets[0], args.path, args.every)
    dry_run(open_set(directory, config, "dry"), checked_of(config), None)


def _sets(directory: RunDirectory, args: argparse.Namespace) -> list[tuple[str, int]]:
    from distributed.studies.shift import known_corruptions

    names = args.corruptions.split(",") if args.corruptions else known_corruptions(directory.config)
    try:
        severities = [int(text) for text in args.severities.split(",")]
    except ValueError as error:
        raise ConfigError(f"--severities: expected numbers such as 1,3,5, got {args.severities!r}") from error
    if not set(severities) <= set(range(1, 6)) or args.every < 1:
        raise ConfigError(f"--severities are 1 to 5 and --every is at least 1, got {severities} and {args.every}")
    return [(name, severity) for name in dict.fromkeys(names) for severity in sorted(set(severities))]


def main() -> int:
    """Command line."""
    parser = job_parser("shift", __doc__)
    parser.add_argument(
        "--corruptions", metavar="A,B", help="which ones (default: all of the digits', the benchmark's 15)"
    )
    parser.add_argument("--severities", default="1,2,3,4,5", metavar="1,3,5", help="which ones (default: all)")
    parser.add_argument("--path", help="where CIFAR-10-C or ImageNet-C is: a folder or an address")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="take every N-th of the run's test images (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and count one set, and write nothing")

    def checked(args: argparse.Namespace) -> None:
        directory = open_run(args, "dry")
        directory.model_hashes([*directory.config.certified.values(), "estimator"])  # or nothing is begun
        sets = _sets(directory, args)
        if args.dry_run:
            _dry_run(directory, sets, args)
            return
        with RunLock(directory.folder):
            directory.begin()
            run(directory, sets, args.path, args.every)

    return run_job(parser, checked)


if __name__ == "__main__":
    sys.exit(main())
