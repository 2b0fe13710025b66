"""Whatever is killed, and whenever: every unit exactly once, every count as in an undisturbed run."""

from pathlib import Path

import pyarrow as pa
import pytest

from distributed.checks.audit import audit
from distributed.files.datasets import load_dataset
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import build_dataset
from tests.helpers.chaos import Chaos
from tests.helpers.s3 import s3_server, uri
from tests.helpers.tiny import tiny_run

KINDS = {
    "SIGKILL of the driver": 6,
    "SIGTERM to the driver": 4,
    "SIGKILL of a replica": 8,
    "a replica hangs": 5,
    "SIGKILL of a worker's raylet": 4,
    "second driver": 3,
    "S3 fails": 3,
    "S3 hangs": 3,
    "loss of the head": 1,
}


def disturbed(tmp_path: Path, faults: list[str], overrides: list[str], seed: int) -> None:
    """Run with faults on S3 and without them on the disk, and compare."""
    reference = tiny_run(tmp_path / "reference", "compute.executor=local", *overrides)
    build_dataset.run(reference)
    expected: pa.Table = ShardStore(reference.folder, "dataset").read()
    plan = ShardStore(reference.folder, "dataset").read_plan()
    assert plan is not None
    with s3_server() as proxy:
        where = uri(proxy, "chaos/run")
        run = RunDirectory(where, reference.config)
        for name in ("denoiser", "classifier"):
            (run.folder / "models").write(f"{name}.safetensors", reference.model(name).read_bytes())
        run.finish("train_base", read={}, wrote=reference.manifest["steps"]["train_base"]["wrote"], facts={})
        chaos = Chaos(where, proxy, ["compute.executor=ray", "compute.max_replicas=2", "compute.hang_s=20"], seed)
        report = chaos.run(faults, len(plan), tmp_path / "drivers.log", limit_s=1800.0)

        store = ShardStore(where, "dataset")
        verified = store.verify(plan, load_dataset(run.config.dataset, "train").example_ids, run.config.sigmas)
        rows = store.read()
        keys = list(zip(rows["example_id"].to_pylist(), rows["sigma"].to_pylist(), strict=True))
        facts = RunDirectory(where, None).manifest["steps"]["build_dataset"]
        print(
            f"\n{sum(report.faults.values())} faults in {report.seconds:.0f} s: {dict(report.faults)}"
            f"\ndriver exit codes: {dict(report.driver_exits)}"
            f"\nSIGTERM to exit: {', '.join(f'{s:.1f} s' for s in report.terminations_s) or '-'}"
            f"\nunits (shards) planned {len(plan)}, redone {facts['retries']}, rows planned {expected.num_rows}, "
            f"lost {expected.num_rows - len(set(keys))}, doubled {len(keys) - len(set(keys))}, "
            f"errors {verified.error_rows}"
        )
        assert verified.rows == expected.num_rows
        assert rows.equals(expected)  # every column of every row, counts included
        assert audit(RunDirectory(where, None))[0] == []


def test_chaos_a_fault_of_each_kind(tmp_path: Path) -> None:
    faults = ["SIGKILL of the driver", "SIGTERM to the driver", "SIGKILL of a worker's raylet", "S3 fails"]
    disturbed(tmp_path, faults, ["compute.shard_examples=4", "labels.num_estimation=300"], seed=0)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [1])
def test_chaos_thirty_faults_and_more(tmp_path: Path, seed: int) -> None:
    faults = [kind for kind, number in KINDS.items() for _ in range(number)]
    assert len(faults) >= 30
    overrides = ["dataset.test_size=1200", "compute.shard_examples=6", "labels.num_estimation=800"]
    disturbed(tmp_path, faults, overrides, seed)
