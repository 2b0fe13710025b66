"""Step 2: certify EVERY training sample under EVERY sigma, on Ray; rows stream into dataset/*.parquet.

The base models are made first (step 1), where they are not there yet.
"""

import sys

from distributed.store.run_directory import RunDirectory
from jobs import train_base
from jobs._cli import job_parser, retry_errors_option, run_step


def run(directory: RunDirectory, retry_errors: bool = False) -> None:
    """Commit every shard of the dataset that is not there yet."""
    from distributed.execution.launch import certify_store

    train_base.run(directory)
    certify_store(directory, "dataset", retry_errors)


def main() -> int:
    """Command line."""
    parser = job_parser("build_dataset", __doc__)
    retry_errors_option(parser)
    return run_step(
        parser, lambda directory, args: run(directory, args.retry_errors), lambda args: ["train_base", "build_dataset"]
    )


if __name__ == "__main__":
    sys.exit(main())
