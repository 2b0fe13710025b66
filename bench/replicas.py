"""Two replicas on Ray against one, on the same machine: with everything that Ray, shards and commits take.

Each turn certifies the digits (networks of the demo's architecture, random weights, a thread to a replica) for long
enough that starting and ending do not show: what counts is the time between the first commits and the last shards that
all replicas are busy with. Beside it, what the machine gives two bare engines in processes of their own over one: two
replicas cannot do better, and where they have as many cores as there are, what Ray's own processes compute is missing.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.settings import Settings
from bench.timing import Line, spread
from core.config import parse_config
from core.models.checkpoints import build_denoiser
from core.models.denoiser import small_unet_config
from core.models.small import SmallConvNet
from distributed.cluster import connected
from distributed.datasets import load_dataset
from distributed.launch import certify_store, work_of
from distributed.run_directory import RunDirectory
from distributed.shards import ShardStore
from distributed.work import Work, build_engine, make_task, procedures

__all__ = ["replicas"]


def replicas(settings: Settings) -> list[Line]:
    """Rates with two over rates with one: of bare engines, and of replicas on Ray."""
    turns, most = min(settings.turns, 2), 2
    bare: dict[int, list[float]] = {1: [], most: []}
    on_ray: dict[int, list[float]] = {1: [], most: []}
    with tempfile.TemporaryDirectory() as folder:
        run = _prepare(Path(folder) / "bare", most, settings.tiny)
        work = replace(work_of(run, "dataset")[0], device="cpu")
        with connected(run.config.compute):
            for turn in range(turns):
                for num in np.random.default_rng(turn).permutation([1, most]).tolist():
                    on_ray[num].append(_on_ray(Path(folder) / f"{num}-{turn}", num, settings.tiny))
        for turn in range(turns):  # when Ray is gone
            for num in np.random.default_rng(turn).permutation([1, most]).tolist():
                bare[num].append(_bare_engines(work, 0.2 if settings.tiny else 5.0, num))

    def line(what: str, ours: list[float], theirs: list[float], wanted: str = "") -> Line:
        return Line("replicas", what, spread([a / b for a, b in zip(ours, theirs, strict=True)]), wanted=wanted)

    return [
        line("2 replicas on Ray / 1: rows per second", on_ray[2], on_ray[1], ">= 1.9"),
        line("2 bare engines / 1: rows per second", bare[2], bare[1]),
        line("1 replica on Ray / 1 bare engine", on_ray[1], bare[1]),
        line("2 replicas on Ray / 2 bare engines", on_ray[2], bare[2]),
    ]


def _prepare(folder: Path, num: int, tiny: bool) -> RunDirectory:
    """A run directory with random networks."""
    plain = {
        "sigmas": [0.12, 0.25, 0.5],
        "labels": {"num_selection": 10, "num_estimation": 10} if tiny else {"num_estimation": 40 + 100 * num},
        "dataset": {"test_size": 1700 if tiny else 1000},
        "compute": {
            "batch_size": 100 if tiny else 1000,
            "shard_seconds": 0.01 if tiny else 1.0,
            "part_rows": 1,
            "progress_interval_s": 1e9,
            "min_replicas": num,
            "max_replicas": num,
        },
        "report": {"radii": [0.0]},
    }
    run = RunDirectory(folder, parse_config(plain))
    torch.manual_seed(0)
    wrote = {
        "denoiser": run.save_model("denoiser", build_denoiser(small_unet_config(1, 8))),
        "classifier": run.save_model("classifier", SmallConvNet(1, 8, 10)),
    }
    run.finish("train_base", read={}, wrote=wrote, facts={})
    return run


def _on_ray(folder: Path, num: int, tiny: bool) -> float:
    """Rows per second between the first commits and the last shards that all replicas are busy with."""
    run = _prepare(folder, num, tiny)
    work, store = work_of(run, "dataset")[0], ShardStore(run.folder, "dataset")
    certify_store(run, "dataset")
    plan = store.read_plan()
    assert plan is not None
    commits = [(moment, int(plan.sizes[list(shards)].sum())) for moment, shards in store.commits()]
    inner = commits[2 * num : -10 * num]  # the last shards are smaller, and at the very end a replica has none
    return sum(examples for _, examples in inner[1:]) * work.draws_per_example / (inner[-1][0] - inner[0][0])


def _bare_engines(work: Work, seconds: float, num: int) -> float:
    """Rows per second of processes that run at once, in sum."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(num), context.Queue()
    processes = [context.Process(target=_bare, args=(work, seconds, barrier, rates)) for _ in range(num)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=seconds + 120) for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def _bare(work: Work, seconds: float, barrier: Any, rates: Any) -> None:
    data = load_dataset(work.config.dataset, work.split)
    engine = build_engine(work, data.num_classes)

    def tasks() -> Iterator[Any]:
        for number in count():
            for procedure in procedures(work):
                yield make_task(number, data, number % len(data), procedure)

    start, rows = None, 0
    barrier.wait()
    for _ in engine.run(tasks()):
        now = time.perf_counter()
        if start is None:
            if engine.rows_run > 5 * engine.batch_size:  # warm
                start, rows = now, engine.rows_run
        elif now - start > seconds:
            rates.put((engine.rows_run - rows) / (now - start))
            return
