"""Step 5: certify the test split: standard randomized smoothing at every sigma, Dual RS, or Multiscale."""

import sys
from typing import Literal

from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, retry_errors_option, run_step

Method = Literal["standard", "dual", "multiscale"]
Classifier = Literal["finetuned", "base"]


def run(
    directory: RunDirectory, method: Method, classifier: Classifier = "finetuned", retry_errors: bool = False
) -> None:
    """Commit every shard of certificates/<method> (or <method>-base) that is not there yet."""
    from distributed.launch import certify_store

    budget = directory.config.certify.budget
    if method == "multiscale" and budget != "fixed":
        print(
            f"multiscale: takes all draws of each level that it asks; certify.budget={budget} is for the other methods"
        )
    certify_store(directory, f"certificates/{_name(method, classifier)}", retry_errors)


def _name(method: Method, classifier: Classifier) -> str:
    return method + ("-base" if classifier == "base" else "")


def main() -> int:
    """Command line."""
    parser = job_parser("certify", __doc__)
    parser.add_argument(
        "--method",
        choices=("standard", "dual", "multiscale"),
        required=True,
        help="standard: CERTIFY (Cohen et al. 2019) once per sigma; dual: min(R_sigma, R_c), alpha / 2 each; "
        "multiscale: the cascade of Jeong & Shin (2023) from the largest sigma down, alpha divided over the levels "
        "(certify.level_shares), all draws of each level that it asks whatever certify.budget says",
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
