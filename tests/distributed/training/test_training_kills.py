"""Training on two workers of Ray Train, killed within epochs: the driver, then one worker."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from core.models.checkpoints import load_model
from distributed.store.run_directory import RunDirectory
from jobs import build_dataset
from tests.helpers.tiny import tiny_run

ROOT = Path(__file__).parents[3]
CHECKPOINT = Path("training", "train_estimator", "checkpoint.pt")


def start(run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.train_estimator", "--out", str(run)]
    options = ["compute.executor=ray", "compute.train_workers=2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, text=True)


def wait_for_epochs(driver: subprocess.Popen[str], run: Path, epochs: int) -> int:
    """Until the checkpoint has so many and more time has passed than a fifth of one takes; the epochs that it has."""
    while driver.poll() is None:  # a loaded machine takes minutes to start a cluster
        if (run / CHECKPOINT).exists():
            state = torch.load(run / CHECKPOINT, weights_only=True)
            if state["epoch"] >= epochs:
                time.sleep(0.3)
                return int(state["epoch"])
        time.sleep(0.05)
    raise AssertionError(f"ended without a checkpoint with {epochs} epochs")


def train_workers(driver: int) -> list[psutil.Process]:
    """Processes of Ray Train's workers below a driver."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_training_on_workers_survives_the_driver_and_a_worker(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path / "whole",
        "compute.executor=local",
        "dataset.test_size=800",
        "labels.num_selection=5",
        "labels.num_estimation=20",
        "estimator.epochs=12",
        "estimator.num_copies=64",
        "estimator.batch_size=30",
        "estimator.lr=1e-3",
    )
    build_dataset.run(run)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    with start(tmp_path / "whole") as whole:
        assert whole.wait() == 0
    killed = tmp_path / "killed"
    with start(killed) as driver:
        before = wait_for_epochs(driver, killed, 2)
        driver.send_signal(signal.SIGKILL)
    assert "train_estimator" not in RunDirectory(killed, None).manifest["steps"]
    assert before < 12
    with start(killed) as driver:
        before = wait_for_epochs(driver, killed, before + 3)
        workers = train_workers(driver.pid)
        assert len(workers) == 2
        workers[-1].kill()
        assert driver.wait() == 0
    assert before < 12, "killed too late to prove anything"
    one, two = (RunDirectory(path, None).manifest["steps"]["train_estimator"] for path in (run.path, killed))
    print("losses, undisturbed:", one["loss"])
    print("losses, killed:     ", two["loss"])
    assert len(two["loss"]) == 12
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    state, other = (load_model(path / "models" / "estimator.safetensors").state_dict() for path in (run.path, killed))
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=1e-3, atol=1e-5)
