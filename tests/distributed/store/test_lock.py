import _thread
import calendar
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import distributed.store.lock as lock_module
from core.errors import ConfigError
from distributed.files.storage import Folder
from distributed.store.lock import RunLock, read_lock
from jobs import build_dataset
from tests.helpers.tiny import run_main, tiny_run

HOLD = (
    "import sys, time\n"
    "from distributed.store.lock import RunLock\n"
    "from distributed.files.storage import Folder\n"
    "with RunLock(Folder(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.2)
    monkeypatch.setattr(lock_module, "STALE_S", 1.5)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, on a clock that sleeping moves."""
    record: list[float] = []
    monkeypatch.setattr(time, "sleep", record.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(record))
    monkeypatch.setattr(lock_module, "BEAT_S", 60.0)
    return record


def test_lock_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"in use by process {process.pid} on {socket.gethostname()}"),
            RunLock(folder),
        ):
            pass
        process.kill()
        process.wait()
    with RunLock(folder):  # its owner is dead: taken over at once
        holder = read_lock(folder)
        assert holder is not None
        assert holder["pid"] == os.getpid()
    assert read_lock(folder) is None


def test_lock_process_that_is_dead_but_not_reaped_does_not_hold(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        time.sleep(0.3)  # a zombie now
        with RunLock(Folder(tmp_path)):
            pass


def foreign(tmp_path: Path, beat: int) -> None:
    content = {"id": "x", "host": "elsewhere", "machine": "other", "pid": 1, "since": "then", "beat": beat}
    Folder(tmp_path).write("lock.json", json.dumps(content).encode())


def test_lock_of_another_machine_without_a_sign_of_life_is_taken_over(tmp_path: Path) -> None:
    foreign(tmp_path, 3)
    start = time.monotonic()
    with RunLock(Folder(tmp_path)):
        assert time.monotonic() - start >= 1.5
        time.sleep(0.6)
        holder = read_lock(Folder(tmp_path))
        assert holder is not None
        assert holder["beat"] >= 1


def test_lock_of_another_machine_that_lives_is_respected(tmp_path: Path) -> None:
    foreign(tmp_path, 3)
    threading.Timer(0.5, foreign, (tmp_path, 4)).start()
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"), RunLock(Folder(tmp_path)):
        pass


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_lock_that_is_lost_interrupts_its_owner_even_in_the_background(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup ... &` leaves it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as the jobs do
    try:
        with pytest.raises(KeyboardInterrupt), RunLock(Folder(run)):  # noqa: PT012
            foreign(run, 1) if how == "taken over" else shutil.rmtree(run)
            time.sleep(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (read_lock(Folder(run)) is not None) == (how == "taken over")  # the other's lock stays
    assert run.exists() == (how == "taken over")  # nothing is made anew
    said = f"another driver has taken over {run}" if how == "taken over" else f"the lock is gone from {run}"
    assert said in caplog.text


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock is far from UTC."""
    with monkeypatch.context() as context:
        context.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_read_lock_says_who_holds_it_and_that_nobody_does(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert read_lock(folder) is None
    with RunLock(folder) as lock:
        holder = read_lock(folder)
        assert lock._thread.daemon  # a driver that dies does not wait for its lock
    assert holder is not None
    assert (holder["host"], holder["pid"], holder["beat"]) == (socket.gethostname(), os.getpid(), 0)
    assert holder["machine"].startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/")
    assert holder["machine"].endswith(f"/{Path('/proc/self/ns/pid').stat().st_ino}")
    assert holder["process_start"] == psutil.Process().create_time()
    assert holder["command"] == " ".join(sys.orig_argv[1:4])
    assert 0 <= time.time() - calendar.timegm(time.strptime(holder["since"], "%Y-%m-%dT%H:%M:%SZ")) < 60
    for strange in (b"not json", b"[1]", b"7"):
        folder.write("lock.json", strange)
        assert read_lock(folder) == {}
    with RunLock(folder):  # nobody's: taken over
        pass


def of_this_machine(tmp_path: Path, **changes: object) -> None:
    process = psutil.Process()
    content = {"id": "x", "machine": lock_module._machine(), "pid": process.pid, "process_start": process.create_time()}
    Folder(tmp_path).write("lock.json", json.dumps(content | changes).encode())


@pytest.mark.parametrize(("seconds", "held"), [(-1.9, True), (1.9, True), (-2.0, False), (2.0, False), (-1e9, False)])
def test_lock_of_a_process_whose_number_was_given_to_another_one_is_taken_over(
    tmp_path: Path, seconds: float, held: bool, slept: list[float]
) -> None:
    """Numbers of processes come again: a start that is two seconds off is another process's."""
    of_this_machine(tmp_path, process_start=psutil.Process().create_time() + seconds)
    if held:
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), RunLock(Folder(tmp_path)):
            pass
    else:
        with RunLock(Folder(tmp_path)):
            assert slept == [1.0]  # it is not watched: its process is known


@pytest.mark.parametrize("strange", [{"pid": None}, {"pid": "x"}, {"process_start": None}, {"pid": 2**22 + 1}])
def test_lock_of_this_machine_without_a_process_is_taken_over(
    tmp_path: Path, strange: dict[str, object], slept: list[float]
) -> None:
    of_this_machine(tmp_path, **strange)
    with RunLock(Folder(tmp_path)):
        assert slept == [1.0]


class Shelf:
    """A folder of one file in memory; an object store unless `local`. What it will answer can be prepared."""

    local: Path | None = None

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.reads: list[bytes | None] = []
        self.reads_after_a_write: list[bytes | None] = []
        self.broken = 0
        self.writes = 0

    def __str__(self) -> str:
        return "the shelf"

    def read(self, name: str) -> bytes:
        assert name == "lock.json"
        answer = self.reads.pop(0) if self.reads else self.content
        if answer is None:
            raise FileNotFoundError(name)
        return answer

    def write(self, name: str, content: bytes) -> None:
        assert name == "lock.json"
        self.writes += 1
        if self.broken:
            self.broken -= 1
            raise OSError("outage")
        self.content = content
        self.reads, self.reads_after_a_write = self.reads_after_a_write, []

    def create(self, name: str, content: bytes) -> bool:
        if self.content is not None:
            return False
        self.write(name, content)
        return True

    def remove(self, name: str) -> None:
        assert name == "lock.json"
        self.content = None


def held_by(name: str, beat: int = 1) -> bytes:
    return json.dumps({"id": name, "machine": "other", "pid": 1, "host": "elsewhere", "beat": beat}).encode()


def lock_on(shelf: Any) -> RunLock:
    return RunLock(shelf)


@pytest.mark.parametrize("now", [held_by("x", 2), held_by("y", 1)], ids=["it beats", "it is another's"])
def test_lock_that_changes_while_it_is_watched_is_respected(now: bytes, slept: list[float]) -> None:
    shelf = Shelf()
    shelf.content = now
    shelf.reads = [held_by("x", 1), held_by("x", 1), held_by("x", 1)]
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"), lock_on(shelf):
        pass
    assert shelf.writes == 0
    assert slept == pytest.approx([0.15] * 3)


@pytest.mark.parametrize(("stale_s", "step"), [(1.5, 0.15), (60.0, 1.0)])
def test_lock_is_watched_for_as_long_as_a_dead_one_must_be_silent(
    stale_s: float, step: float, slept: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock_module, "STALE_S", stale_s)
    shelf = Shelf()
    shelf.content = held_by("x")
    with lock_on(shelf):
        assert slept[-1] == 1.0  # of several who take it over, the last one to write has it
        assert set(slept[:-1]) == {step}
        assert stale_s - 1e-9 <= sum(slept[:-1]) < stale_s + step
    assert shelf.content is None
    assert f"the shelf is locked by process 1 on elsewhere (None) since None; watching for {stale_s:.0f} s" in (
        capsys.readouterr().err
    )


def test_lock_that_is_released_while_it_is_watched_is_taken_at_once(slept: list[float]) -> None:
    shelf = Shelf()
    shelf.content = held_by("x")
    shelf.reads = [held_by("x"), None]
    with lock_on(shelf):
        assert slept == pytest.approx([0.15, 1.0])


def test_lock_that_is_released_between_two_looks_is_taken_without_a_wait(slept: list[float]) -> None:
    shelf = Shelf()
    shelf.local = Path("shelf")
    created: list[bool] = [False, True]
    shelf.create = lambda name, content: created.pop(0)  # type: ignore[method-assign]
    with lock_on(shelf):
        pass
    assert (slept, created) == ([0.0], [])


def test_lock_that_another_one_takes_over_at_the_same_moment_is_watched_again(slept: list[float]) -> None:
    shelf = Shelf()
    shelf.content = held_by("x")
    shelf.reads_after_a_write = [held_by("y", 6), held_by("y", 6), held_by("y", 7)]
    with pytest.raises(ConfigError, match="elsewhere"), lock_on(shelf):
        pass
    assert slept.count(1.0) == 1


def test_lock_of_two_at_once_on_an_object_store_is_the_last_writers(slept: list[float]) -> None:
    shelf = Shelf()
    shelf.reads_after_a_write = [held_by("y", 1), held_by("y", 1), held_by("y", 2)]
    with pytest.raises(ConfigError, match="elsewhere"), lock_on(shelf):
        pass
    assert slept == pytest.approx([1.0, 0.15])


def test_lock_on_an_object_store_is_read_again_once_and_held(slept: list[float]) -> None:
    shelf = Shelf()
    with lock_on(shelf):
        assert slept == [1.0]
        assert shelf.content is not None
    assert shelf.content is None


def test_lock_that_is_anothers_by_now_is_not_removed(slept: list[float]) -> None:
    shelf = Shelf()
    with lock_on(shelf):
        shelf.content = held_by("y")
    assert shelf.content == held_by("y")


def test_lock_beats_on_after_an_outage(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    shelf = Shelf()
    shelf.local = Path("shelf")
    with lock_on(shelf):
        shelf.broken = 2
        end = time.monotonic() + 10
        while shelf.writes < 6 and time.monotonic() < end:
            time.sleep(0.01)
        assert shelf.content is not None
        assert shelf.writes - 3 <= json.loads(shelf.content)["beat"] <= shelf.writes
    assert caplog.text.count("no sign of life in the shelf: outage") == 2


@pytest.mark.parametrize("terminate", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_lock_that_was_taken_over_interrupts_with_the_signal_that_is_handled(
    terminate: Any, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(_thread, "interrupt_main", sent.append)
    monkeypatch.setattr(signal, "getsignal", {signal.SIGTERM: terminate}.__getitem__)
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    shelf = Shelf()
    shelf.local = Path("shelf")
    with lock_on(shelf) as lock:
        shelf.write = lambda name, content: None  # type: ignore[method-assign]
        shelf.content = held_by("y")
        lock._thread.join(10)
        assert not lock._thread.is_alive()
    assert sent == [signal.SIGTERM if callable(terminate) else signal.SIGINT]
    assert shelf.content == held_by("y")


def test_lock_refuses_a_second_job_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    with RunLock(run.folder):
        assert run_main(build_dataset, "--out", str(tmp_path), "compute.executor=local") == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "dataset").exists()
