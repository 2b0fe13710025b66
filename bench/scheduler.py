"""The scheduler alone: replicas that return at once, so what is left is planning, Ray Data, Parquet and verifying.

    python -m bench.scheduler [--examples 10000 100000 1000000]

Prints, for each size, examples per second, the driver's memory, and how long a start with half of the shards committed
takes until its first new shard.
"""

import argparse
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from core.config import parse_config
from core.records import Sampling
from core.smoothing import certificate
from distributed.cluster import connected
from distributed.replica import Replica, _OpenShard
from distributed.rows import certificate_row
from distributed.scheduler import run_work
from distributed.shards import ShardStore
from distributed.storage import Folder
from distributed.work import Work

PLAIN = {"sigmas": [0.25], "report": {"radii": [0.0]}}
SAMPLING = Sampling(100, 100, 0.001)
CERTIFICATE = certificate(np.arange(10) * 2 + 1, np.array([0] * 9 + [100]), 0.25, SAMPLING)


class InstantReplica(Replica):
    """Everything of a replica but data, networks and engine."""

    def _load(self, work: Work) -> None:
        self._device = "cpu"
        self._store = ShardStore(work.root, work.store)
        plan = self._store.read_plan()
        assert plan is not None
        self._plan = plan
        self._ids = pq.read_table(self._store.plan_file, columns=["example_id"]).column("example_id")

    def _serve(self) -> None:
        pass

    def submit(self, number: int) -> "Future[_OpenShard]":
        """The shard's rows, at once."""
        attempt = self._store.begin(number, self.id)
        ids = [self._ids[index].as_py() for index in self._plan.members(number).tolist()]
        rows = [certificate_row(name, 9, CERTIFICATE) for name in ids]
        shard = _OpenShard(number, attempt, time.monotonic(), 0, rows, frozenset())
        shard.future.set_result(shard)
        return shard.future


class PeakMemory:
    """Context manager: the largest resident memory of this process, MiB, sampled."""

    def __enter__(self) -> "PeakMemory":
        self._done, self.mib = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.mib = max(self.mib, psutil.Process().memory_info().rss / 2**20)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard", type=int, default=1000, help="examples to a shard")
    args = parser.parse_args()
    print("| examples | shards | examples/s | driver, peak MiB | verify and join, s | resume at 50%, s | then, s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for num in args.examples:
        with tempfile.TemporaryDirectory() as folder, connected(parse_config(PLAIN).compute):
            print("| " + " | ".join(measure(Path(folder), num, args.shard)) + " |", flush=True)


def measure(folder: Path, num: int, shard: int) -> list[str]:
    """One line of the table."""
    ids = [f"example-{number:08d}" for number in range(num)]

    def work(*overrides: str) -> Work:
        config = parse_config({**PLAIN, "compute": {"shard_examples": shard, "progress_interval_s": 1e9}}, overrides)
        return Work(Folder(folder), "dataset", "standard", "train", SAMPLING, "fixed", {}, config, "cpu")

    store = ShardStore(folder, "dataset")
    start = time.monotonic()
    with PeakMemory() as memory:
        facts = run_work(work("compute.part_rows=1"), {}, ids, InstantReplica)
    seconds = time.monotonic() - start
    assert facts["rows"] == num
    for name in store.files()[1::2]:
        (folder / "dataset" / name).unlink()
    kept, start_time, start = set(store.files()), time.time(), time.monotonic()
    run_work(work(f"compute.part_rows={shard * 100}"), {}, ids, _noting_first(folder))
    again = time.monotonic() - start
    first = float((folder / "first").read_text()) - start_time
    assert store.verify(_plan(store), ids, (0.25,)).rows == num
    start = time.monotonic()
    store.verify(_plan(store), ids, (0.25,))
    verify = time.monotonic() - start
    return [
        f"{num:,}",
        f"{len(kept) * 2:,}",
        f"{num / seconds:,.0f}",
        f"{memory.mib:,.0f}",
        f"{verify:.1f}",
        f"{first:.1f}",
        f"{again:.1f}",
    ]


def _noting_first(folder: Path) -> type[InstantReplica]:
    """A replica that notes when the first shard came to one of its kind."""

    class Noting(InstantReplica):
        def submit(self, number: int) -> Any:
            note = folder / "first"
            if not note.exists():
                note.write_text(repr(time.time()))
            return super().submit(number)

    return Noting


def _plan(store: ShardStore) -> Any:
    plan = store.read_plan()
    assert plan is not None
    return plan


if __name__ == "__main__":
    main()
