"""An ablation as one command: the settings of a sweep side by side, what they share made once.

Finished settings are skipped, interrupted ones go on: run it again after any crash. Each setting is a run directory
below OUT/settings, which jobs.audit, jobs.report and jobs.certify take as any other.
"""

import argparse
import sys
from pathlib import Path

from jobs._cli import EXIT_CODES, run_job
from jobs.pipeline import STEPS


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.sweep", description=__doc__, epilog=f"{EXIT_CODES} Failed settings end it with 3, too."
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="YAML", help="the sweep, for example configs/sweeps/lambda.yaml"
    )
    parser.add_argument(
        "--out",
        metavar="OUT",
        help="folder of the sweep: a path that all nodes share, or a URI of an object store "
        "(default: runs/sweeps/<name of the file>)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check every setting, list what is shared and what each will take, measured here, and stop",
    )
    parser.add_argument("--price", type=float, metavar="PER_HOUR", help="of a device hour, for --dry-run")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override configuration values of all settings"
    )

    def run(args: argparse.Namespace) -> None:
        from core.config import load_sweep
        from core.errors import ConfigError, DataError
        from distributed.files.storage import Folder

        if args.price is not None and not (args.dry_run and 0 <= args.price < float("inf")):
            raise ConfigError("--price: goes with --dry-run, and is a number of at least 0")
        sweep = load_sweep(args.config, args.overrides)
        out = Folder(args.out or f"runs/sweeps/{sweep.name}")
        from distributed.store.lock import RunLock
        from distributed.studies.sweep import is_finished, run_sweep
        from distributed.studies.sweep_check import check_sweep, dry_run_sweep
        from distributed.studies.sweep_results import read_settings, write_results

        if args.dry_run:
            dry_run_sweep(sweep, out, args.price)
            return
        check_sweep(sweep, out)
        with RunLock(out):
            failed = run_sweep(sweep, out, STEPS)
            done = [setting for setting in sweep.settings if is_finished(sweep, setting, out)]
            if done:
                print(write_results(sweep, read_settings(sweep, done, out), out))
                print(f"results: {out.where('results.parquet')} (and results.md, ablation.png, ablation.pdf beside it)")
        if failed:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
            raise DataError(f"{len(failed)} settings failed; logs: {out.where('tune')}\n{reasons}")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
