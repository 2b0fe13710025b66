"""Take somebody's log of certificates (Cohen et al.'s certify.py) into a run, as a further curve of its report."""

import sys
from pathlib import Path

from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("import_tsv", __doc__)
    parser.usage = "python -m jobs.import_tsv --out RUN --name NAME --file LOG [--debug]"
    parser.add_argument("--file", type=Path, required=True, metavar="LOG", help="idx label predict radius correct time")
    parser.add_argument("--name", required=True, help="what the report calls it; kept in RUN/imported/NAME")

    def run(args) -> None:  # type: ignore[no-untyped-def]
        from core.evaluation.metrics import certified_accuracy
        from distributed.views.exchange import import_log

        directory = open_run(args)
        log = import_log(directory.folder, args.name, args.file)
        radii, strict = directory.config.report.radii, directory.config.report.strict
        shares = certified_accuracy(log.correct, log.radius, radii, strict)
        print(f"{args.name}: {len(log.idx):,} examples, {100 * log.abstained.mean():.2f}% abstained")
        for radius, share in zip(radii, shares, strict=True):
            print(f"  radius {'>' if strict else '>='} {radius:g}: {100 * share:.2f}%")
        print(f"python -m jobs.report --out {directory.folder} shows it")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
