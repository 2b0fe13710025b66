"""A replica that hangs is noticed, named, ended and replaced; a run says what it waits for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import psutil
import pytest

import distributed.execution.watch as watch_module
from core.config import ComputeConfig
from core.errors import ModelError
from distributed.execution.watch import Board, Seen, Sign, Watch
from distributed.files.storage import Folder
from distributed.store.lock import RunLock
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import build_dataset
from jobs.status import show
from tests.helpers.tiny import tiny_run

ROOT = Path(__file__).parents[3]
SIGN = Sign("a", "r", "host", "node", 7, "working", 5, {3: 1.0})
LOADING, STARTING = (replace(SIGN, stage=stage, shards={}) for stage in ("loading", "starting"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_board_silence_is_time_without_progress_and_idle_replicas_need_only_sign(clock: list[float]) -> None:
    board = Board()

    def after(seconds: float, sign: Sign) -> tuple[float, float]:
        clock[0] += seconds
        board.sign(sign)
        (seen,) = board.look()
        assert seen.sign is sign
        return seen.stage_s, seen.silent_s

    loading = replace(LOADING, progress=0)
    assert after(0, loading) == (0, 0)
    assert after(30, loading) == (30, 30)
    assert after(10, replace(loading, progress=1)) == (40, 0)
    assert after(5, replace(loading, replica="s")) == (0, 0)  # Ray has started it again
    assert after(5, SIGN) == (0, 0)
    assert after(20, SIGN) == (20, 20)  # it signs, and nothing moves
    assert after(1, replace(SIGN, progress=6)) == (21, 0)
    idle = replace(SIGN, progress=6, shards={})
    assert after(9, idle) == (30, 0)
    clock[0] += 8
    assert board.look()[0].silent_s == 8  # and then it no longer signs
    board.ended("a")
    board.sign(replace(idle, progress=7))  # its last words
    assert (board.look()[0].sign.stage, board.look()[0].silent_s) == ("starting", 0)
    assert after(5, replace(loading, replica="t")) == (0, 0)


class Fake(Board):
    """Replicas as told."""

    def __init__(self, *seen: Seen, mortal: bool = True) -> None:
        self.seen, self.mortal, self.victims = list(seen), mortal, list[Seen]()

    def look(self) -> list[Seen]:
        return self.seen

    def end(self, seen: Seen) -> bool:
        self.victims.append(seen)
        return self.mortal

    def room(self) -> str:
        return "no node with a GPU yet"


SILENT = "with shard 3 is silent for 1:10"


@pytest.mark.parametrize(
    ("seen", "hang_s", "ended", "logged", "waits_for"),
    [
        ([], 1200, 0, "", "1:40: no node with a GPU yet"),
        ([Seen(SIGN, 500, 1)], 1200, 0, "", "1 replicas are at work"),
        ([Seen(LOADING, 50, 50)], 1200, 0, "", "1 replicas load or measure, for 0:50"),
        ([Seen(STARTING, 90, 90)], 1200, 0, "", "1 replicas start again, for 1:30; no node with a GPU yet"),
        ([Seen(STARTING, 1201, 1201)], 1200, 1, "", "start again"),
        (
            [Seen(SIGN, 500, 70), Seen(SIGN, 500, 1)],
            1200,
            0,
            rf"dataset: replica r on host .* {SILENT}",
            f"{SILENT}; 1 replicas are at work",
        ),
        ([Seen(SIGN, 5000, 1201)], 1200, 1, r"has hung for 20:01 \(compute.hang_s=1200\) and was ended", "silent"),
        ([Seen(SIGN, 5000, 5000)], 0, 0, "is silent for 1:23:20", "silent"),
        ([Seen(replace(SIGN, shards={3: 101.0}), 500, 1)], 1200, 0, r"takes 1:41 for shard 3, the slowest so far", ""),
        ([Seen(replace(SIGN, shards={3: 99.0}), 500, 1)], 1200, 0, "", ""),
    ],
)
def test_watch_says_what_is_waited_for_and_ends_what_hangs(
    seen: list[Seen],
    hang_s: float,
    ended: int,
    logged: str,
    waits_for: str,
    clock: list[float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = Fake(*seen)
    watch = Watch("dataset", ComputeConfig(hang_s=hang_s), fake, 2)
    if "slowest" in logged or not waits_for:
        watch.committed(10.0)
        clock[0] += 30
    else:
        clock[0] += 100
    for _ in range(2):  # the second time it has been said
        watch.check()
    assert len(fake.victims) == 2 * ended
    assert len(caplog.records) == (2 * bool(logged) if ended else bool(logged))
    assert re.search(logged, caplog.text)
    printed = capsys.readouterr().out
    assert printed.count("no shard of dataset committed for 1:40: ") == bool(waits_for)
    assert waits_for in printed
    said = json.loads(RunLock(Folder(tmp_path))._content())["waits_for"]
    assert said == printed.strip()
    watch.committed(1.0)
    assert not json.loads(RunLock(Folder(tmp_path))._content())["waits_for"]


def test_watch_without_anything_to_end_says_so_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch("dataset", ComputeConfig(hang_s=100), Fake(Seen(SIGN, 500, 101), mortal=False), 1)
    watch.check()
    watch.check()
    (record,) = caplog.records
    assert "has hung for 1:41 (compute.hang_s=100); nothing ends it but the end of this process" in record.message


@pytest.mark.parametrize("handler", [signal.default_int_handler, lambda number, frame: sys.exit(number)])
def test_watch_of_replicas_that_hang_again_and_again_ends_the_step(
    handler: Callable[[int, FrameType | None], Any],
) -> None:
    watch = Watch("dataset", ComputeConfig(hang_s=100, max_attempts=3), Fake(Seen(SIGN, 500, 101)), 2)

    def step() -> None:
        with watch:
            for _ in range(5):
                watch.check()
            assert watch.failure is None
            watch.committed(1.0)
            for _ in range(6):
                watch.check()
            time.sleep(5)  # the main thread is interrupted

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(ModelError, match=r"6 replicas of dataset have hung in a row .* raise compute.hang_s"):
            step()
    finally:
        signal.signal(signal.SIGTERM, before)


class Job:
    """`jobs.build_dataset` as a process with a Ray of its own, and replicas of `tests.helpers.replicas`."""

    def __init__(self, run: RunDirectory, log: Path, kind: str, *overrides: str) -> None:
        self.run, self.log, self.store = run, log, ShardStore(run.path, "dataset")
        command = [sys.executable, "-m", "tests.helpers.replicas", kind, "--out", str(run.path), *overrides]
        self.began = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text()

    def replicas(self) -> dict[int, psutil.Process]:
        """Their processes."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {one.pid: one for one in found if "MapWorker" in "".join(one.cmdline()[:1])}

    def wait(self, until: Callable[[], object], what: str, limit_s: float = 400.0) -> None:
        """Until something holds; says when it did."""
        deadline = time.monotonic() + limit_s
        while not until():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"not after {limit_s} s: {what}\n{self.said()}"
            time.sleep(0.5)
        self.tell(what)

    def tell(self, what: str) -> None:
        """What happened, and when."""
        print(f"{time.monotonic() - self.began:5.0f} s: {what}", flush=True)


@contextmanager
def job_on(tmp_path: Path, kind: str, *overrides: str) -> Iterator[Job]:
    """A job that must end well, with the rows of an undisturbed run."""
    work = "compute.shard_examples=1"
    run = tiny_run(tmp_path / "run", work)
    replicas = ("compute.min_replicas=2", "compute.max_replicas=2", *overrides)
    for name in ("load", "tasks"):
        if kind == "Blocks":
            os.mkfifo(run.path / f"block-{name}")
    job = Job(run, tmp_path / "log", kind, *replicas)
    try:
        yield job
        job.process.wait(timeout=600)
        job.tell(f"the job ended with {job.process.returncode}\n{job.said()}")
    finally:
        job.process.kill()
        job.process.wait()
    assert job.process.returncode == 0
    undisturbed = tiny_run(tmp_path / "local", "compute.executor=local", work)
    build_dataset.run(undisturbed)
    assert job.store.read().equals(ShardStore(undisturbed.path, "dataset").read())


@pytest.mark.slow
def test_build_dataset_replicas_stopped_for_good_are_named_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with job_on(tmp_path, "Slow", "compute.hang_s=60") as job:
        begun = job.run.path / "attempts" / "dataset"

        def both_at_work() -> bool:
            """And have signed so: one that is stopped earlier is said to load."""
            shards = Counter(file.name for file in begun.glob("*/[!.]*"))
            return len(shards) == 2 and min(shards.values()) > 2

        job.wait(both_at_work, "both replicas are at work")
        first, second = job.replicas().values()
        first.send_signal(signal.SIGSTOP)
        job.tell("one of two is stopped for good")
        job.wait(lambda: re.search(rf"\(process {first.pid}\).* is silent", job.said()), "it is named")
        job.wait(lambda: not first.is_running(), "it is ended")
        job.wait(lambda: len(job.replicas()) == 2, "another one starts")
        third = next(one for pid, one in job.replicas().items() if pid != second.pid)
        second.send_signal(signal.SIGSTOP)
        third.send_signal(signal.SIGSTOP)
        job.tell("the other one and the new one are stopped for good")

        def status_says_so() -> bool:
            capsys.readouterr()
            show(RunDirectory(job.run.path, None))
            return f"(process {second.pid})" in (said := capsys.readouterr().out) and "silent" in said

        job.wait(status_says_so, "jobs.status says so")
        job.wait(lambda: not second.is_running() and not third.is_running(), "both are ended")
    assert RunDirectory(job.run.path, None).manifest["steps"]["build_dataset"]["retries"] >= 2
    hung = rf"replica \w+ on \S+ \(process {first.pid}\)( with shard [\d, ]+)? has hung for 1:\d\d"
    assert re.search(hung, job.said())
    assert "no shard of dataset committed for 0:" in job.said()


@pytest.mark.slow
def test_build_dataset_replicas_whose_files_never_come_are_replaced(tmp_path: Path) -> None:
    with job_on(tmp_path, "Blocks", "compute.hang_s=60") as job:
        pass
    assert re.search(r"\(process \d+, loading\) has hung for", job.said())
    assert re.search(r"\(process \d+\) with shard [\d, ]+ has hung for", job.said())
    assert {file.name for file in job.run.path.glob("block*")} == {"blocks-load", "blocks-tasks"}
