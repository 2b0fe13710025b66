"""Take somebody's log of certificates (Cohen et al.'s certify.py) into a run, as a further curve of its report."""

import argparse
import sys
from pathlib import Path

from core.errors import DualRSError
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def known_classes(directory: RunDirectory) -> int | None:
    """Number of classes of the run: as it began, as its data set is known for, or as the data are here; or None."""
    for split in ("test", "train"):
        if begun := directory.manifest.get("data", {}).get(split):
            return int(begun["classes"])
    if (known := directory.config.dataset.known_classes) is not None:
        return known
    try:
        return directory.data("test").num_classes
    except (DualRSError, OSError):
        return None


def main() -> int:
    """Command line."""
    parser = job_parser("import_tsv", __doc__)
    parser.usage = "python -m jobs.import_tsv --out RUN --name NAME --file LOG [--config YAML] [--debug]"
    parser.add_argument("--file", type=Path, required=True, metavar="LOG", help="idx label predict radius correct time")
    parser.add_argument("--name", required=True, help="what the report calls it; kept in RUN/imported/NAME")

    def run(args: argparse.Namespace) -> None:
        from core.evaluation.metrics import certified_accuracy
        from distributed.views.exchange import import_log

        directory = open_run(args, "dry")
        new = not directory.folder.exists("manifest.json")
        classes = known_classes(directory)
        log = import_log(directory.folder, args.name, args.file, classes)
        if new:
            directory.begin()
        radii, strict = directory.config.report.radii, directory.config.report.strict
        shares = certified_accuracy(log.correct, log.radius, radii, strict)
        print(f"{args.name}: {len(log.idx):,} examples, {100 * log.abstained.mean():.2f}% abstained")
        if classes is None:
            print("its labels were not checked: the data set is not here, and dataset.num_classes is not set")
        for radius, share in zip(radii, shares, strict=True):
            print(f"  radius {'>' if strict else '>='} {radius:g}: {100 * share:.2f}%")
        print(f"beside the run's rows, or alone: jobs.report --out {args.out} | --logs {args.name}={args.file}")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
