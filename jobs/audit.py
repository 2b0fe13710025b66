"""Check a run afterwards: hashes, plan, every radius from its votes; with --replay, random rows from their seeds.

With everything that lies below the run: the later rounds and the corrupted sets.
"""

import sys

from jobs._cli import job_parser, number, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("audit", __doc__)
    parser.add_argument(
        "--replay", type=number, default=0, metavar="N", help="draw N random rows of each folder of rows again"
    )
    parser.add_argument(
        "--replay-seed",
        type=number,
        default=None,
        help="choose the same rows again: what an earlier call printed (default: one that nobody could foresee)",
    )
    parser.add_argument("--show", type=number, default=20, help="findings to print (default: 20)")

    def run(args) -> None:  # type: ignore[no-untyped-def]
        import secrets

        from core.errors import ConfigError, DataError
        from distributed.checks.audit import Replayed, audit, replay
        from distributed.store.origin import is_named
        from distributed.store.shards import ShardStore
        from distributed.studies.rounds import broken_links, rounds_there
        from distributed.studies.shift import with_all_below

        everything = with_all_below(open_run(args))
        findings = [f"{where}: {problem}" for where, problem in broken_links(rounds_there(everything[0][1]))]
        for prefix, directory in everything:
            try:
                found, checked = audit(directory)
            except ConfigError:
                if not prefix:
                    raise
                print(f"{prefix}: nothing certified yet")
                continue
            findings += [f"{prefix}{finding}" for finding in found]
            for store, rows in checked.items():
                print(f"{prefix}{store}: {rows:,} rows recomputed from their votes")
                if store != "dataset" and directory.config.certify.reference:
                    print(f"{prefix}{store}: certificates for {directory.config.holds_for}")
                shards = ShardStore(directory.folder, store)
                if failed := len(shards.read_errors()):
                    print(f"{prefix}{store}: {failed:,} of them could not be run and certify nothing (errors/)")
                if not found and (plan := shards.read_plan()) is not None and not is_named(plan):
                    print(f"{prefix}{store}: begun before files named their origin: provenance not proved")
        replayed = args.replay and not findings
        seed = secrets.randbits(53) if args.replay_seed is None else args.replay_seed
        for prefix, directory in everything if replayed else ():
            looked: list[Replayed] = []
            found = replay(directory, args.replay, seed, directory.config.compute.progress_interval_s, looked.append)
            findings += [f"{prefix}{finding}" for finding in found]
            for each in looked:
                print(f"{prefix}{each.store}: {each}")
        if replayed:
            print(f"rows chosen by --replay-seed {seed}")
        if findings:
            shown = "\n".join(f"  {finding}" for finding in findings[: args.show])
            more = f"\n  ... and {len(findings) - args.show} more" if len(findings) > args.show else ""
            raise DataError(f"{len(findings)} findings:\n{shown}{more}")
        print("nothing found")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
