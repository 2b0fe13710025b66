"""Two replicas on Ray against one, on the same machine: with everything that Ray, shards and commits take.

Two replicas certify the digits (networks of the demo's architecture, random weights, a thread to a replica); on CUDA,
with half a GPU each, random images with CIFAR-10's published networks. In every other window of some seconds one of
them is stopped by a signal, so that both sides are measured in one run, seconds apart. Beside it, the same with two
bare engines in processes of their own: what the machine has to give, and so how busy the replicas are. Where there are
as many replicas as cores, what Ray's own processes compute is missing; it is measured too.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bench.pairs import cifar, digits, larger
from bench.settings import Settings
from bench.timing import Line, Spread, spread
from core.config import parse_config
from distributed.cluster.cluster import connected
from distributed.execution.launch import certify_store, work_of
from distributed.execution.work import Work, build_engine, make_task
from distributed.files.datasets import load_dataset
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["replicas"]


def replicas(settings: Settings) -> list[Line]:
    """Rates with two over rates with one: of replicas on Ray, and of bare engines; and what Ray takes."""
    window, turns = (0.5, 1) if settings.tiny else (5.0, min(settings.turns, 2))
    on_ray, bare, cores = [], [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            run = _prepare(Path(folder), settings)
            with connected(run.config.compute):
                rates, taken = _on_ray(run, window)
            on_ray.append(rates)
            cores.append(taken)
            work = replace(work_of(run, "dataset")[0], device=settings.device)
            bare.append(_bare_engines(work, window))
    what, wanted = ("half-GPU replicas", "") if settings.device == "cuda" else ("replicas", ">= 1.9")
    busy = [ours.two / theirs.two for ours, theirs in zip(on_ray, bare, strict=True)]
    return [
        Line("replicas", f"2 {what} on Ray / 1: rows per second", _gain(on_ray), wanted=wanted),
        Line("replicas", "2 bare engines / 1: rows per second", _gain(bare)),
        Line("replicas", f"2 {what} on Ray / 2 bare engines: rows per second, the busy share", spread(busy)),
        Line("replicas", "Ray's own processes and the driver beside 2 replicas", spread(cores), unit="cores"),
    ]


@dataclass(frozen=True)
class _Rates:
    """Rows per second of two workers, and of one of them alone."""

    two: float
    one: float


def _gain(rates: Sequence[_Rates]) -> Spread:
    return spread([each.two / each.one for each in rates])


def _prepare(folder: Path, settings: Settings) -> RunDirectory:
    """A run directory with random networks, and work for about two minutes."""
    tiny, on_gpu = settings.tiny, settings.device == "cuda"
    pair = digits() if not on_gpu else larger() if tiny else cifar()
    plain: dict[str, Any] = {
        "sigmas": list(pair.sigmas),
        "labels": {"num_selection": 10, "num_estimation": 200} if tiny else {"num_estimation": 2000},
        "compute": {
            "device": settings.device,
            "batch_size": 100 if tiny else 1000,
            "shard_seconds": 0.1 if tiny else 1.0,
            "part_rows": 1,
            "progress_interval_s": 1e9,
            "min_replicas": 2,
            "max_replicas": 2,
        },
        "dataset": {"test_size": 1000},
        "report": {"radii": [0.0]},
    }
    if on_gpu:
        way = settings.forward
        compute = {"precision": way.precision, "channels_last": way.channels_last, "compile": way.compile}
        images = np.random.default_rng(0).integers(0, 256, (1000, *pair.shape[1:], pair.shape[0]), np.uint8)
        labels = np.arange(len(images)) % pair.num_classes
        np.savez(folder / "images.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
        plain["labels"] = {"num_selection": 100, "num_estimation": 100}
        plain["compute"] |= {**compute, "gpus_per_replica": 0.5, "batch_size": 256}  # fits beside the other one
        plain["dataset"] = {"name": "npz", "path": str(folder / "images.npz"), "color": "rgb"}
    run = RunDirectory(folder / "run", parse_config(plain))
    assert pair.denoiser is not None
    wrote = {
        "denoiser": run.save_model("denoiser", pair.denoiser),
        "classifier": run.save_model("classifier", pair.classifier),
    }
    run.finish("train_base", read={}, wrote=wrote, facts={})
    return run


@contextmanager
def _stopped(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def _rates(workers: Sequence[int], window: float, go_on: Callable[[], bool], rows: Callable[[], int]) -> _Rates:
    """Rows per second of both workers and of one, in windows that take turns.

    What is under way when a window ends is counted in the next one, as often to the one side as to the other.

    Args:
        workers: processes.
        window: seconds.
        go_on: whether there is work for another window.
        rows: that are done.
    """
    done, took = {True: 0, False: 0}, {True: 0.0, False: 0.0}

    def wait(both: bool) -> None:
        begin, before = time.monotonic(), rows()
        time.sleep(window)
        if go_on():
            done[both] += rows() - before
            took[both] += time.monotonic() - begin

    turn = 0
    while go_on():
        wait(both=True)
        with _stopped(workers[turn % 2]):
            wait(both=False)
        turn += 1
    if not done[False]:
        raise RuntimeError("the work ended before there was a window with one worker: give this machine more of it")
    return _Rates(done[True] / took[True], done[False] / took[False])


def _on_ray(run: RunDirectory, window: float) -> tuple[_Rates, float]:
    """The rates, and the cores that Ray and the driver take while both replicas run."""
    store, ended = ShardStore(run.folder, "dataset"), threading.Event()
    rows_per_example = work_of(run, "dataset")[0].draws_per_example

    def watch() -> tuple[_Rates, float]:
        while (plan := store.read_plan()) is None and not ended.is_set():
            time.sleep(0.2)
        sizes = np.zeros(0, np.int64) if plan is None else plan.sizes

        def goes_on(share: float) -> bool:
            """Whether less than a share of the shards is committed."""
            return len(store.committed()) < share * len(sizes) and not ended.is_set()

        while goes_on(0.1):  # until both have loaded and are warm
            time.sleep(0.2)
        family = _family()
        workers = [process for process, name in family.items() if name.startswith("ray::MapWorker")]
        others = family.keys() - set(workers)
        begin, before = time.monotonic(), sum(map(_cpu_seconds, others))
        time.sleep(2 * window)
        cores = (sum(map(_cpu_seconds, others)) - before) / (time.monotonic() - begin)

        def rows() -> int:
            return int(sizes[list(store.committed())].sum()) * rows_per_example

        # The last shards are smaller, and at the very end a replica has none.
        return _rates(workers, window, lambda: goes_on(0.85), rows), cores

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            certify_store(run, "dataset")
        finally:
            ended.set()
        return watching.result()


def _family() -> dict[int, str]:
    """This process and all that descend from it, with their names; of Linux."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    ours, found = {os.getpid()}, {os.getpid()}
    while found:
        found = {process for process, parent in parents.items() if parent in ours and process not in ours}
        ours |= found
    return {process: names.get(process, "") for process in ours}


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bare_engines(work: Work, window: float) -> _Rates:
    """The rates of two engines without Ray."""
    context = multiprocessing.get_context("spawn")
    rows = [context.Value("q", 0) for _ in range(2)]
    processes = [context.Process(target=_bare, args=(work, counter), daemon=True) for counter in rows]
    for process in processes:
        process.start()
    try:
        while min(counter.value for counter in rows) < 5 * 1000:  # warm
            if not all(process.is_alive() for process in processes):
                raise RuntimeError("a bare engine has ended: its error is above")
            time.sleep(0.1)
        pids, end = [int(process.pid or 0) for process in processes], time.monotonic() + 20 * window
        return _rates(pids, window, lambda: time.monotonic() < end, lambda: sum(counter.value for counter in rows))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _bare(work: Work, counter: Any) -> None:
    data = load_dataset(work.config.dataset, work.split)
    engine = build_engine(work, data.num_classes)

    def tasks() -> Iterator[Any]:
        for number in count():
            for procedure in work.method.procedures(work.terms):
                yield make_task(number, data, number % len(data), procedure)

    for _ in engine.run(tasks()):
        counter.value = engine.rows_run
