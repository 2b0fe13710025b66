"""The whole pipeline: train_base, build_dataset, train_estimator, finetune_classifier, certify, report.

Certifies with standard RS and Dual RS (its claim: certify.claim), and with Multiscale where certify.multiscale is set;
finetune_classifier is left out with finetune.epochs=0. With rounds=2 (or more) the steps from build_dataset on run
again on the fine-tuned classifier, in RUN/rounds/2. Finished steps are skipped, a step that was interrupted goes on:
run it again after any crash.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from core.config import Config
from distributed.methods import METHODS
from distributed.store.lock import RunLock
from distributed.store.run_directory import RunDirectory
from jobs import build_dataset, certify, finetune_classifier, report, train_base, train_estimator
from jobs._cli import job_parser, open_run, run_step

STEPS: dict[str, Callable[[RunDirectory], None]] = {
    "train_base": train_base.run,
    "build_dataset": build_dataset.run,
    "train_estimator": train_estimator.run,
    "finetune_classifier": finetune_classifier.run,
    **{f"certify-{name}": partial(certify.run, method=name) for name in METHODS},
    **{f"certify-{name}-base": partial(certify.run, method=name, classifier="base") for name in METHODS},
    "report": report.run,
}
"""By their names in the manifest (the report needs nothing but the results of the others, and is not in it)."""


def steps_of(config: Config) -> tuple[str, ...]:
    """Those of one round, before its report."""
    methods = ("standard", config.certify.routed, *(["multiscale"] if config.certify.multiscale else []))
    tuning = ("finetune_classifier",) if config.finetune.epochs else ()
    return ("train_base", "build_dataset", "train_estimator", *tuning, *(f"certify-{method}" for method in methods))


def run(directory: RunDirectory) -> None:
    """Run every step of every round in order."""
    report.require_matplotlib()
    config, start = directory.config, time.monotonic()
    steps = steps_of(config)
    with ExitStack() as stack:
        if config.compute.executor == "ray":
            from distributed.cluster.cluster import connected

            stack.enter_context(connected(config.compute))  # once for all steps
        _run_steps(directory, steps, start)
        for number in range(2, config.rounds + 1):
            from distributed.checks.preflight import check, refuse
            from distributed.studies.rounds import begin_round

            print(f"round {number} of {config.rounds}: {directory.folder}/rounds/{number}", flush=True)
            following = begin_round(directory, number)
            refuse(check(following, steps[1:]).problems)
            with RunLock(following.folder):
                _run_steps(following, steps[1:], start)
    if config.rounds > 1:
        report.run(directory)  # again: now it compares the rounds
    print(f"done in {time.monotonic() - start:.0f} s")


def _run_steps(directory: RunDirectory, steps: Sequence[str], start: float) -> None:
    for number, step in enumerate((*steps, "report"), 1):
        name = step.replace("certify-", "certify --method ")
        print(f"[{number}/{len(steps) + 1}] {name} (after {time.monotonic() - start:.0f} s)", flush=True)
        STEPS[step](directory)


def _more_rounds(directory: RunDirectory) -> None:
    """What --dry-run has not counted."""
    if (rounds := directory.config.rounds) > 1:
        print(
            f"rounds={rounds}: this is the first round alone; each of the others takes the steps from build_dataset to "
            f"{steps_of(directory.config)[-1]} once more (one that has been begun: --dry-run --out RUN/rounds/2)"
        )


def main() -> int:
    """Command line."""
    parser = job_parser("pipeline", __doc__)
    return run_step(
        parser,
        lambda directory, args: run(directory),
        lambda args: steps_of(open_run(args, "dry").config),
        _more_rounds,
    )


if __name__ == "__main__":
    sys.exit(main())
