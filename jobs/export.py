"""Certificates as tab-separated logs in the field's format (Cohen et al. 2019), one file per curve."""

import sys

from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("export", __doc__)
    parser.add_argument("--format", choices=("tsv",), default="tsv", help="idx label predict radius correct time")
    parser.add_argument("--to", metavar="FOLDER", help="folder to write into, a path or URI (default: RUN/export)")
    parser.add_argument(
        "--store",
        action="append",
        metavar="FOLDER",
        help="certificates to export, such as certificates/dual; again for more (default: all of certificates/)",
    )

    def run(args) -> None:  # type: ignore[no-untyped-def]
        from core.errors import DataError
        from core.evaluation.metrics import certified_accuracy
        from distributed.files.storage import Folder
        from distributed.views.exchange import export_logs
        from distributed.views.publication import published_stores

        directory = open_run(args)
        chosen = args.store or published_stores(directory)
        if not chosen:
            raise DataError(f"{str(directory.folder)!r} holds no certificates yet: run jobs.certify first")
        target = Folder(args.to) if args.to else directory.folder / "export"
        for name, log in export_logs(directory.folder, chosen, target):
            (clean,) = certified_accuracy(log.correct, log.radius, [0.0])
            print(f"{target.where(name)}: {len(log.idx):,} examples, {100 * clean:.2f}% certified beyond radius 0")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
