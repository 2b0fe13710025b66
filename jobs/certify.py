"""Step 5: certify the test split: standard randomized smoothing at every sigma, Dual RS, or Multiscale."""

import sys
from typing import Literal

from distributed.methods import METHODS, method_named
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, retry_errors_option, run_step

Classifier = Literal["finetuned", "base"]


def run(directory: RunDirectory, method: str, classifier: Classifier = "finetuned", retry_errors: bool = False) -> None:
    """Commit every shard of certificates/<method> (or <method>-base) that is not there yet."""
    from distributed.execution.launch import certify_store

    budget = directory.config.certify.budget
    if budget != "fixed" and not method_named(method).early:
        print(f"{method}: takes all draws that it asks for; certify.budget={budget} is for the other methods")
    certify_store(directory, f"certificates/{_name(method, classifier)}", retry_errors)


def _name(method: str, classifier: Classifier) -> str:
    return method + ("-base" if classifier == "base" else "")


def main() -> int:
    """Command line."""
    parser = job_parser("certify", __doc__)
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        required=True,
        help="; ".join(f"{name}: {what}" for name, (_, what) in METHODS.items()),
    )
    parser.add_argument(
        "--classifier",
        choices=("finetuned", "base"),
        default="finetuned",
        help="base certifies the classifier as it was before fine-tuning, into certificates/<method>-base",
    )
    retry_errors_option(parser)
    return run_step(
        parser,
        lambda directory, args: run(directory, args.method, args.classifier, args.retry_errors),
        lambda args: [f"certify-{_name(args.method, args.classifier)}"],
    )


if __name__ == "__main__":
    sys.exit(main())
