"""Nodes come by the demand of the pool of replicas and go after its end, with both of Ray's autoscalers."""

import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from core.data import load_dataset
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import build_dataset
from tests.helpers.autoscaling import autoscaling_cluster, workers_alive
from tests.helpers.tiny import tiny_run

ROOT = Path(__file__).parents[3]
NODES = 3
LIMIT_S = 600.0  # 100 s on two idle cores, 310 s at a load of 20
KINDS = {
    "cpu": (
        ["jobs.build_dataset", "compute.device=cpu"],
        ("labels.num_estimation=3500", "compute.shard_examples=auto", "compute.shard_seconds=2"),
    ),
    "gpu": (["tests.helpers.replicas", "Slow", "compute.device=cuda"], ("compute.shard_examples=2",)),
}
"""The job and its work: a minute of one core in shards of two seconds; 49 shards that sleep for four each."""


class Sample(NamedTuple):
    """What there is at a moment: nodes beside the head, replicas that have begun a shard so far, committed shards."""

    seconds: float
    nodes: int
    replicas: int
    shards: int


def time_line(samples: list[Sample], ended: float) -> str:
    """The samples where nodes or replicas change, and one every ten seconds."""
    kept = [next(group) for _, group in groupby(samples, key=lambda one: (one.nodes, one.replicas, one.seconds // 10))]
    lines = [f"{one.seconds:5.0f} s: {one.nodes} nodes, {one.replicas} replicas, {one.shards} shards" for one in kept]
    return "\n".join([*lines, f"the job ended at {ended:.0f} s"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("autoscaler", ["v1", "v2"])
def test_build_dataset_nodes_come_by_demand_and_go_after_the_end(
    autoscaler: Literal["v1", "v2"], kind: str, tmp_path: Path
) -> None:
    (module, *arguments), work = KINDS[kind]
    run = tiny_run(tmp_path / "run", *work)
    store = ShardStore(run.path, "dataset")
    command = [sys.executable, "-m", module, *arguments[:-1], "--out", str(run.path), arguments[-1]]
    command += ["compute.min_replicas=1", f"compute.max_replicas={NODES}"]
    samples: list[Sample] = []
    replicas: set[str] = set()
    log, ended = tmp_path / "driver.log", None
    with (
        autoscaling_cluster(
            autoscaler, NODES, idle_s=10.0, log=tmp_path / "autoscaler.log", gpus=int(kind == "gpu")
        ) as address,
        workers_alive(address, LIMIT_S) as alive,
        log.open("wb") as output,
    ):
        assert next(alive) == 0, "nodes without demand"
        environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for nodes in alive:
                replicas |= {file.name for file in (run.path / "attempts/dataset").glob("*/[!.]*")}
                samples.append(Sample(time.monotonic() - start, nodes, len(replicas), len(store.committed())))
                if ended is None and job.poll() is not None:
                    ended = samples[-1].seconds
                if ended is not None and nodes == 0:
                    break
        finally:
            if job.poll() is None:
                job.kill()
                job.wait()
            print(f"\nautoscaler {autoscaler}, {kind}\n{time_line(samples, ended or -1.0)}\n{log.read_text()}")
    assert job.returncode == 0
    assert samples[0].nodes == samples[-1].nodes == 0
    assert 2 <= max(one.nodes for one in samples) <= NODES
    assert len(replicas) >= 2, "the nodes stood idle"
    assert "will not allow it to scale up" not in log.read_text()
    plan = store.read_plan()
    assert plan is not None
    verified = store.verify(plan, load_dataset(run.config.dataset, "train").example_ids, run.config.sigmas)
    assert (verified.rows, verified.error_rows) == (97 * 2, 0)
    undisturbed = tiny_run(tmp_path / "local", "compute.executor=local", *work)
    build_dataset.run(undisturbed)
    assert store.read().equals(ShardStore(undisturbed.path, "dataset").read())  # every column of every row
    assert RunDirectory(run.path, None).manifest["steps"]["build_dataset"]["retries"] == 0
