"""What Ray, shards and commits cost: replicas on Ray against as many bare engines in processes of their own.

    python -m bench.overhead [--replicas 2] [--rounds 3] [--shard-seconds 4]

With as many replicas as cores, what Ray's own processes compute is missing to the replicas; with one fewer it is not.

Both sides run the same certificates of the digits (networks of the demo's architecture) on one thread each. Bare: the
engine's rows per second, nothing committed. Ray: rows of the shards that are committed between the end of start-up and
the first idle replica. Rounds alternate; the median of the paired ratios is printed.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from core.config import parse_config
from core.models.checkpoints import build_denoiser
from core.models.denoiser import small_unet_config
from core.models.small import SmallConvNet
from distributed.datasets import load_dataset
from distributed.launch import certify_store, work_of
from distributed.run_directory import RunDirectory
from distributed.shards import ShardStore
from distributed.work import Work, build_engine, make_task, procedures


def prepare(folder: Path, shard_seconds: float, replicas: int) -> RunDirectory:
    """A run directory with random networks."""
    plain = {
        "sigmas": [0.12, 0.25, 0.5],
        "labels": {"num_selection": 100, "num_estimation": 300},
        "compute": {
            "batch_size": 500,
            "shard_seconds": shard_seconds,
            "part_rows": 1,
            "progress_interval_s": 1e9,
            "min_replicas": replicas,
            "max_replicas": replicas,
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


def bare(work: Work, seconds: float, barrier: Any, rates: Any) -> None:
    """Rows per second of an engine alone."""
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
            if engine.rows_run > 20 * engine.batch_size:  # warm
                start, rows = now, engine.rows_run
        elif now - start > seconds:
            rates.put((engine.rows_run - rows) / (now - start))
            return


def bare_engines(work: Work, seconds: float, num: int) -> float:
    """Sum of processes that run at once."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(num), context.Queue()
    processes = [context.Process(target=bare, args=(work, seconds, barrier, rates)) for _ in range(num)]
    for process in processes:
        process.start()
    total = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def on_ray(run: RunDirectory, work: Work) -> float:
    """Rows per second between the first commits and the last shards that both replicas are busy with."""
    store = ShardStore(run.folder, "dataset")
    certify_store(run, "dataset")
    plan = store.read_plan()
    assert plan is not None
    commits = [(moment, int(plan.sizes[list(shards)].sum())) for moment, shards in store.commits()]
    inner = commits[2 : -2 * work.config.compute.max_replicas - 8]
    return sum(examples for _, examples in inner[1:]) * work.draws_per_example / (inner[-1][0] - inner[0][0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-seconds", type=float, default=4.0)
    args = parser.parse_args()
    ratios = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(Path(folder), args.shard_seconds, args.replicas)
            work, _ = work_of(run, "dataset")
            work = Work(**{**vars(work), "device": "cpu"})
            before = bare_engines(work, 20.0, args.replicas)
            ray = on_ray(run, work)
            after = bare_engines(work, 20.0, args.replicas)
            ratios.append(ray / ((before + after) / 2))
            print(
                f"round {number}: bare {before:,.0f} and {after:,.0f} rows/s, replicas {ray:,.0f} rows/s,"
                f" ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
