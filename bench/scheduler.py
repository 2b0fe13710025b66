"""The scheduler alone: replicas that return at once, so what is left is planning, Ray Data, Parquet and verifying.

Each size runs in a process of its own, which measures its memory. Resuming is timed in a fresh process as well: one
shard of a run is removed, and the run is taken up again. The clock begins when that process has imported what it needs
and holds the example ids, as a job does once it has read its data set.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from bench.scale import SleepingReplica
from bench.settings import Settings
from bench.timing import Line, spread
from core.config import parse_config
from core.procedures.smoothing import certificate
from core.records import Sampling
from distributed.cluster.cluster import connected
from distributed.execution.replica import _OpenShard
from distributed.execution.scheduler import run_work
from distributed.execution.work import Work
from distributed.files.storage import Folder
from distributed.methods.rows import certificate_row
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["scheduler"]

PLAIN = {"sigmas": [0.25], "report": {"radii": [0.0]}}
SAMPLING = Sampling(100, 100, 0.001)
CERTIFICATE = certificate(np.arange(10) * 2 + 1, np.array([0] * 9 + [100]), 0.25, SAMPLING)


def scheduler(settings: Settings) -> list[Line]:
    """Examples per second, driver memory, and resuming, for runs of growing size."""
    found, memory = [], {}
    sizes = (200,) if settings.tiny else (10_000, 100_000, 1_000_000)
    for num in sizes:
        with tempfile.TemporaryDirectory() as folder:
            size = 20 if settings.tiny else 1000
            whole = _in_a_process(folder, num, size, "run")
            memory[num] = whole["peak_mib"]
            again = _in_a_process(folder, num, size, "resume")
        what = f"{num:,} examples"

        def line(text: str, value: float, unit: str, wanted: str = "", what: str = what) -> Line:
            return Line("scheduler", f"{what}: {text}", spread([value]), unit=unit, wanted=wanted)

        largest = num == sizes[-1]
        found += [
            line(
                "examples per second, Ray's start included",
                num / whole["seconds"],
                "1/s",
                ">= 2,000" if largest else "",
            ),
            line("examples per second, without it", num / (whole["seconds"] - whole["start_s"]), "1/s"),
            line("driver's memory at most", whole["peak_mib"], "MiB"),
            line("resume: until Ray has started", again["start_s"], "s"),
            line("resume: until the first shard is handed out", again["first_s"], "s"),
            line("resume: until all rows are verified and joined", again["seconds"], "s", "<= 10" if largest else ""),
        ]
    growth = memory[sizes[-1]] - memory[sizes[0]]
    what = f"driver's memory, {sizes[0]:,} -> {sizes[-1]:,} examples: growth"
    return [*found, Line("scheduler", what, spread([growth]), unit="MiB", wanted="<= 200")]


class InstantReplica(SleepingReplica):
    """Everything of a replica but data, networks and engine."""

    def _load(self, work: Work) -> None:
        super()._load(work)
        self._ids = pq.read_table(self._store.plan_file, columns=["example_id"]).column("example_id")

    def _serve(self) -> None:
        pass

    def submit(self, number: int) -> "Future[_OpenShard]":
        """The shard's rows, at once."""
        note = self.work.root.local
        assert note is not None
        if not (note / "first").exists():
            (note / "first").write_text(repr(time.time()))
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
        while not self._done.wait(0.05):
            self.mib = max(self.mib, psutil.Process().memory_info().rss / 2**20)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _in_a_process(folder: str, num: int, size: int, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scheduler", folder, str(num), str(size), what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, num: int, size: int, what: str) -> dict[str, float]:
    """Run everything, or take up a run whose last shard is removed."""
    ids = tuple(f"example-{number:08d}" for number in range(num))  # as a data set holds them
    # A part that is never full keeps the shards apart for `resume`; joining is in its time.
    compute = {"shard_examples": size, "progress_interval_s": 1e9, "part_rows": 1 if what == "run" else 1_000_000}
    config = parse_config({**PLAIN, "compute": compute})
    work = Work(Folder(folder), "dataset", "train", SAMPLING, "fixed", {}, config, "cpu")
    RunDirectory(folder, config)  # replicas write only where its manifest is
    store = ShardStore(folder, "dataset")
    if what == "resume":
        (folder / "first").unlink()
        (folder / "dataset" / store.files()[-1]).unlink()
    wall, start = time.time(), time.monotonic()
    with PeakMemory() as memory, connected(config.compute):
        start_s = time.monotonic() - start
        facts: dict[str, Any] = run_work(work, {}, ids, InstantReplica)
        seconds = time.monotonic() - start
    assert facts["rows"] == num
    first_s = float((folder / "first").read_text()) - wall
    return {"seconds": seconds, "start_s": start_s, "first_s": first_s, "peak_mib": memory.mib}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
