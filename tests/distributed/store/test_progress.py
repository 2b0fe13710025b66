"""Device hours over all starts of a run, the limit on them, and how far a training is."""

import time
from pathlib import Path

import pytest

from core.config import ComputeConfig
from core.errors import LimitError
from distributed.files.storage import Folder
from distributed.store.progress import Meter, StepProgress, device_hours, outermost, read_progress
from distributed.store.shards import ShardStore
from jobs import certify, status
from tests.helpers.tiny import run_main, tiny_run


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_run_stops_when_its_device_hours_are_spent_and_a_larger_limit_goes_on(
    executor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (
        f"compute.executor={executor}",
        "compute.max_replicas=1",
        "compute.shard_examples=1",
        "dataset.test.first=12",
    )
    limited, free = (tiny_run(tmp_path / name, *small) for name in ("limited", "free"))
    for run in (limited, free):
        run.finish("finetune_classifier", read={}, wrote={"classifier_finetuned": ""}, facts={})
    out, shards = ("--out", str(limited.path)), ShardStore(limited.folder, "certificates/standard-base")
    job = ("--method", "standard", "--classifier", "base")

    assert run_main(certify, *out, *job, "--max-cost", "0.000002", "--price", "2") == 4  # a millionth of an hour
    said = capsys.readouterr()
    assert "; it will stop at about" in said.out
    assert "compute.max_device_hours = 1e-06 are spent" in said.err
    committed, spent = shards.committed(), device_hours(limited.folder)
    assert 0 < len(committed) < len(shards.read_plan() or ())
    assert spent > 1e-6

    assert run_main(certify, *out, *job) == 4  # the run remembers
    assert shards.committed() == committed
    assert device_hours(limited.folder) == spent

    assert run_main(certify, *out, *job, "compute.max_device_hours=1") == 0
    assert device_hours(limited.folder) > spent
    assert "it will stop" not in capsys.readouterr().out
    assert run_main(certify, "--out", str(free.path), *job) == 0
    assert shards.read().equals(ShardStore(free.folder, "certificates/standard-base").read())


@pytest.mark.parametrize(
    "options", [("--max-cost", "5"), ("--max-cost", "5", "--price", "0"), ("--max-cost", "0", "--price", "1")]
)
def test_max_cost_without_a_price_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run_main(certify, "--out", str(tmp_path), "--method", "dual", *options) == 2


def test_meter_counts_over_starts_and_over_the_rounds_of_a_run(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    second = run / "rounds" / "2"
    for folder in (run, second):
        folder.write("manifest.json", b"{}")
    compute = ComputeConfig(max_device_hours=1.0)
    with Meter(run, compute) as meter:
        meter.count(1000.0)
        meter.count(1800.0)
    with Meter(second, compute) as meter, Meter(run, compute) as beside:  # trainings side by side
        meter.count(600.0)
        beside.count(300.0)
    assert device_hours(second) == device_hours(run) == pytest.approx(2700 / 3600)
    with pytest.raises(LimitError, match=r"= 1 are spent: 1\.028 over all starts"), Meter(second, compute) as meter:
        meter.count(1000.0)
    with pytest.raises(LimitError), Meter(run, compute):
        pass
    aside = Folder(tmp_path / "rounds" / "mine")  # a run of that name, and not a round
    assert outermost(aside) == aside


def test_training_says_how_far_it_is_and_what_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    folder, clock = run.folder / "training" / "train_estimator", [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: 1e9)
    compute = ComputeConfig(progress_interval_s=10.0, max_device_hours=1.0, train_workers=3)
    with StepProgress(folder, compute, 9000, "estimator", "samples", done=1000) as progress:
        clock[0] = 100.0
        progress.update(500, "epoch 2, loss 0.5")
        run_main(status, "--out", str(tmp_path))
        clock[0] = 1201.0
        with pytest.raises(LimitError) as raised:
            progress.update(1)
        progress.__exit__(LimitError, raised.value, None)
        left = read_progress(run.folder)
    line = "estimator: 1,500/9,000 samples (17%), epoch 2, loss 0.5, 5.0 samples/s, ETA 25:00, last heard of 0:00 ago"
    assert line in capsys.readouterr().out
    assert device_hours(run.folder) == pytest.approx(3 * 1201 / 3600)
    assert [each["done"] for each in left] == [1501]  # an interrupted training leaves its last word
    with StepProgress(folder, ComputeConfig(), 10, "estimator", "samples"):
        pass
    assert read_progress(run.folder) == []
