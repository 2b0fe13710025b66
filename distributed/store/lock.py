"""One driver at a time on a run directory, and a lock whose owner is gone is recognised.

The lock saves work, not correctness: shards of two drivers would be the same files with the same rows.
"""

import _thread
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

import psutil

from core.errors import ConfigError
from distributed.files.storage import Folder

__all__ = ["RunLock", "interrupt", "read_lock", "waits_for"]

_log = logging.getLogger(__name__)
_NAME = "lock.json"

BEAT_S = 10.0
"""Seconds between two signs of life."""

STALE_S = 60.0
"""How long a lock of another machine must show no sign of life before it is taken over. Watched with our own clock:
clocks of machines differ."""


_waits_for = ""


def waits_for(text: str) -> None:
    """Say in the locks of this process, at their next sign of life, what it waits for; empty: nothing."""
    global _waits_for
    _waits_for = text


def interrupt() -> None:
    """Interrupt the main thread. In a shell's background SIGINT is ignored; the jobs' SIGTERM is not."""
    _thread.interrupt_main(signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else signal.SIGINT)


def read_lock(folder: Folder) -> dict[str, Any] | None:
    """Who holds the lock (host, pid, since, beat, command, waits_for), or None."""
    try:
        return dict(json.loads(folder.read(_NAME)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}  # of nobody we know: stale unless it changes


class RunLock:
    """Context manager that holds the lock of a run directory.

    On this machine a holder is known to be alive or dead by its process; on another one, by its signs of life. If the
    lock is lost to another driver (after an outage longer than `STALE_S`), the main thread is interrupted.

    Raises:
        ConfigError: when somebody else is at work, with host, process and since when.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._id = uuid.uuid4().hex
        self._beat = 0
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)

    def __enter__(self) -> Self:
        while not self._folder.create(_NAME, self._content()):
            holder = read_lock(self._folder)
            if holder is None:
                continue  # released in this moment
            self._wait_until_stale(holder)
            if self._take():
                break
        else:
            if self._folder.local is None and not self._still_mine(after_s=1.0):
                return self.__enter__()  # two at once on an object store: the other one wrote last
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        if self._still_mine():
            self._folder.remove(_NAME)

    def _content(self) -> bytes:
        return json.dumps(
            {
                "id": self._id,
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "process_start": psutil.Process().create_time(),
                "since": self._since,
                "beat": self._beat,
                "command": " ".join(sys.orig_argv[1:4]),
                "waits_for": _waits_for,
            }
        ).encode()

    def _wait_until_stale(self, holder: dict[str, Any]) -> None:
        if holder.get("machine") == _machine():
            if _alive(holder):
                raise _refusal(self._folder, holder)
            _log.warning("the lock of process %s, which is gone, is taken over", holder.get("pid"))
            return
        print(
            f"{self._folder} is locked by {_describe(holder)}; watching for {STALE_S:.0f} s whether it is alive",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_S / 10))
            now = read_lock(self._folder)
            if now is None:
                return
            if (now.get("id"), now.get("beat")) != (holder.get("id"), holder.get("beat")):
                raise _refusal(self._folder, now)

    def _take(self) -> bool:
        """Replace a stale lock; of several who do, the last one to write has it."""
        self._folder.write(_NAME, self._content())
        return self._still_mine(after_s=1.0)

    def _still_mine(self, after_s: float = 0.0) -> bool:
        time.sleep(after_s)
        holder = read_lock(self._folder)
        return holder is not None and holder.get("id") == self._id

    def _live(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                if not self._still_mine():
                    gone = read_lock(self._folder) is None
                    _log.error("the lock is gone from %s" if gone else "another driver has taken over %s", self._folder)
                    interrupt()
                    return
                self._beat += 1
                self._folder.write(_NAME, self._content())
            except OSError as error:  # an outage; the next beat tries again
                _log.warning("no sign of life in %s: %s", self._folder, error)


def _machine() -> str:
    """This boot of this machine, and the process ids that are valid in it (a container has its own)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{known}/{namespace.stat().st_ino if namespace.exists() else 0}"


def _alive(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["process_start"])) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')}) since {holder.get('since')}"


def _refusal(folder: Folder, holder: dict[str, Any]) -> ConfigError:
    return ConfigError(f"{str(folder)!r} is in use by {_describe(holder)}; wait for it, stop it, or use another --out")
