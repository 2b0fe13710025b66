"""Take a label file of the Dual RS authors into a run, in place of step 2: the estimator is trained on its radii.

The file is their (N, K+2) .npy array: K radii in the order of Sigma, the largest, the index of the best; row i is the
example i of the training split. The labels hold for the networks that they were made with, which the run has to name:
its base models are made first (step 1). There are no votes behind them, so what needs votes is refused.
"""

import sys
from pathlib import Path

from distributed.store.run_directory import RunDirectory
from jobs import train_base
from jobs._cli import job_parser, run_step


def run(directory: RunDirectory, file: Path) -> None:
    """Write imported/labels.npy, after the base models."""
    from distributed.store.imported_labels import import_labels, parse_labels

    if file.is_file():  # before anything is trained
        parse_labels(file.read_bytes(), directory.config.sigmas, repr(str(file)))
    train_base.run(directory)
    radii = import_labels(directory, file)
    kept = radii[radii.max(axis=1) > 0]
    print(f"{file}: {len(radii):,} rows, {len(kept):,} with a radius at some sigma, which is what training takes")
    for index, sigma in enumerate(directory.config.sigmas):
        print(f"  sigma {sigma:g} is the best of {100 * (kept.argmax(axis=1) == index).mean():.2f}% of these")


def main() -> int:
    """Command line."""
    parser = job_parser("import_labels", __doc__)
    parser.usage = "python -m jobs.import_labels --out RUN --file NPY [--config YAML] [key=value ...]"
    parser.add_argument("--file", type=Path, required=True, metavar="NPY", help="the label file")
    return run_step(parser, lambda directory, args: run(directory, args.file), lambda args: ["train_base"])


if __name__ == "__main__":
    sys.exit(main())
