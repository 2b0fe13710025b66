"""The demo at full size, killed and started again; and the engine on a CUDA device. Not part of the quick suite."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core.machine.engine import Engine, Task
from core.machine.network import Head, Network
from core.machine.noise import GaussianNoise
from core.models.small import SmallConvNet
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Sampling
from distributed.store.shards import ShardStore

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_demo_killed_while_building_the_dataset_ends_with_the_counts_of_an_undisturbed_run(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}

    def demo(name: str) -> list[str]:
        return [sys.executable, "-m", "jobs.pipeline", "--config", "configs/digits.yaml", "--out", str(tmp_path / name)]

    store = ShardStore(tmp_path / "killed", "dataset")
    with subprocess.Popen(demo("killed"), cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + 300
        while len(store.committed()) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert 8 <= len(store.committed()) < 33
    for name in ("killed", "whole"):
        subprocess.run(demo(name), cwd=ROOT, env=environment, check=True)
    for folder, rows in (("dataset", 1297 * 3), ("certificates/standard", 1500), ("certificates/dual", 500)):
        one, two = (ShardStore(tmp_path / name, folder).read() for name in ("killed", "whole"))
        assert one.num_rows == rows
        assert one.equals(two)


@pytest.mark.gpu
def test_engine_on_cuda_does_not_depend_on_order_or_window() -> None:
    torch.manual_seed(0)
    network = Network({CLASSIFIER: Head(SmallConvNet(1, 8, 10), 10)}, device="cuda")
    images = torch.rand(40, 1, 8, 8)

    def run(order: list[int], max_live: int) -> dict[int, object]:
        engine = Engine(network, GaussianNoise(0), batch_size=500, max_live=max_live)
        tasks = (Task(i, str(i), images[i], certify(0.5, Sampling(100, 1000, 0.001))) for i in order)
        return {finished.key: finished.result for finished in engine.run(tasks)}

    assert run(list(range(40)), 4096) == run(list(range(39, -1, -1)), 7)
