"""The whole pipeline: train_base, build_dataset, train_estimator, finetune_classifier, certify, report.

Certifies with standard RS and Dual RS, and with Multiscale where certify.multiscale is set. Finished steps are skipped,
a step that was interrupted goes on: run it again after any crash.
"""

import sys
import time
from collections.abc import Callable

from core.config import Config
from distributed.run_directory import RunDirectory
from jobs import build_dataset, certify, finetune_classifier, report, train_base, train_estimator
from jobs._cli import job_parser, open_run, run_step

STEPS: tuple[tuple[str, Callable[[RunDirectory], None]], ...] = (
    ("train_base", train_base.run),
    ("build_dataset", build_dataset.run),
    ("train_estimator", train_estimator.run),
    ("finetune_classifier", finetune_classifier.run),
    ("certify --method standard", lambda directory: certify.run(directory, "standard")),
    ("certify --method dual", lambda directory: certify.run(directory, "dual")),
    ("report", report.run),
)
CHECKED = (
    "train_base",
    "build_dataset",
    "train_estimator",
    "finetune_classifier",
    "certify-standard",
    "certify-dual",
)
"""The steps as the manifest names them; the report needs nothing but their results."""
MULTISCALE = ("certify --method multiscale", lambda directory: certify.run(directory, "multiscale"))
"""Before the report, where `certify.multiscale` is set."""


def steps_of(config: Config) -> tuple[tuple[str, Callable[[RunDirectory], None]], ...]:
    """The steps of a configuration."""
    return (*STEPS[:-1], MULTISCALE, STEPS[-1]) if config.certify.multiscale else STEPS


def checked_of(config: Config) -> tuple[str, ...]:
    """Their names in the manifest, without the report."""
    return (*CHECKED, "certify-multiscale") if config.certify.multiscale else CHECKED


def run(directory: RunDirectory) -> None:
    """Run every step in order."""
    start, steps = time.monotonic(), steps_of(directory.config)
    for number, (name, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {name} ({time.monotonic() - start:.0f} s)", flush=True)
        step(directory)
    print(f"done in {time.monotonic() - start:.0f} s")


def main() -> int:
    """Command line."""
    parser = job_parser("pipeline", __doc__)
    return run_step(
        parser, lambda directory, args: run(directory), lambda args: checked_of(open_run(args, "dry").config)
    )


if __name__ == "__main__":
    sys.exit(main())
