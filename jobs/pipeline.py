"""The whole pipeline: train_base, build_dataset, train_estimator, finetune_classifier, certify, report.

Finished steps are skipped, a step that was interrupted goes on: run it again after any crash.
"""

import sys
import time
from collections.abc import Callable

from distributed.run_directory import RunDirectory
from jobs import build_dataset, certify, finetune_classifier, report, train_base, train_estimator
from jobs._cli import job_parser, run_step

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


def run(directory: RunDirectory) -> None:
    """Run every step in order."""
    report.require_matplotlib()
    start = time.monotonic()
    for number, (name, step) in enumerate(STEPS, 1):
        print(f"[{number}/{len(STEPS)}] {name} ({time.monotonic() - start:.0f} s)", flush=True)
        step(directory)
    print(f"done in {time.monotonic() - start:.0f} s")


def main() -> int:
    """Command line."""
    parser = job_parser("pipeline", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: CHECKED)


if __name__ == "__main__":
    sys.exit(main())
