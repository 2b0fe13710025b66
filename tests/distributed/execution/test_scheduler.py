"""The same counts on Ray with one and two replicas, with the local executor, in a plain loop, and after kills."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch

import distributed.execution.replica as replica_module
from core.errors import ConfigError, DataError, ModelError
from core.files import file_sha256
from core.machine.network import Network
from core.models.checkpoints import load_model, save_model
from core.models.small import SmallConvNet
from core.records import Sampling
from distributed.checks.audit import audit
from distributed.execution.replica import Replica, retired
from distributed.execution.work import Work, make_task
from distributed.files.datasets import load_dataset
from distributed.methods.standard import Standard
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.training.labels import training_radii
from jobs import build_dataset
from tests.helpers.reference_noise import normals
from tests.helpers.tiny import tiny_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this module's own."""
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The dataset by the local executor."""
    run = tiny_run(tmp_path_factory.mktemp("local"), "compute.executor=local")
    build_dataset.run(run)
    return ShardStore(run.path, "dataset").read()


def naive_votes(run: RunDirectory, example: int, sigma: float, phase: str, num: int) -> list[int]:
    """Votes by a plain loop over padded batches of the same shape; shares nothing with engine, noise or replica."""
    config = run.config
    data = load_dataset(config.dataset, "train")
    denoiser, classifier = load_model(run.model("denoiser")), load_model(run.model("classifier"))
    batch, image = config.compute.training_batch_size, data.readable_pixels([example])[0][0]
    noise = normals(config.seed, data.example_ids[example], phase, sigma, num, tuple(image.shape))
    noisy = image + sigma * torch.from_numpy(noise)
    votes = np.zeros(10, np.int64)
    with torch.inference_mode():
        for part in torch.split(noisy, batch):
            padded = torch.cat([part, torch.zeros(batch - len(part), *image.shape)])
            logits = classifier(denoiser(padded, torch.full((batch,), sigma)))[: len(part)]
            np.add.at(votes, logits.argmax(1).numpy(), 1)
    return votes.tolist()


def test_build_dataset_local_equals_a_plain_loop(reference: pa.Table, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    assert reference.num_rows == 97 * 2
    ids = load_dataset(run.config.dataset, "train").example_ids
    for row in reference.to_pylist()[::17]:
        example = ids.index(row["example_id"])
        assert row["counts_selection"] == naive_votes(run, example, row["sigma"], "selection", 20)
        assert row["counts_estimation"] == naive_votes(run, example, row["sigma"], "estimation", 60)


@pytest.mark.parametrize(
    "overrides",
    [
        ("compute.max_replicas=1",),
        ("compute.min_replicas=2", "compute.max_replicas=2", "compute.shard_examples=7"),
        ("compute.min_replicas=4", "compute.max_replicas=4", "compute.shard_examples=auto"),
    ],
    ids=["one replica", "two replicas, other shards", "four replicas, measured shards"],
)
def test_build_dataset_on_ray_equals_the_local_executor(
    overrides: tuple[str, ...], reference: pa.Table, cluster: None, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, *overrides)
    build_dataset.run(run)
    assert ShardStore(run.path, "dataset").read().equals(reference)
    assert run.manifest["steps"]["build_dataset"]["rows"] == 194


def test_build_dataset_again_does_nothing_and_other_weights_are_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.part_rows=1")
    build_dataset.run(run)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").iterdir()}
    assert len(before) == 10
    build_dataset.run(RunDirectory(tmp_path, None))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").iterdir()} == before
    (tmp_path / "dataset" / "shard-000003.parquet").unlink()
    build_dataset.run(RunDirectory(tmp_path, None))  # what is missing is made again, nothing else
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == {tmp_path / "dataset" / "shard-000003.parquet"}
    run = tiny_run(tmp_path, "compute.executor=local", "compute.part_rows=1", weight_seed=1)
    with pytest.raises(ConfigError, match=r"made from other inputs \(models\.\w+ is"):
        build_dataset.run(run)


def test_build_dataset_killed_and_started_again_has_every_row_once_with_the_same_counts(
    reference: pa.Table, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.shard_examples=2", "compute.part_rows=1")
    command = [sys.executable, "-m", "jobs.build_dataset", "--out", str(run.path), "compute.executor=local"]
    store = ShardStore(run.path, "dataset")
    for kill_at in (2, 9):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while len(store.committed()) < kill_at and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert kill_at <= len(store.committed()) < 49, "the kill came too early or too late"
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").glob("shard-*")}
    assert subprocess.run(command, check=False).returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()), "a committed shard was redone"
    assert store.read().equals(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_build_dataset_told_to_stop_says_so_and_keeps_what_is_committed(number: signal.Signals, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.shard_examples=2", "compute.part_rows=1")
    store = ShardStore(run.path, "dataset")
    command = [sys.executable, "-m", "jobs.build_dataset", "--out", str(run.path), "compute.executor=local"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        deadline = time.monotonic() + 60
        while len(store.committed()) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; what is committed stays" in errors
    assert "Traceback" not in errors
    assert 3 <= len(store.committed()) < 49


def test_build_dataset_on_ray_classifier_of_another_width_is_our_error(cluster: None, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.max_replicas=1")
    save_model(SmallConvNet(1, 8, 7), run.model("classifier"))
    hashes = {name: file_sha256(run.model(name)) for name in ("denoiser", "classifier")}
    run.finish("train_base", read={}, wrote=hashes, facts={})
    with pytest.raises(ModelError, match=r"logits of shape \(64, 7\)"):
        build_dataset.run(run)


def test_build_dataset_resumed_on_another_device_goes_on_unless_its_noise_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun_on_cuda(run: RunDirectory) -> pa.Table:
        """As if the first rows were from there; returns those of an undisturbed run."""
        build_dataset.run(run)
        store = ShardStore(run.path, "dataset")
        plan, table = store.read_plan(), store.read()
        assert plan is not None
        assert plan.device == "cpu"
        store.write_plan(replace(plan, device="cuda"), load_dataset(run.config.dataset, "train").example_ids)
        for file in (run.path / "dataset").iterdir():  # they say which plan they are of
            file.unlink()
        return table

    run, former = (
        tiny_run(tmp_path / f"{version}", "compute.executor=local", "compute.part_rows=1", f"noise_version={version}")
        for version in (2, 1)
    )
    table = begun_on_cuda(run)
    build_dataset.run(run)
    assert "begun on 'cuda', goes on on 'cpu': the noise is the same" in capsys.readouterr().out
    assert ShardStore(run.path, "dataset").read().equals(table)
    begun_on_cuda(former)
    with pytest.raises(ConfigError, match="begun on 'cuda' and would go on on 'cpu', with other noise"):
        build_dataset.run(former)


def work_on(run: RunDirectory, **models: str) -> Work:
    return Work(
        root=run.folder,
        store="dataset",
        split="train",
        sampling=Sampling(20, 60, 0.01),
        budget="fixed",
        models={role: (name, file_sha256(run.model(name))) for role, name in models.items()},
        config=run.config,
        device="cpu",
    )


def planned(run: RunDirectory) -> ShardStore:
    store, ids = ShardStore(run.folder, "dataset"), load_dataset(run.config.dataset, "train").example_ids
    store.write_plan(Plan.divide(len(ids), 10, 2, {}), ids)
    return store


def test_replica_network_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    planned(run)
    replica = Replica(work_on(run, denoiser="denoiser", classifier="estimator"))  # two outputs, not ten
    for number in range(3):
        with pytest.raises(ModelError, match="check its number of classes"):
            replica.submit(number)
    replica.close()


def test_replica_engine_failure_reaches_every_waiting_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    planned(run)
    replica = Replica(work_on(run, denoiser="denoiser", classifier="classifier"))
    monkeypatch.setattr(type(replica._engine.network), "__call__", lambda *_: 1 / 0)
    futures = [replica.submit(0)]
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(timeout=30)
    with pytest.raises(ZeroDivisionError):
        replica.submit(3)
    replica.close()


def test_build_dataset_examples_that_cannot_be_run_become_error_rows_and_are_tried_again(
    reference: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    bad = load_dataset(run.config.dataset, "train").example_ids[13]
    real = make_task

    def fails(key: Any, data: Any, index: int, *rest: Any) -> Any:
        if data.example_ids[index] == bad:
            raise DataError(f"example {bad!r}: the image is cut off")
        return real(key, data, index, *rest)

    with monkeypatch.context() as context:
        context.setattr(replica_module, "make_task", fails)
        build_dataset.run(run)
    printed = capsys.readouterr().out
    assert "2 rows could not be run, they certify nothing" in printed
    assert "the image is cut off" in printed
    store = ShardStore(tmp_path, "dataset")
    table = store.read()
    failed = table.filter(pc.equal(table.column("status"), "error")).to_pylist()
    assert [(row["example_id"], row["sigma"], row["radius"], row["num_draws"]) for row in failed] == [
        (bad, 0.25, 0.0, 0),
        (bad, 0.5, 0.0, 0),
    ]
    assert table.filter(pc.equal(table.column("status"), "ok")).equals(
        reference.filter(pc.not_equal(reference.column("example_id"), bad))
    )
    (first, _) = store.read_errors().to_pylist()
    assert (first["example_id"], first["error"]) == (bad, "DataError")
    assert "make_task" in first["traceback"]
    assert audit(run)[0] == []
    radii = training_radii(run, load_dataset(run.config.dataset, "train"))
    assert radii[13].tolist() == [0.0, 0.0]
    assert radii.max() > 0
    build_dataset.run(run)  # finished: nothing is done
    assert store.read_errors().num_rows == 2
    build_dataset.run(run, retry_errors=True)
    assert store.read().equals(reference)
    assert store.read_errors().num_rows == 0
    assert run.manifest["steps"]["build_dataset"]["error_rows"] == 0


def test_build_dataset_gives_up_when_too_many_examples_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.max_errors=12")
    monkeypatch.setattr(Standard, "procedures", lambda method, terms: [lambda: broken(), lambda: broken()])

    def broken() -> Any:
        raise RuntimeError("no such thing")
        yield

    with pytest.raises(DataError, match=r"20 examples of dataset could not be run, .*no such thing"):
        build_dataset.run(run)


def test_replica_shard_that_ends_replicas_is_given_up(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.max_attempts=3")
    store = planned(run)
    for name in ("one", "two", "three"):
        store.begin(0, name)
    replica = Replica(work_on(run, denoiser="denoiser", classifier="classifier"))
    with pytest.raises(ModelError, match="shard 0 of dataset was begun 3 times and never finished"):
        replica.submit(0)
    replica.close()


def test_replica_that_loses_its_device_ends_its_process_with_a_note(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    planned(run)
    code = (
        "import sys, torch, core.machine.network\n"
        "from tests.distributed.execution.test_scheduler import work_on\n"
        "from distributed.execution.replica import Replica\n"
        "from distributed.store.run_directory import RunDirectory\n"
        "import distributed.execution.replica as module\n"
        "module.ReplicaMetrics = lambda store: None\n"
        "work = work_on(RunDirectory(sys.argv[1], None), denoiser='denoiser', classifier='classifier')\n"
        "replica = Replica(work, on_ray=True)\n"
        "def fails(*_): raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "core.machine.network.Network.__call__ = fails\n"
        "replica.submit(0).result()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gives up its device: OutOfMemoryError: CUDA out of memory" in done.stderr
    (note,) = (tmp_path / "errors" / "replicas").iterdir()
    assert json.loads(note.read_text())["error"] == "OutOfMemoryError: CUDA out of memory"


def test_replica_device_that_fails_again_and_again_is_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, "compute.max_attempts=2")
    planned(run)
    work = work_on(run, denoiser="denoiser", classifier="classifier")
    for name in ("a", "b"):
        retired(work).write(f"{name}.json", b"{}")

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Network, "__call__", fails)
    monkeypatch.setattr(replica_module, "ReplicaMetrics", lambda store: None)
    replica = Replica(work, on_ray=True)  # fails while it warms up
    with pytest.raises(ModelError, match=r"OutOfMemoryError: CUDA out of memory\), after 2 others in this run"):
        replica.submit(0)
    replica.close()
