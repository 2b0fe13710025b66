"""The batch shape that compute.batch_size=auto finds, and that a run keeps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import distributed.execution.scheduler as scheduler_module
import distributed.execution.work as work_module
from core.errors import ConfigError, DataError, ModelError
from core.machine.batch_size import DeviceProbe, Measured, choose_batch_size
from core.machine.engine import Engine
from core.machine.network import Head, Network
from core.records import CLASSIFIER, Draws, Phase
from distributed.checks.audit import audit, replay
from distributed.execution.replica import Replica
from distributed.execution.work import build_engine, probe_batch_size
from distributed.files.datasets import load_dataset
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import build_dataset

# --- batch_size: auto
from tests.core.machine.test_device_use import Small, sign_count
from tests.distributed.execution.test_scheduler import work_on
from tests.helpers.tiny import tiny_run


@dataclasses.dataclass
class Simulated:
    """A device: a batch takes `start + B * row` seconds and `B` bytes; weights take none."""

    memory: float
    start: float
    row: float
    limit_bytes: float = 0.0
    largest: int = 1024
    tried: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.limit_bytes = self.limit_bytes or self.memory

    def measure(self, batch_size: int) -> Measured:
        self.tried.append(batch_size)
        if batch_size > self.memory:
            raise torch.OutOfMemoryError
        return Measured(self.start + batch_size * self.row, 2.0 * batch_size)


@pytest.mark.parametrize(
    ("device", "expected", "largest_tried"),
    [
        (Simulated(memory=1e9, start=0.0, row=1.0), 8, 16),  # nothing to gain
        (Simulated(memory=1e9, start=100.0, row=1.0), 1024, 1024),  # always something: the cap
        (Simulated(memory=1e9, start=10.0, row=1.0), 128, 256),  # 5.4% from 64 to 128, 3.6% to 256
        (Simulated(memory=300.0, start=100.0, row=1.0), 128, 256),  # two of 256 do not fit, one does
        (Simulated(memory=256.0, start=100.0, row=1.0), 128, 256),
        (Simulated(memory=1e9, start=100.0, row=1.0, limit_bytes=100.0), 32, 64),  # others use the device too
        (Simulated(memory=5.0, start=100.0, row=1.0), 2, 8),  # smaller than the first size
        (Simulated(memory=1.0, start=100.0, row=1.0), 1, 8),  # without room for a second batch
        (Simulated(memory=1e9, start=100.0, row=1.0, largest=5), 5, 5),
    ],
)
def test_choose_batch_size(device: Simulated, expected: int, largest_tried: int) -> None:
    assert choose_batch_size(device) == expected
    assert max(device.tried) == largest_tried


def test_choose_batch_size_where_nothing_fits_raises() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        choose_batch_size(Simulated(memory=0.5, start=1.0, row=1.0))


def test_device_probe_measures_passes_of_each_kind() -> None:
    device = Small(sign_count, 32)
    network = Network({CLASSIFIER: Head(device, 2)})
    probe = DeviceProbe(network, (1, 4, 4), [Draws(0.5, 1, (CLASSIFIER,), Phase.ESTIMATION)] * 2, share=1.0)
    measured = probe.measure(32)
    assert measured.seconds > 0
    assert measured.needs_bytes <= probe.limit_bytes
    assert set(device.shapes) == {32}
    assert not network.rows
    with pytest.raises(torch.OutOfMemoryError):
        probe.measure(33)
    assert choose_batch_size(probe) <= 32


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the engines that are built from now on."""
    seen, real = [], Engine.__init__

    def init(self: Engine, *args: Any, **options: Any) -> None:
        seen.append(options["batch_size"])
        real(self, *args, **options)

    monkeypatch.setattr(Engine, "__init__", init)
    return seen


def test_build_dataset_auto_asks_once_and_the_plan_keeps_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = ("compute.executor=local", "compute.batch_size=auto", "compute.part_rows=1")
    directory = tiny_run(tmp_path / "auto", *auto)
    monkeypatch.setattr(scheduler_module, "probe_batch_size", lambda work: 48)
    seen = batch_sizes(monkeypatch)
    build_dataset.run(directory)
    assert "compute.batch_size=auto comes to 48 rows" in capsys.readouterr().out
    store = ShardStore(directory.path, "dataset")
    plan = store.read_plan()
    assert plan is not None
    assert plan.batch_size == directory.manifest["steps"]["build_dataset"]["batch_size"] == 48

    whole = store.read()
    (directory.path / "dataset" / "shard-000003.parquet").unlink()
    monkeypatch.setattr(scheduler_module, "probe_batch_size", lambda work: 1 / 0)  # not asked again
    build_dataset.run(RunDirectory(directory.path, None))
    assert store.read().equals(whole)
    assert audit(directory)[0] == []
    assert replay(directory, 10, 0) == []
    assert seen == [48, 48, 48], "the step, its resumption, the replay"

    fixed = tiny_run(tmp_path / "fixed", "compute.executor=local", "compute.batch_size=48")
    build_dataset.run(fixed)
    assert ShardStore(fixed.path, "dataset").read().equals(whole)
    with pytest.raises(ConfigError, match=r"compute\.batch_size: 'auto' there, 48 now"):
        RunDirectory(directory.path, fixed.config)


def test_build_dataset_auto_on_this_machine(tmp_path: Path) -> None:
    directory = tiny_run(tmp_path, "compute.executor=local", "compute.batch_size=auto", "compute.shard_examples=auto")
    build_dataset.run(directory)
    number = directory.manifest["steps"]["build_dataset"]["batch_size"]
    assert 1 <= number <= 1024
    assert number & (number - 1) == 0


@pytest.mark.slow
def test_build_dataset_auto_on_ray_is_drawn_again_at_the_plans_size(tmp_path: Path) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        directory = tiny_run(tmp_path, "compute.batch_size=auto", "compute.max_replicas=2")
        build_dataset.run(directory)
    finally:
        ray.shutdown()
    plan = ShardStore(directory.path, "dataset").read_plan()
    assert plan is not None
    assert plan.batch_size == directory.manifest["steps"]["build_dataset"]["batch_size"]
    assert replay(directory, 60, 0) == []


def test_replica_takes_the_plans_batch_size(tmp_path: Path) -> None:
    directory = tiny_run(tmp_path, "compute.batch_size=auto")
    store, ids = ShardStore(directory.folder, "dataset"), load_dataset(directory.config.dataset, "train").example_ids
    work = work_on(directory, denoiser="denoiser", classifier="classifier")
    with pytest.raises(ConfigError, match=r"does not say what compute\.batch_size=auto came to"):
        build_engine(work, 10)
    store.write_plan(Plan.divide(len(ids), 10, 2, {}, batch_size=24), ids)
    replica = Replica(work)
    assert replica._engine.batch_size == 24
    replica.close()


def test_probe_batch_size_device_too_small_for_a_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(probe: object) -> int:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(work_module, "choose_batch_size", never)
    with pytest.raises(ModelError, match=r"not even one row fits on cpu of .*80 GiB"):
        probe_batch_size(work_on(tiny_run(tmp_path), denoiser="denoiser", classifier="classifier"))


def test_plan_from_before_it_kept_the_batch_size_means_the_configured_one() -> None:
    plan = Plan.divide(7, 2, 1, {})
    assert Plan.from_bytes(plan.to_bytes([str(i) for i in range(7)]), "plan").batch_size is None
    plan = Plan.divide(7, 2, 1, {}, batch_size=5)
    assert Plan.from_bytes(plan.to_bytes([str(i) for i in range(7)]), "plan").batch_size == 5
    with pytest.raises(DataError):
        Plan.from_bytes(b"nothing", "plan")
