"""Classify images that nobody has labelled with a run's networks: class or abstention, noise level, certificate.

Reads a folder of images (at any depth), one image, or Parquet files. Runs here, in one process.
"""

import argparse
import sys
import time

from core.errors import ConfigError
from jobs._cli import job_parser, open_run, run_job


def run(args: argparse.Namespace) -> None:
    """Answer for each image and print the rows, or write them."""
    from core.report.pages import Table, markdown_table
    from distributed.studies.predict import Question, columns_of, open_images, predict_images, write_rows

    if args.to is not None and not args.to.endswith((".csv", ".parquet")):
        raise ConfigError(f"--to: {args.to!r} ends neither in .csv nor in .parquet")
    directory = open_run(args)
    certify = directory.config.certify
    question = Question(
        method=args.method or certify.routed,
        sigma=args.sigma,
        certify=args.certify,
        num=certify.num_estimation if args.num is None else args.num,
        alpha=certify.alpha if args.alpha is None else args.alpha,
        classifier=args.classifier,
        seed=directory.config.seed if args.seed is None else args.seed,
    )
    images = open_images(args.images, directory.config, args.image_column, args.id_column)
    start = time.monotonic()
    rows = predict_images(directory, images, question, directory.config.compute.device)
    columns = columns_of(question)
    if args.to is not None:
        write_rows(rows, columns, args.to)
    else:
        shown = tuple(tuple(_text(row.get(name)) for name in columns) for row in rows)
        print(markdown_table(Table(columns, shown)))
    failed = sum(bool(row["error"]) for row in rows)
    abstained = sum(row["abstained"] for row in rows) - failed
    radii = f", radii are {directory.config.law.norm}" * args.certify
    where = "" if args.to is None else f", written to {args.to}"
    print(
        f"{len(rows):,} images in {time.monotonic() - start:.1f} s: {len(rows) - abstained - failed:,} classified, "
        f"{abstained:,} abstentions, {failed:,} that could not be read; each answer is wrong with probability at most "
        f"{0.0 if directory.config.law.exhaustive else question.alpha:g}{radii}{where}"
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Command line."""
    parser = job_parser("predict", __doc__)
    parser.add_argument("--images", required=True, metavar="PATH", help="folder, image or Parquet; path or address")
    parser.add_argument("--to", metavar="FILE", help="write rows to a .csv or .parquet (default: print a table)")
    parser.add_argument(
        "--method",
        choices=("dual", "agreement", "standard"),
        help="dual: noise level and class, alpha / 2 each; agreement: the class at every level that the router may "
        "pick; standard: the class at --sigma (default: what certify.claim says)",
    )
    parser.add_argument("--sigma", type=float, metavar="S", help="noise level of --method standard, one of the run's")
    parser.add_argument(
        "--certify", action="store_true", help="a certificate with its radius, as jobs.certify makes it, not PREDICT"
    )
    parser.add_argument(
        "--num", type=int, metavar="N", help="noisy copies a stage (default: the run's estimation draws)"
    )
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="failure probability of an answer (default: the run's)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (default: the run's)")
    parser.add_argument(
        "--classifier", choices=("finetuned", "base"), default="finetuned", help="base: as it was before fine-tuning"
    )
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet files (default: image)")
    parser.add_argument("--id-column", metavar="NAME", help="of Parquet files (default: the row's number)")
    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
