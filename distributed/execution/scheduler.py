"""Spreading a plan over replicas: plan -> Ray Data -> shards, or the same in this process without Ray."""

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from core import errors
from core.progress import Progress
from distributed.cluster.cluster import connected, device_here, quiet_ray_data, replica_pool
from distributed.execution.metrics import Gauges
from distributed.execution.replica import Facts, Replica, is_device_error
from distributed.execution.watch import Board, Scout, Seen, Watch
from distributed.execution.work import Work, measure_rate, probe_batch_size
from distributed.store.origin import devices_mix
from distributed.store.plan import Plan
from distributed.store.progress import Meter
from distributed.store.shards import ShardStore

__all__ = ["run_work"]

_MAX_BLOCKS = 2000
"""Ray Data keeps something of every block in the driver: a longer plan goes out several shards to a block."""


@dataclass(frozen=True)
class Executor:
    """Something that certifies shards.

    Attributes:
        device: `cpu` or `cuda`.
        slots: replicas at most.
        ask: have a replica's place answer `question(work, *args)`.
        run: certify these shards; facts come as they are committed, in any order.
        on_ray: whether Ray's metrics are there.
        watch: is told of the commits.
        share: of a device, that a replica takes.
    """

    device: str
    slots: int
    ask: Callable[..., Any]
    run: Callable[[Sequence[int]], Iterator[Facts]]
    on_ray: bool
    watch: Watch
    share: float = 1.0


def run_work(
    work: Work,
    origin: Mapping[str, Any],
    example_ids: Sequence[str],
    replica: type[Replica] = Replica,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Certify every shard of the plan that is not committed yet, then prove that all rows are there.

    The plan is made at the first call and kept. Rows with status `error` are tried once more. In the end the shards are
    verified against the plan and joined into larger files.

    Args:
        work: what to do; its device may be "auto".
        origin: what the rows are made from; see `distributed.store.origin`.
        example_ids: of the whole split, in the data set's order.
        replica: what certifies; another one for measuring what is around it.
        settings: kept in the plan, see there.

    Returns:
        Facts for the manifest (`Verifier.facts`), and `votes`, the number of all.

    Raises:
        ConfigError: when the plan on disk was made for something else, or for another kind of device whose noise is
            another one.
        DataError: when a file is not of this run, when the shards do not hold the plan's rows exactly once, or too many
            examples fail.
    """
    start = time.monotonic()
    store = ShardStore(work.root, work.store)
    plan = store.read_plan()
    if plan is not None:
        store.check_origin(plan, origin)
        store.check_files()
    draws = 0
    if plan is None or set(range(len(plan))) - store.committed() or store.shards_with_errors():
        compute = work.config.compute
        with (
            Meter(work.root, compute) as meter,
            (_local if compute.executor == "local" else _on_ray)(work, replica) as executor,
        ):
            if plan is None:
                plan = _make_plan(work, executor, origin, settings or {}, len(example_ids))
                store.write_plan(plan, example_ids)
            elif plan.device != executor.device:
                if not devices_mix(plan):
                    raise errors.ConfigError(
                        f"{work.store} was begun on {plan.device!r} and would go on on {executor.device!r}, with other "
                        f"noise; set compute.device={plan.device}, or use another --out"
                    )
                print(
                    f"{work.store}: begun on {plan.device!r}, goes on on {executor.device!r}: the noise is the same, "
                    "near-ties between logits may fall otherwise; each file of rows names its device",
                    flush=True,
                )
            _foresee(work, plan, store, executor, meter)
            draws = _run(work, plan, store, executor, meter)
    attempts = store.attempts()
    verified = store.finish(plan, example_ids, work.levels, work.config.compute.part_rows)
    store.forget_attempts()
    retries = sum(attempts.values()) - len(attempts)
    facts = verified.facts(draws, retries, round(time.monotonic() - start, 1))
    return {**facts, "votes": verified.votes}


def _make_plan(
    work: Work, executor: Executor, origin: Mapping[str, Any], settings: Mapping[str, Any], num_examples: int
) -> Plan:
    """Shards of the configured size, or of one that takes a replica `shard_seconds` at the measured rate.

    `batch_size: auto` is settled here, once and for all replicas: what a network computes can depend on the shape.
    """
    compute = work.config.compute
    if compute.batch_size == "auto":
        batch_size = executor.ask(probe_batch_size)
        print(f"{work.store}: compute.batch_size=auto comes to {batch_size} rows on this {executor.device}", flush=True)
    else:
        batch_size = compute.batch_size
    divide = partial(Plan.divide, num_examples, batch_size=batch_size, settings=settings)
    if isinstance(compute.shard_examples, int):
        return divide(compute.shard_examples, work.rows_per_example, origin, executor.device)
    rate = executor.ask(measure_rate, batch_size)
    examples_per_s = rate / work.draws_per_example
    even = math.ceil(num_examples / (4 * executor.slots))  # all replicas have something to do
    size = max(1, min(round(compute.shard_seconds * examples_per_s), even))
    print(
        f"{work.store}: a replica runs {rate:,.0f} noisy copies/s; {size} examples to a shard "
        f"({size / examples_per_s:.1f} s)",
        flush=True,
    )
    return divide(size, work.rows_per_example, origin, executor.device, executor.slots)


def _foresee(work: Work, plan: Plan, store: ShardStore, executor: Executor, meter: Meter) -> None:
    """Say, before the work begins, where what is left of the run's device hours will not do."""
    committed = store.committed()
    left = int(sum(size for shard, size in enumerate(plan.sizes.tolist()) if shard not in committed))
    if meter.left is None or not left:
        return
    rate = executor.ask(measure_rate, plan.batch_size or work.config.compute.training_batch_size)
    hours = left * work.draws_per_example / rate * executor.share / 3600
    beyond = f"; it will stop at about {meter.left / hours:.0%} of it" if hours > meter.left else ""
    print(
        f"{work.store}: up to {hours:.3g} device hours, of compute.max_device_hours are left {meter.left:.3g}{beyond}",
        flush=True,
    )


@dataclass
class _Tally:
    """What this call has done, as progress, metrics and limits need it."""

    work: Work
    executor: Executor
    meter: Meter
    draws: int = 0
    errors: int = 0
    retries: int = 0
    first_error: str = ""
    _seen: dict[str, float] = field(default_factory=dict)
    """When replicas have committed last, the latest at the end."""
    _held: dict[str, float] = field(default_factory=dict)
    _held_s: float = 0.0

    def add(self, facts: Facts) -> None:
        """Count a shard.

        Raises:
            DualRSError: that a replica reports, or because too many examples fail, or the device hours are spent.
        """
        if facts.failure:
            name, _, message = facts.failure.partition(": ")
            raise getattr(errors, name)(message)
        self.draws += facts.draws
        self.errors += facts.errors
        self.retries += facts.attempt - 1
        self.first_error = self.first_error or facts.first_error
        self._seen.pop(facts.replica, None)
        self._seen[facts.replica] = time.monotonic()
        self._held_s += facts.held_s - self._held.get(facts.replica, 0.0)
        self._held[facts.replica] = facts.held_s
        if self.errors > self.work.config.compute.max_errors:
            raise errors.DataError(
                f"{self.errors} examples of {self.work.store} could not be run, more than compute.max_errors = "
                f"{self.work.config.compute.max_errors}; the first: {self.first_error}"
            )
        self.meter.count(self._held_s * self.executor.share)
        self.executor.watch.committed(facts.seconds)

    def replicas(self) -> int:
        """Replicas that have committed in the last ten minutes."""
        while time.monotonic() - self._seen[first := next(iter(self._seen))] >= 600.0:
            del self._seen[first]
        return len(self._seen)


def _run(work: Work, plan: Plan, store: ShardStore, executor: Executor, meter: Meter) -> int:
    """Certify what is missing, then once more what failed; returns the draws."""
    tally, total, committed = _Tally(work, executor, meter), len(plan.order), store.committed()
    pending = [shard for shard in range(len(plan)) if shard not in committed]
    begun = done = total - int(plan.sizes[pending].sum())
    metrics = None
    if executor.on_ray:
        metrics = Gauges(
            work.store,
            planned_examples="examples of the plan",
            committed_examples="examples committed, earlier runs included",
            eta_seconds="time left at the present rate",
            replicas="replicas that committed in the last minutes",
        )
        metrics.set(planned_examples=total)
    start, interval = time.monotonic(), work.config.compute.progress_interval_s
    if pending:
        with Progress(total, work.store, "examples", done=done, interval_s=interval) as progress:
            for facts in executor.run(pending):
                tally.add(facts)
                done += facts.examples
                elapsed = time.monotonic() - start
                progress.update(
                    facts.examples,
                    f"{tally.draws / elapsed:,.0f} draws/s, {tally.errors} errors, {tally.retries} retries",
                )
                if metrics is not None:
                    eta_s = (total - done) * elapsed / max(done - begun, 1)
                    metrics.set(committed_examples=done, eta_seconds=eta_s, replicas=tally.replicas())
    if failed := sorted(shard for shard in store.shards_with_errors() if shard < len(plan)):
        print(f"{work.store}: trying the examples of {len(failed)} shards again that could not be run", flush=True)
        tally.errors = 0
        for facts in executor.run(failed):
            tally.add(facts)
        if left := store.read_errors().num_rows:
            print(
                f"{work.store}: {left} rows could not be run, they certify nothing; why: {store.errors} "
                f"(the first: {tally.first_error})",
                flush=True,
            )
    return tally.draws


@contextmanager
def _local(work: Work, replica_class: type[Replica]) -> Iterator[Executor]:
    """The reference: one replica in this process, two shards in flight."""
    placed = replace(work, device=device_here(work.device))
    board = Board()

    def run(pending: Sequence[int]) -> Iterator[Facts]:
        replica = replica_class(placed, board=board)
        in_flight: deque[Future[Any]] = deque()
        try:
            waiting = deque(pending)
            while waiting or in_flight:
                while waiting and len(in_flight) < 2:
                    in_flight.append(replica.submit(waiting.popleft()))
                yield replica.commit(in_flight.popleft().result())
        finally:
            replica.close()

    with Watch(work.store, work.config.compute, board, 1) as watch:
        yield Executor(placed.device, 1, lambda ask, *args: ask(placed, *args), run, on_ray=False, watch=watch)


class _Cluster(Board):
    """The replicas on Ray, by their signs on a board that is an actor beside the driver."""

    def __init__(self, resource: str, each: float) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._resource, self._each = resource, each
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.name = f"board-{uuid.uuid4().hex}"
        actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Board)
        self._board = actor.options(name=self.name).remote()

    def look(self) -> list[Seen]:
        """Those that live, as far as Ray knows."""
        import ray
        from ray.core.generated.gcs_pb2 import ActorTableData

        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        gone = {ActorTableData.DEAD}  # a pool that shrinks; for Ray one that loads again is still RESTARTING
        return [
            seen
            for seen in ray.get(self._board.look.remote(), timeout=60.0)
            if seen.sign.node_id in nodes
            and seen.sign.handle._get_local_state()
            not in (gone | {ActorTableData.RESTARTING} if seen.sign.stage == "working" else gone)
        ]

    def end(self, seen: Seen) -> bool:
        """Have its node end it; Ray starts another one."""
        import ray

        ray.kill(seen.sign.handle, no_restart=False)
        self._board.ended.remote(seen.sign.key)
        return True

    def room(self) -> str:
        """Why there is no replica."""
        import ray

        kind, nodes = self._resource, sum(node["Alive"] for node in ray.nodes())
        there, free = (every.get(kind, 0.0) for every in (ray.cluster_resources(), ray.available_resources()))
        if there < self._each:
            return f"no node with a {kind} yet ({nodes} nodes in the cluster)"
        taken = f"no {kind} is free, {there - free:g} of {there:g} are taken"
        return taken if free < self._each else "a replica is about to start"


@contextmanager
def _on_ray(work: Work, replica_class: type[Replica]) -> Iterator[Executor]:
    """Ray Data feeds shard numbers to a pool of replica actors; each commits its shards itself and returns facts."""
    with connected(work.config.compute):
        import ray.data  # not before: `connected` decides how Ray authenticates

        context = ray.data.DataContext.get_current()
        context.execution_no_progress_timeout_s = -1  # an autoscaling cluster may wait long for its first node
        context.max_consecutive_actor_init_deaths = 10  # a node may go while a replica loads
        # Shards in flight over shards at work, 3 / 2 below: at Ray's own 1.75 the pool would never grow, and the nodes
        # that Ray Data asks for would stand idle.
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.25
        quiet_ray_data()
        pool = replica_pool(work.config.compute)
        placed = replace(work, device=pool.device)
        resources = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
        cluster = _Cluster("GPU" if pool.num_gpus else "CPU", pool.num_gpus or pool.num_cpus)

        def ask(question: Callable[..., Any], *args: Any) -> Any:
            """As soon as there is a place."""
            print(f"{work.store}: waiting for a replica to measure", flush=True)
            try:
                scout = ray.remote(**resources, max_restarts=-1, max_task_retries=-1)(Scout).remote()
                return ray.get(scout.ask.remote(question, cluster.name, placed, *args))
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, errors.DualRSError):
                    raise error.cause from None
                if is_device_error(error.cause):
                    raise errors.ModelError(f"the device failed while it was measured: {error.cause}") from error
                raise

        def run(pending: Sequence[int]) -> Iterator[Facts]:
            numbers = ray.data.from_items(
                [{"shard": number} for number in pending], override_num_blocks=min(len(pending), _MAX_BLOCKS)
            )
            print(f"{work.store}: {len(pending)} shards for {pool.describe()}", flush=True)
            smallest = min(pool.smallest, len(pending))
            done = numbers.map_batches(
                replica_class,
                fn_constructor_args=(placed, True, cluster.name),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    min_size=smallest,
                    max_size=max(smallest, min(pool.largest, len(pending))),
                    initial_size=max(smallest, min(pool.initial, len(pending))),
                    max_concurrent_calls_per_actor=2,  # two shards share a replica's engine
                    max_tasks_in_flight_per_actor=3,
                ),
                **resources,
            )
            for row in done.iter_rows():
                yield Facts(**row)

        share = pool.num_gpus or 1.0
        with Watch(work.store, work.config.compute, cluster, pool.largest) as watch:
            yield Executor(pool.device, pool.largest, ask, run, on_ray=True, watch=watch, share=share)
