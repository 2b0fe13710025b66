"""Check a run afterwards: hashes, plan, every radius from its votes; with --replay, a random sample from its seeds."""

import sys

from jobs._cli import job_parser, number, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("audit", __doc__)
    parser.add_argument(
        "--replay", type=number, default=0, metavar="N", help="draw N random rows again and compare their votes"
    )
    parser.add_argument(
        "--replay-seed", type=number, default=None, help="choose the same rows again (default: fresh ones)"
    )
    parser.add_argument("--show", type=number, default=20, help="findings to print (default: 20)")

    def run(args) -> None:  # type: ignore[no-untyped-def]
        from core.errors import DataError
        from distributed.audit import audit, replay
        from distributed.shards import ShardStore

        directory = open_run(args)
        findings, checked = audit(directory)
        for store, rows in checked.items():
            print(f"{store}: {rows:,} rows recomputed from their votes")
            if failed := len(ShardStore(directory.folder, store).read_errors()):
                print(f"{store}: {failed:,} of them could not be run and certify nothing (errors/)")
        if args.replay and not findings:
            findings = replay(directory, args.replay, args.replay_seed, directory.config.compute.progress_interval_s)
            print(f"replay: {args.replay} rows drawn again")
        if findings:
            shown = "\n".join(f"  {finding}" for finding in findings[: args.show])
            more = f"\n  ... and {len(findings) - args.show} more" if len(findings) > args.show else ""
            raise DataError(f"{len(findings)} findings:\n{shown}{more}")
        print("nothing found")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
