"""ImageNet's training set on spot GPUs: what the real code costs a shard, and a model of who waits for what.

Measured here, on the real code: requests of a shard and of a resumption to an S3 server (moto, in this process), time
and memory of the driver's plan and example ids. Modelled, for nobody has 64 GPUs at hand: machines that come and go on
a simulated clock, with the passes, the driver and the store as fast as `Cluster` says.
"""

import heapq
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyarrow.fs as pafs

from bench.settings import Settings
from bench.timing import Line, spread
from core.config import parse_config
from core.procedures.smoothing import certificate
from core.records import Sampling
from distributed.execution.replica import Replica
from distributed.execution.work import Work
from distributed.files.ahead import AT_ONCE
from distributed.files.storage import Folder
from distributed.methods.rows import certificate_row
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["Cluster", "Outcome", "SleepingReplica", "scale", "simulate"]

SAMPLING = Sampling(100, 100, 0.001)
SIGMAS = (0.25, 0.5, 1.0)
CERTIFICATES = [certificate(np.arange(10), np.array([0] * 9 + [100]), sigma, SAMPLING) for sigma in SIGMAS]

DRAWS = len(SIGMAS) * 200
IMAGES_PER_S = 162.0
"""Of U-Net 552.8M and BEiT-L at 512 on an H100, at half of the arithmetic's 324 (2,437 GFLOP at 790 TFLOP/s)."""
DRIVER_SHARDS_PER_S = 48.0
"""What the part `scheduler` measures on two cores, replicas included."""
REQUEST_S = 0.03
"""Of an object store, until the first byte."""
PRICES = {"PUT": 5e-6, "LIST": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}
"""Dollars a request, S3 standard."""


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        replicas: GPUs that are wanted.
        shard_s: device seconds of a shard.
        shards: in all.
        life_s: mean life of a machine, exponential.
        notice_s: before its end.
        away_s: from its end until another one is there.
        load_s: until that one has loaded its networks.
        driver_s: of the driver for each shard, one after the other.
        in_flight: shards that a replica holds, the one at work included.
    """

    replicas: int
    shard_s: float
    shards: int
    life_s: float = 2400.0
    notice_s: float = 120.0
    away_s: float = 180.0
    load_s: float = 60.0
    driver_s: float = 1 / DRIVER_SHARDS_PER_S
    in_flight: int = 3


@dataclass(frozen=True)
class Outcome:
    """Of a simulation: hours until the last commit, and device seconds by what they went to."""

    hours: float
    held_s: float
    useful_s: float
    lost_s: float
    driver_share: float
    losses: int

    @property
    def busy(self) -> float:
        """Share of the devices' time that ended in a commit."""
        return self.useful_s / self.held_s


def simulate(c: Cluster, seed: int = 0) -> Outcome:
    """Replicas work off shards one after the other; a notice stops new ones, an end loses those that are not done.

    The driver hands out one shard after the other, and a replica asks for the next one when it commits.
    """
    random, events, number = np.random.default_rng(seed), list[tuple[float, int, str, int, int]](), itertools.count()
    everyone = range(c.replicas)
    held, coming, life_of = [0] * c.replicas, [0] * c.replicas, [0] * c.replicas
    born, began, takes = [0.0] * c.replicas, [-1.0] * c.replicas, [False] * c.replicas
    told = [False] * c.replicas
    waiting, done, losses, free_at = c.shards, 0, 0, 0.0
    now = useful = lost = alive = 0.0

    def at(when: float, what: str, one: int) -> None:
        heapq.heappush(events, (when, next(number), what, one, life_of[one]))

    def fill(replicas: Iterable[int]) -> None:
        nonlocal waiting, free_at
        for one in replicas:
            for _ in range(min(waiting, c.in_flight - held[one] - coming[one]) if takes[one] else 0):
                waiting, free_at = waiting - 1, max(now, free_at) + c.driver_s
                coming[one] += 1
                at(free_at, "arrives", one)

    def begin(one: int) -> None:
        if held[one] and began[one] < 0:
            began[one] = now
            at(now + c.shard_s * random.uniform(0.9, 1.1), "done", one)

    for one in everyone:
        at(0.0, "up", one)
    while done < c.shards:
        now, _, what, one, life = heapq.heappop(events)
        if life != life_of[one]:  # of a machine that is gone
            continue
        if what == "up":
            born[one], told[one], ends = now, False, now + random.exponential(c.life_s)
            at(now + c.load_s, "ready", one)
            at(max(now, ends - c.notice_s), "notice", one)
            at(ends, "end", one)
        elif what == "ready":
            takes[one] = not told[one]
            fill([one])
        elif what == "arrives":
            held[one], coming[one] = held[one] + 1, coming[one] - 1
            begin(one)
        elif what == "done":
            useful, done, held[one], began[one] = useful + now - began[one], done + 1, held[one] - 1, -1.0
            fill([one])
            begin(one)
        elif what == "notice":
            takes[one], told[one] = False, True
        else:
            alive, losses = alive + now - born[one], losses + bool(held[one])
            lost += now - began[one] if began[one] >= 0 else 0.0
            idle, waiting = not waiting, waiting + held[one] + coming[one]
            held[one], coming[one], born[one], began[one], takes[one] = 0, 0, math.inf, -1.0, False
            life_of[one] += 1
            at(now + c.away_s, "up", one)
            fill(everyone if idle else ())
    alive += math.fsum(max(0.0, now - each) for each in born)
    return Outcome(now / 3600, alive, useful, lost, min(1.0, c.shards * c.driver_s / now), losses)


class SleepingReplica(Replica):
    """A replica without data, networks and engine: what is left are its requests to the store."""

    def _load(self, work: Work) -> None:
        self._store = ShardStore(work.root, work.store)
        plan = self._store.read_plan()
        assert plan is not None
        self._plan = plan

    def _serve(self) -> None:
        while (shard := self._inbox.get()) is not None:
            ids = (f"example-{place:08d}" for place in self._plan.members(shard.number).tolist())
            for example_id in ids:
                shard.rows += [certificate_row(example_id, 9, each) | {"image_hash": "-"} for each in CERTIFICATES]
            shard.future.set_result(shard)

    def _made_on(self) -> str:
        return "cpu"


@contextmanager
def _counted_store(name: str) -> Iterator[tuple[Folder, Counter[str]]]:
    """A folder in an S3 bucket of this process, and a count of its requests by kind."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application, count = DomainDispatcherApplication(create_backend_app), Counter[str]()

    def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        listing = "list-type" in environ.get("QUERY_STRING", "")
        count["LIST" if listing else environ["REQUEST_METHOD"]] += 1
        return application(environ, start_response)

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(key, "testing")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it prints every request
    server = make_server("127.0.0.1", 0, counted, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http"
        pafs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{server.port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir("bucket")
        yield Folder(f"s3://bucket/{name}?{query}"), count
    finally:
        server.shutdown()


def _requests(num: int) -> dict[str, Counter[str]]:
    """Of `num` shards of two examples: each on its way, and each of a resumption and of the last step."""
    config = parse_config({"sigmas": list(SIGMAS), "report": {"radii": [0.0]}})
    ids, made = [f"example-{place:08d}" for place in range(2 * num)], dict[str, Counter[str]]()
    with _counted_store(f"run-{num}") as (folder, count):
        RunDirectory(folder, config)
        store = ShardStore(folder, "dataset")
        plan = Plan.divide(len(ids), 2, len(SIGMAS), {})
        store.write_plan(plan, ids)
        work = Work(folder, "dataset", "train", SAMPLING, "fixed", {}, config, "cpu")
        replica = SleepingReplica(work)

        def shards() -> None:
            for number in range(num):
                replica.commit(replica.submit(number).result())

        def resume() -> None:
            again = ShardStore(folder, "dataset")
            again.check_files()
            again.committed()
            deque(again.images(), maxlen=0)

        steps: dict[str, Callable[[], Any]] = {
            "shard": shards,
            "resume": resume,
            "finish": lambda: store.finish(plan, ids, SIGMAS, 10**9),
        }
        for name, step in steps.items():
            count.clear()
            step()
            made[name] = Counter(count)
        replica.close()
    return made


def _driver(num: int) -> tuple[float, float]:
    """Seconds and MiB of the driver for a plan of `num` examples: ids as a data set holds them, written and read."""
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    ids = tuple(f"example-{place:08d}" for place in range(num))
    plan = Plan.divide(num, 16, len(SIGMAS), {})
    content = plan.to_bytes(ids)
    again = Plan.from_bytes(content, "the plan")
    assert len(again) == len(plan)
    return time.monotonic() - start, (psutil.Process().memory_info().rss - before) / 2**20


def scale(settings: Settings) -> list[Line]:
    """Requests and driver as measured, then the model's table."""

    def line(what: str, value: float, unit: str) -> Line:
        return Line("scale", what, spread([value]), unit=unit)

    num, found = 4 if settings.tiny else 100, []
    few, many = _requests(num), _requests(2 * num)  # what a run asks for once is none of a shard's
    each = {step: {kind: (kinds[kind] - few[step][kind]) / num for kind in kinds} for step, kinds in many.items()}
    for step, kinds in each.items():
        what = ", ".join(f"{kind} {count:.2g}" for kind, count in sorted(kinds.items()))
        found.append(line(f"measured: requests of a shard, {step} ({what})", math.fsum(kinds.values()), ""))
    for examples in (10**4,) if settings.tiny else (10**6, 10**7):
        seconds, mib = _driver(examples)
        found += [
            line(f"measured: {examples:,} ids and their plan, made, written and read", seconds, "s"),
            line(f"measured: {examples:,} ids and their plan: the driver's memory", mib, "MiB"),
        ]
    dollars = math.fsum(PRICES[kind] * count for kind, count in each["shard"].items())
    for examples, replicas in ((1_281_167, 64), (10_000_000, 1000)):
        for shard_s in (20.0, 60.0, 300.0):
            shards = math.ceil(examples * DRAWS / IMAGES_PER_S / shard_s)
            some = min(shards, 500 if settings.tiny else 150_000)  # of a longer run a part says it all
            o = simulate(Cluster(replicas, shard_s, some))
            what = f"model: {examples:,} examples, {replicas} GPUs, shards of {shard_s:g} s"
            per_hour, waits = some / o.hours, REQUEST_S / 3600 * shards
            resume, finish = (waits * math.fsum(each[step].values()) for step in ("resume", "finish"))
            found += [
                line(f"{what}: hours", o.hours * shards / some, "h"),
                line(f"{what}: busy share", o.busy, ""),
                line(f"{what}: work lost", o.lost_s / o.held_s, ""),
                line(f"{what}: driver's busy share", o.driver_share, ""),
                line(f"{what}: requests an hour", per_hour * math.fsum(each["shard"].values()), "1/h"),
                line(f"{what}: their price", per_hour * dollars, "$/h"),
                line(f"{what}: resumption, one request after the other", resume * 60, "min"),
                line(f"{what}: resumption, {AT_ONCE} at once", resume * 60 / AT_ONCE, "min"),
                line(f"{what}: proof and joining, {AT_ONCE} at once", finish * 60 / AT_ONCE, "min"),
            ]
    return found
