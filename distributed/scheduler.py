"""Spreading a plan over replicas: plan -> Ray Data -> shards, or the same in this process without Ray."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from core import errors
from core.progress import Progress
from distributed.replica import Facts, Replica, Rows, Work
from distributed.shards import Plan, ShardStore
from distributed.tables import non_finite_votes

__all__ = ["run_work"]


def run_work(work: Work, plan: Plan, example_ids: Sequence[str]) -> dict[str, Any]:
    """Certify every shard of the plan that is not committed yet, then prove that all rows are there.

    Args:
        work: what to do; its device may be "auto".
        plan: as `ShardStore.plan` returned it.
        example_ids: of the whole split, in the data set's order.

    Returns:
        Facts for the manifest: rows, and draws and seconds of this call.

    Raises:
        DataError: when the shards do not hold the plan's rows exactly once.
    """
    store = ShardStore(work.root, work.store)
    committed = store.committed()
    pending = [number for number in range(len(plan.shards)) if number not in committed]
    start, draws = time.monotonic(), 0
    if pending:
        total = sum(map(len, plan.shards))
        done = total - sum(len(plan.shards[number]) for number in pending)
        compute = work.config.compute
        with Progress(total, work.store, "examples", done=done, interval_s=compute.progress_interval_s) as progress:
            for facts in (_run_local if compute.executor == "local" else _run_on_ray)(work, pending):
                draws += facts.draws
                elapsed = time.monotonic() - start
                progress.update(facts.examples, f"{draws / elapsed:,.0f} draws/s")
    return {
        "rows": store.check(plan, example_ids),
        "shards": len(plan.shards),
        "draws_this_call": draws,
        "non_finite_draws": non_finite_votes(store.read()),
        "devices": sorted(store.devices()),
        "duration_s": round(time.monotonic() - start, 1),
    }


def _run_local(work: Work, pending: Sequence[int]) -> Iterator[Facts]:
    """The reference: one replica in this process, two shards in flight."""
    device = work.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(work, device)
    replica = Replica(replace(work, device=device))
    in_flight: deque[tuple[int, float, Future[Rows]]] = deque()
    try:
        waiting = deque(pending)
        while waiting or in_flight:
            while waiting and len(in_flight) < 2:
                shard = waiting.popleft()
                in_flight.append((shard, time.monotonic(), replica.submit(shard)))
            shard, start, future = in_flight.popleft()
            yield replica.commit(shard, future.result(), start)
    finally:
        replica.close()


def _run_on_ray(work: Work, pending: Sequence[int]) -> Iterator[Facts]:
    """Ray Data feeds shard numbers to a pool of replica actors; each commits its shards itself and returns facts."""
    from distributed.cluster import connected, replica_slots

    with connected(work.config.compute):
        import ray.data  # not before: `connected` decides how Ray authenticates

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # an autoscaling cluster may wait long for its first node
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it complains of the line above
        device, replicas = replica_slots(work.config.compute)
        _check_device(work, device)
        gpu = device == "cuda"
        pool = ray.data.ActorPoolStrategy(
            size=min(replicas, len(pending)),
            max_concurrent_calls_per_actor=2,  # two shards share a replica's engine
            max_tasks_in_flight_per_actor=3,
        )
        numbers = ray.data.from_items([{"shard": number} for number in pending], override_num_blocks=len(pending))
        done = numbers.map_batches(
            Replica,
            fn_constructor_args=(replace(work, device=device),),
            batch_size=1,
            compute=pool,
            num_gpus=1 if gpu else 0,
            num_cpus=0 if gpu else work.config.compute.threads_per_replica,
        )
        for row in done.iter_rows():
            facts = Facts(**row)
            if facts.error:
                name, _, message = facts.error.partition(": ")
                raise getattr(errors, name)(message)
            yield facts


def _check_device(work: Work, device: str) -> None:
    """Refuse to mix devices in one store: the CPU and an accelerator draw different noise for the same key.

    Raises:
        ConfigError: names both.
    """
    for before in ShardStore(work.root, work.store).devices():
        if before.partition(":")[0] != device:
            raise errors.ConfigError(
                f"{work.store} was begun on {before!r} and would go on on {device!r}, with other noise; set "
                f"compute.device={before.partition(':')[0]}, or use another --out"
            )
