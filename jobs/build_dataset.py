"""Step 2: certify EVERY training sample under EVERY sigma, on Ray; rows stream into dataset/*.parquet."""

import sys

from distributed.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def run(directory: RunDirectory) -> None:
    """Commit every shard of the dataset that is not there yet."""
    from distributed.launch import certify_store

    certify_store(directory, "dataset")


def main() -> int:
    """Command line."""
    parser = job_parser("build_dataset", __doc__)
    return run_job(parser, lambda args: run(open_run(args)))


if __name__ == "__main__":
    sys.exit(main())
