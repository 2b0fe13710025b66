import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import distributed.store.lock as lock_module
from core.errors import ConfigError
from distributed.files.storage import Folder
from distributed.store.lock import RunLock, read_lock
from tests.helpers.tiny import tiny_run

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


def test_lock_garbage_in_the_file_is_stale(tmp_path: Path) -> None:
    Folder(tmp_path).write("lock.json", b"not json")
    with RunLock(Folder(tmp_path)):
        pass


def test_lock_refuses_a_second_job_with_exit_code_2(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with RunLock(run.folder):
        command = [sys.executable, "-m", "jobs.build_dataset", "--out", str(tmp_path), "compute.executor=local"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"is in use by process {os.getpid()}" in done.stderr
    assert not (tmp_path / "dataset").exists()
