"""`jobs.build_dataset` with other replicas: `python -m tests.helpers.replicas Slow --out RUN ...`."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from core.machine.engine import Task
from distributed.execution import launch
from distributed.execution.replica import Facts, Replica
from distributed.execution.scheduler import run_work
from distributed.execution.work import Work
from jobs import build_dataset


class Slow(Replica):
    """Takes a few seconds for a shard whatever it holds, on the CPU, also where it takes a GPU of Ray's books."""

    def __init__(self, work: Work, *rest: Any) -> None:
        super().__init__(replace(work, device="cpu"), *rest)

    def commit(self, shard: Any) -> Facts:
        """Asleep, so that a busy machine does not matter."""
        time.sleep(4.0)
        return super().commit(shard)


class Blocks(Replica):
    """Waits for ever for a file, as for a file system that is gone: the first that finds a FIFO."""

    def _load(self, work: Work) -> None:
        self._wait(work, "load")
        super()._load(work)

    def _tasks(self) -> Iterator[Task[Any] | None]:
        self._wait(self.work, "tasks")
        yield from super()._tasks()

    def _wait(self, work: Work, where: str) -> None:
        with suppress(FileNotFoundError):
            taken = Path(f"{work.root}/block-{where}").rename(f"{work.root}/blocks-{where}")  # one of several succeeds
            os.open(taken, os.O_RDONLY)


if __name__ == "__main__":
    vars(launch)["run_work"] = partial(run_work, replica=globals()[sys.argv.pop(1)])
    sys.exit(build_dataset.main())
