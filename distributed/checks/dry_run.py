"""What a job would take, without doing it."""

from collections.abc import Sequence

import torch

from distributed.checks.estimate import Part, format_parts, limit_notes
from distributed.checks.preflight import Found, check, check_place, count_found, refuse
from distributed.cluster.cluster import replicas_here
from distributed.cluster.joining import joins
from distributed.store.lock import read_lock
from distributed.store.progress import device_hours
from distributed.store.run_directory import RunDirectory
from distributed.store.sources import model_key

__all__ = ["dry_run", "show_parts"]

_STATED = "For hours and a price without a device and files: --rate, with rates that an earlier run or dry run printed"


def dry_run(directory: RunDirectory, steps: Sequence[str], price: float | None, seconds: float = 2.0) -> None:
    """Print what `check` found and what the steps will take, measured for a few seconds; write nothing.

    Measured on this machine, or where RAY_ADDRESS names a cluster, where a replica of it would run. Where nothing but
    files are missing, with random weights and black images in their place, before they are refused.

    Args:
        directory: opened `dry`.
        steps: as for `check`.
        price: of a device hour.
        seconds: that each of the measurements takes.

    Raises:
        DualRSError: for the problems, all in one.
    """
    on_cluster = joins() and directory.config.compute.executor == "ray"
    found = check(directory, steps, here=on_cluster)
    device, replicas, of = replicas_here(directory.config.compute)
    found.facts.append(("device", of))
    if found.absent:
        found.facts.append(("to do", f"`python -m jobs.fetch YAML` fetches published files. {_STATED}"))
    if holder := read_lock(directory.folder):
        found.facts.append(("in use", f"by process {holder.get('pid')} on {holder.get('host')}"))
    width = max(len(topic) for topic, _ in found.facts)
    for topic, fact in found.facts:
        print(f"{topic:<{width}}  {fact}")
    if any(problem not in found.absent.values() for problem in found.problems):
        refuse(found.problems)
    if not found.steps:
        print("everything is finished: nothing to do")
        return
    parts = count_found(directory, found, replicas)
    notes = []
    if not joins():
        blocked = Found(found.steps)
        check_place(directory.config, blocked, here=True)
        notes += [f"refused on this machine, without a cluster (RAY_ADDRESS): {each}" for each in blocked.problems]
    if parts and on_cluster:
        from distributed.checks.measure import measure_on_worker

        notes += measure_on_worker(directory, parts, [*found.data], seconds, found.absent)
    elif parts and directory.config.compute.device == "cuda" and not torch.cuda.is_available():
        notes.append(f"compute.device is cuda and this machine has no GPU: nothing can be measured here. {_STATED}")
    elif parts:
        from distributed.checks.measure import measure_parts

        print(f"measuring on {device}, {seconds:g} s each ...", flush=True)
        notes += measure_parts(directory, parts, found.data, device, seconds, found.absent)
    images = [key for key in found.absent if key.startswith("dataset.") and key.removeprefix("dataset.") in found.data]
    weights = [key for key in map(model_key, found.networks) if key in found.absent]
    for what, keys in (("black images", images), ("random weights", weights)):
        if keys and any(part.rates for part in parts):
            notes.insert(
                0, f"{what}, files are missing: {', '.join(keys)}; with them the same passes take the same time"
            )
    for key in found.absent:
        if key.startswith("dataset.") and key not in images:
            notes.append(f"{key} is missing, and of no published size: the steps that read it are not counted")
    show_parts(directory, parts, price, notes)
    refuse(found.problems)


def show_parts(directory: RunDirectory, parts: Sequence[Part], price: float | None, notes: Sequence[str]) -> None:
    """Print the table of what steps will take, and what is to be known of its numbers."""
    print(f"\n{format_parts(parts, price)}\n")
    spent, limit = device_hours(directory.folder), directory.config.compute.max_device_hours
    notes = [*notes, *limit_notes(parts, spent, limit)]
    if any(not part.exact for part in parts):
        notes.append(
            "<= is an upper bound: Dual RS takes less where the estimator picks sigma_e (shared copies), abstains or, "
            "under claim agreement, excludes a level, Multiscale where a level above the smallest sigma decides, "
            "sequential budgets where they stop early; training leaves out samples of radius 0"
        )
    notes.append("wall: with all replicas from the start; without the start of Ray, of machines, and of Python")
    print("\n".join(notes))
