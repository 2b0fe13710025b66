"""The same counts on Ray with one and two replicas, with the local executor, in a plain loop, and after kills."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from core.errors import ConfigError, ModelError
from core.files import file_sha256
from core.models.checkpoints import load_model, save_model
from core.models.small import SmallConvNet
from core.records import Sampling
from distributed.datasets import load_dataset
from distributed.replica import Replica, Work
from distributed.run_directory import RunDirectory
from distributed.shards import CERTIFICATE_SCHEMA, Plan, ShardStore
from jobs import build_dataset, certify
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this module's own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
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
    size, batch = config.compute.chunk_size, config.compute.batch_size
    image = data.pixels()[example]
    rows = []
    for chunk in range(-(-num // size)):
        text = f"{config.seed}|{phase}|{sigma.hex()}|{chunk}|{data.example_ids[example]}"
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        rows.append(np.random.Generator(np.random.SFC64(key)).standard_normal((size, *image.shape), dtype=np.float32))
    noisy = image + sigma * torch.from_numpy(np.concatenate(rows)[:num])
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
    [("compute.num_replicas=1",), ("compute.num_replicas=2", "compute.shard_examples=7")],
    ids=["one replica", "two replicas, other shards"],
)
def test_build_dataset_on_ray_equals_the_local_executor(
    overrides: tuple[str, ...], reference: pa.Table, cluster: None, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, *overrides)
    build_dataset.run(run)
    assert ShardStore(run.path, "dataset").read().equals(reference)
    assert run.manifest["steps"]["build_dataset"]["rows"] == 194


def test_certify_dual_class_stage_equals_standard_at_the_chosen_sigma(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "dataset.test_size=40")
    for method in ("standard", "dual"):
        certify.run(run, method, "base")
    standard = {
        (row["example_id"], row["sigma"]): row
        for row in ShardStore(run.path, "certificates/standard-base").read().to_pylist()
    }
    dual = ShardStore(run.path, "certificates/dual-base").read().to_pylist()
    assert len(dual) == 40
    certified = [row for row in dual if row["sigma"] is not None]
    assert certified
    for row in certified:  # the same noise where they overlap
        assert row["counts_estimation"] == standard[row["example_id"], row["sigma"]]["counts_estimation"]
        assert row["radius"] == min(row["radius_sigma"], row["radius_class"])


def test_build_dataset_again_does_nothing_and_other_weights_are_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    build_dataset.run(run)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").iterdir()}
    build_dataset.run(RunDirectory(tmp_path, None))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").iterdir()} == before
    (tmp_path / "dataset" / "shard-000003.parquet").unlink()
    build_dataset.run(RunDirectory(tmp_path, None))  # what is missing is made again, nothing else
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == {tmp_path / "dataset" / "shard-000003.parquet"}
    run = tiny_run(tmp_path, "compute.executor=local", weight_seed=1)
    with pytest.raises(ConfigError, match=r"made from other inputs \(models differ\)"):
        build_dataset.run(run)


def test_build_dataset_killed_and_started_again_has_every_row_once_with_the_same_counts(
    reference: pa.Table, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.shard_examples=2")
    command = [sys.executable, "-m", "jobs.build_dataset", "--out", str(run.path), "compute.executor=local"]
    store = ShardStore(run.path, "dataset")
    for kill_at in (2, 9):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while len(store.committed()) < kill_at and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert kill_at <= len(store.committed()) < 49, "the kill came too early or too late"
    kept = {p: p.stat().st_mtime_ns for p in store.folder.glob("shard-*")}
    assert subprocess.run(command, check=False).returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()), "a committed shard was redone"
    assert store.read().equals(reference)


def test_build_dataset_terminated_says_so_and_keeps_what_is_committed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local", "compute.shard_examples=2")
    store = ShardStore(run.path, "dataset")
    command = [sys.executable, "-m", "jobs.build_dataset", "--out", str(run.path), "compute.executor=local"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(store.committed()) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; what is committed stays" in errors
    assert "Traceback" not in errors
    assert 3 <= len(store.committed()) < 49


def test_build_dataset_on_ray_classifier_of_another_width_is_our_error(cluster: None, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.num_replicas=1")
    save_model(SmallConvNet(1, 8, 7), run.model("classifier"))
    hashes = {name: file_sha256(run.model(name)) for name in ("denoiser", "classifier")}
    run.finish("train_base", read={}, wrote=hashes, facts={})
    with pytest.raises(ModelError, match=r"logits of shape \(64, 7\)"):
        build_dataset.run(run)


def test_build_dataset_resumed_on_another_device_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "compute.executor=local")
    build_dataset.run(run)
    store = ShardStore(run.path, "dataset")
    assert store.devices() == {"cpu"}
    rows = store.read().to_pylist()[:20]
    store.commit(0, rows, CERTIFICATE_SCHEMA, "cuda: Some GPU")
    store.shard_file(3).unlink()
    with pytest.raises(ConfigError, match="begun on 'cuda: Some GPU' and would go on on 'cpu'"):
        build_dataset.run(run)


def test_replica_engine_failure_reaches_every_waiting_shard(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    ids = load_dataset(run.config.dataset, "train").example_ids
    ShardStore(run.path, "dataset").plan(Plan.divide(len(ids), 10, 2, {}), ids)
    work = Work(
        root=run.path,
        store="dataset",
        method="standard",
        split="train",
        sampling=Sampling(20, 60, 0.01),
        budget="fixed",
        models={"denoiser": run.model("denoiser"), "classifier": run.model("estimator")},  # two outputs, not ten
        config=run.config,
        device="cpu",
    )
    replica = Replica(work)
    futures = [replica.submit(number) for number in range(3)]
    for future in [*futures, replica.submit(3)]:
        with pytest.raises(Exception, match="check its number of classes"):
            future.result(timeout=30)
    replica.close()
