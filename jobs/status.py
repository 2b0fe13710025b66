"""How far a run is, from its directory alone: examples, rate, ETA and time since the last shard."""

import argparse
import sys
import time

from core.progress import clock
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def show(directory: RunDirectory) -> bool:
    """Print how far a run is, with what lies below it; whether somebody is at work or something is left to do."""
    from distributed.checks.status import status
    from distributed.store.lock import read_lock
    from distributed.studies.rounds import rounds_there
    from distributed.studies.shift import sets_there

    print(
        f"{directory.folder}: {len(directory.manifest['steps'])} steps finished"
        f" ({', '.join(directory.manifest['steps']) or 'none'})"
    )
    if holder := read_lock(directory.folder):
        print(f"locked by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}")
        if waits_for := holder.get("waits_for"):
            print(waits_for)
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
        print(f"{prefix}{store.store}: {', '.join(parts)}", flush=True)
    return holder is not None or not all(store.finished for _, store in stores)


def main() -> int:
    """Command line."""
    parser = job_parser("status", __doc__)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="look again every compute.progress_interval_s seconds, as long as somebody is at work or a step is not "
        "finished; Ctrl-C ends it",
    )

    def run(args: argparse.Namespace) -> None:
        directory = open_run(args)
        going_on = show(directory)
        try:
            while args.watch and going_on:
                time.sleep(directory.config.compute.progress_interval_s)
                print(time.strftime("\n%H:%M:%S"))
                going_on = show(open_run(args))
        except KeyboardInterrupt:  # how one ends to look: nothing was interrupted
            return

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
