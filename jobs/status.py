"""How far a run is, from its directory alone: examples, rate, ETA and time since the last shard."""

import sys
import time

from core.progress import clock
from jobs._cli import job_parser, open_run, run_job


def main() -> int:
    """Command line."""
    parser = job_parser("status", __doc__)

    def run(args) -> None:  # type: ignore[no-untyped-def]
        from distributed.checks.status import status
        from distributed.store.lock import read_lock
        from distributed.studies.rounds import rounds_there
        from distributed.studies.shift import sets_there

        directory = open_run(args)
        print(
            f"{directory.folder}: {len(directory.manifest['steps'])} steps finished"
            f" ({', '.join(directory.manifest['steps']) or 'none'})"
        )
        if holder := read_lock(directory.folder):
            print(f"locked by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}")
        places = [("", directory)]
        places += [(f"rounds/{each.folder.name}/", each) for each in rounds_there(directory)[1:]]
        places += [(f"shift/{each.folder.name}/", each) for each in sets_there(directory)]
        stores = [(prefix, store) for prefix, place in places for store in status(place, time.time())]
        for prefix, store in stores:
            parts = [f"{store.done:,}/{store.total:,} examples ({100 * store.done / max(store.total, 1):.0f}%)"]
            parts += [f"{store.rate:,.1f} examples/s"] if store.rate is not None else []
            if store.finished:
                parts.append("finished")
            else:
                parts += [f"ETA {clock(store.eta_s)}"] if store.eta_s is not None else []
                parts += [f"last shard {clock(store.idle_s)} ago"] if store.idle_s is not None else []
            parts += [f"{store.errors} errors"] if store.errors else []
            parts += [f"{store.retries} retries"] if store.retries else []
            parts += [f"{store.lost_devices} lost devices"] if store.lost_devices else []
            print(f"{prefix}{store.store}: {', '.join(parts)}")

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
