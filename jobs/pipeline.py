"""The whole pipeline: train_base, build_dataset, train_estimator, finetune_classifier, certify, report.

With rounds=2 (or more) the steps from build_dataset on run again on the fine-tuned classifier, in RUN/rounds/2.
Finished steps are skipped, a step that was interrupted goes on: run it again after any crash.
"""

import sys
import time
from collections.abc import Callable, Sequence

from distributed.lock import RunLock
from distributed.run_directory import RunDirectory
from jobs import build_dataset, certify, finetune_classifier, report, train_base, train_estimator
from jobs._cli import job_parser, run_step

Step = tuple[str, Callable[[RunDirectory], None]]
STEPS: tuple[Step, ...] = (
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
    """Run every step of every round in order."""
    start, rounds = time.monotonic(), directory.config.rounds
    _run_steps(directory, STEPS, start)
    for number in range(2, rounds + 1):
        from distributed.preflight import check, refuse
        from distributed.rounds import begin_round

        print(f"round {number} of {rounds}: {directory.folder}/rounds/{number}", flush=True)
        following = begin_round(directory, number)
        refuse(check(following, CHECKED[1:]).problems)
        with RunLock(following.folder):
            _run_steps(following, STEPS[1:], start)
    if rounds > 1:
        report.run(directory)  # again: now it compares the rounds
    print(f"done in {time.monotonic() - start:.0f} s")


def _run_steps(directory: RunDirectory, steps: Sequence[Step], start: float) -> None:
    for number, (name, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {name} ({time.monotonic() - start:.0f} s)", flush=True)
        step(directory)


def _more_rounds(directory: RunDirectory) -> None:
    """What --dry-run has not counted."""
    if (rounds := directory.config.rounds) > 1:
        print(
            f"rounds={rounds}: this is the first round alone; each of the others takes the steps from build_dataset to "
            "certify-dual once more (one that has been begun: --dry-run --out RUN/rounds/2)"
        )


def main() -> int:
    """Command line."""
    parser = job_parser("pipeline", __doc__)
    return run_step(parser, lambda directory, args: run(directory), lambda args: CHECKED, _more_rounds)


if __name__ == "__main__":
    sys.exit(main())
