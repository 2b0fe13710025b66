"""Faults at random moments of a run on a local Ray cluster of several nodes, with its files on S3."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from distributed.files.storage import Folder
from distributed.store.shards import ShardStore
from tests.helpers.s3 import FlakyProxy

ROOT = Path(__file__).parents[2]


@dataclass
class Report:
    """What happened."""

    faults: Counter[str] = field(default_factory=Counter)
    driver_exits: Counter[int] = field(default_factory=Counter)
    terminations_s: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Chaos:
    """Runs one job again and again until it succeeds, and disturbs it meanwhile.

    The next fault comes as soon as the run has committed a share of its shards that was drawn at random, so that faults
    spread over the whole run whatever its speed.

    Args:
        where: the run directory, on S3.
        proxy: in front of the S3 server.
        overrides: configuration of the job.
        seed: of kinds and moments.
    """

    def __init__(self, where: str, proxy: FlakyProxy, overrides: list[str], seed: int) -> None:
        self.random = random.Random(seed)
        self.proxy = proxy
        self.command = [sys.executable, "-m", "jobs.build_dataset", "--out", where, *overrides]
        self.store = ShardStore(Folder(where), "dataset")
        self.report = Report()
        self.cluster = self._start_cluster()
        self.driver: subprocess.Popen[bytes] | None = None
        self.kinds: dict[str, Callable[[], bool]] = {
            "SIGKILL of the driver": lambda: self._end_driver(signal.SIGKILL),
            "SIGTERM to the driver": lambda: self._end_driver(signal.SIGTERM),
            "SIGKILL of a replica": lambda: self._signal_replica(signal.SIGKILL),
            "a replica hangs": lambda: self._signal_replica(signal.SIGSTOP),
            "SIGKILL of a worker's raylet": self._kill_raylet,
            "second driver": self._second_driver,
            "S3 fails": lambda: self._disturb_storage("fail"),
            "S3 hangs": lambda: self._disturb_storage("hang"),
            "loss of the head": self._lose_head,
        }

    def run(self, faults: list[str], shards: int, log: Path, limit_s: float) -> Report:
        """Inject the faults, in random order; returns when the job has succeeded.

        Args:
            faults: kinds, see `kinds`.
            shards: of the plan, about: faults come before so many are committed.
            log: for the drivers' output.
            limit_s: seconds after which the test gives up.
        """
        self.random.shuffle(faults)
        moments = sorted(self.random.randrange(1, int(0.85 * shards)) for _ in faults)
        start = time.monotonic()
        with log.open("ab") as output:
            try:
                while time.monotonic() - start < limit_s:
                    if self.driver is None or self.driver.poll() is not None:
                        if self.driver is not None:
                            self.report.driver_exits[self.driver.returncode] += 1
                            if self.driver.returncode == 0:
                                assert not faults, f"the run ended before {faults}"
                                self.report.seconds = time.monotonic() - start
                                return self.report
                        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address, "PYTHONUNBUFFERED": "1"}
                        self.driver = subprocess.Popen(
                            self.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                        )
                    if faults and len(self.store.committed()) >= moments[0] and self.kinds[faults[0]]():
                        output.write(f"--- {time.monotonic() - start:.0f} s: {faults[0]}\n".encode())
                        output.flush()
                        self.report.faults[faults.pop(0)] += 1
                        moments.pop(0)
                    time.sleep(0.2)
                raise AssertionError(f"not done after {limit_s} s; still to come: {faults}")
            finally:
                self.close()

    def close(self) -> None:
        """End everything that was started."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()

    def _start_cluster(self) -> Cluster:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        return cluster

    def _end_driver(self, number: signal.Signals) -> bool:
        assert self.driver is not None
        if number == signal.SIGTERM and not _catches(self.driver.pid, number):
            return False  # still starting: it would end as any process does, with nothing to commit
        start = time.monotonic()
        self.driver.send_signal(number)
        self.driver.wait(timeout=60)
        if number == signal.SIGTERM:
            self.report.terminations_s.append(time.monotonic() - start)
            assert self.driver.returncode in (130, 0), self.driver.returncode
        return True

    def _replicas(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.worker_nodes:
            for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
                with suppress(psutil.Error):  # gone by now
                    if "MapWorker" in "".join(process.cmdline()[:1]):
                        found.append(process)
        return found

    def _signal_replica(self, number: signal.Signals) -> bool:
        replicas = [one for one in self._replicas() if one.status() != psutil.STATUS_STOPPED]
        if not replicas:
            return False
        self.random.choice(replicas).send_signal(number)
        return True

    def _kill_raylet(self) -> bool:
        if not self._replicas():
            return False
        node = self.random.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
        workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        for worker in workers:  # the machine is gone with all its processes
            if worker.is_running():
                worker.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=1)
        return True

    def _second_driver(self) -> bool:
        done = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        if self.driver is None or self.driver.poll() is not None:
            return False  # it was alone
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "is in use by process" in done.stderr
        return True

    def _disturb_storage(self, mode: str) -> bool:
        threading.Thread(target=self.proxy.disturb, args=(mode, self.random.uniform(3.0, 8.0)), daemon=True).start()
        return True

    def _lose_head(self) -> bool:
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        assert self.driver is not None
        try:
            self.driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.driver.kill()
            self.driver.wait()
        self.cluster = self._start_cluster()
        return True


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(mask, 16) >> (number - 1) & 1)
