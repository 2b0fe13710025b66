"""How far a run is, from its directory alone: examples, rate, ETA and time since the last shard."""

import argparse
import sys
import time

from core.progress import clock
from distributed.store.progress import device_hours
from distributed.store.run_directory import RunDirectory
from jobs._cli import job_parser, open_run, run_job


def show(directory: RunDirectory) -> bool:
    """Print how far a run is, with what lies below it; whether somebody is at work or something is left to do."""
    from distributed.checks.live import training_lines
    from distributed.checks.status import status
    from distributed.store.lock import read_lock
    from distributed.studies.shift import with_all_below

    print(
        f"{directory.folder}: {len(directory.manifest['steps'])} steps finished"
        f" ({', '.join(directory.manifest['steps']) or 'none'})"
    )
    if holder := read_lock(directory.folder):
        print(f"locked by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}")
        if waits_for := holder.get("waits_for"):
            print(waits_for)
    if spent := spent_line(directory):
        print(spent)
    places = with_all_below(directory)
    for prefix, place in places:
        for line in training_lines(place, time.time()):
            print(f"{prefix}{line}", flush=True)
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


def spent_line(directory: RunDirectory) -> str | None:
    """What all starts of the run have taken, None before the first."""
    spent, limit = device_hours(directory.folder), directory.config.compute.max_device_hours
    of = f" of compute.max_device_hours = {limit:.4g}" if limit is not None else ""
    return f"spent: {spent:.3g} device hours{of}" if spent else None


def write_page(directory: RunDirectory) -> None:
    """Write status.html into the run directory, from which anybody who sees it can open it."""
    from distributed.checks.live import live_page, training_lines
    from distributed.store.lock import read_lock
    from jobs.report import require_matplotlib

    require_matplotlib()
    now, holder = time.time(), read_lock(directory.folder)
    steps = ", ".join(directory.manifest["steps"]) or "none"
    work = holder and f"Locked by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}."
    waits = holder and holder.get("waits_for")
    told = (f"Steps finished: {steps}.", work, waits, *training_lines(directory, now), spent_line(directory))
    directory.folder.write("status.html", live_page(directory, now, [each for each in told if each]))
    print(f"page: {directory.folder.where('status.html')}", flush=True)


def main() -> int:
    """Command line."""
    parser = job_parser("status", __doc__)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="look again every compute.progress_interval_s seconds, as long as somebody is at work or a step is not "
        "finished; Ctrl-C ends it",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="also write status.html into the run directory, one page: progress, rate, replicas, errors, curves so far",
    )

    def look(args: argparse.Namespace) -> bool:
        directory = open_run(args)
        going_on = show(directory)
        if args.html:
            write_page(directory)
        return going_on

    def run(args: argparse.Namespace) -> None:
        going_on = look(args)
        try:
            while args.watch and going_on:
                time.sleep(open_run(args).config.compute.progress_interval_s)
                print(time.strftime("\n%H:%M:%S"))
                going_on = look(args)
        except KeyboardInterrupt:  # how one ends to look: nothing was interrupted
            return

    return run_job(parser, run)


if __name__ == "__main__":
    sys.exit(main())
