"""A sweep is its settings run alone, with what they share made once; a kill loses nothing that was finished."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.config import Sweep, load_sweep
from core.errors import DualRSError
from distributed.checks.audit import audit
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.sweep import is_finished, own_steps, run_setting, setting_folder, shared_runs
from distributed.studies.sweep_check import check_sweep, dry_run_sweep
from jobs.pipeline import STEPS

ROOT = Path(__file__).parents[3]
SMALL = [
    "dataset.test_size=1700", "dataset.test.first=8", "base.denoiser.train.steps=20", "base.classifier.train.epochs=2",
    "labels.num_selection=5", "labels.alpha=0.1", "dataset.train.first=40", "certify.num_selection=5",
    "certify.num_estimation=40", "certify.alpha=0.1", "report.radii=[0,0.1]", "estimator.epochs=1",
    "finetune.epochs=1", "finetune.num_sigma_draws=5", "compute.shard_examples=20", "compute.batch_size=100",
]  # fmt: skip
LABELS = "labels.num_estimation=20"
GRID = "grid: {sigmas: [[0.12, 0.25], [0.25, 0.5]]}"


def sweep_file(path: Path, text: str = GRID, *overrides: str) -> Path:
    file = path / "small.yaml"
    common = "".join(f"\n  - {override}" for override in (*SMALL, *overrides))
    file.write_text(f"base: {ROOT}/configs/digits.yaml\ntitle: Small\noverrides:{common}\n{text}\n")
    return file


def make(sweep: Sweep, out: Folder) -> None:
    """What `run_sweep` does, without Ray."""
    shared = shared_runs(sweep, out)
    for run in shared:
        run.make(shared, STEPS)
    for setting in sweep.settings:
        run_setting(sweep, setting, out, shared, STEPS)


def test_settings_of_a_sweep_are_the_same_runs_alone_with_less_work(tmp_path: Path) -> None:
    sweep, out = load_sweep(sweep_file(tmp_path, GRID, LABELS, "compute.executor=local")), Folder(tmp_path / "out")
    shared = shared_runs(sweep, out)
    assert [(run.step, run.users) for run in shared] == [
        (step, ("sigmas=0.12,0.25", "sigmas=0.25,0.5"))
        for step in ("train_base", "build_dataset", "certify-standard-base")
    ]
    assert shared[1].config.sigmas == (0.12, 0.25, 0.5)
    make(sweep, out)
    setting = sweep.settings[1]
    alone = RunDirectory(tmp_path / "alone", setting.config)
    for step in ("train_base", "build_dataset", "certify-standard-base", *own_steps(sweep, setting.config)):
        STEPS[step](alone)
    directory = RunDirectory(setting_folder(out, setting), None, "look")
    for name in ("denoiser", "classifier", "estimator"):
        assert directory.model(name).read_bytes() == alone.model(name).read_bytes(), name
    for store in ("dataset", "certificates/standard-base", "certificates/dual-base"):
        ours, theirs = (ShardStore(folder, store).read() for folder in (directory.folder, alone.folder))
        assert ours.equals(theirs), store
    assert audit(directory)[0] == []
    assert all(is_finished(sweep, each, out) for each in sweep.settings)
    check_sweep(sweep, out)


def test_fine_tuned_sweep_shares_no_certificates_of_its_classifiers(tmp_path: Path) -> None:
    grid = "classifier: finetuned\ngrid: {estimator.lr: [0.001, 0.002], labels.num_estimation: [20, 30]}"
    sweep = load_sweep(sweep_file(tmp_path, grid))
    runs = shared_runs(sweep, Folder(tmp_path))
    assert [(run.step, len(run.users)) for run in runs] == [
        ("train_base", 4), ("build_dataset", 2), ("build_dataset", 2),
    ]  # fmt: skip
    config, steps = sweep.settings[0].config, ("train_estimator", "certify-standard", "certify-dual")
    assert own_steps(sweep, config) == (steps[0], "finetune_classifier", *steps[1:])
    as_it_is = config.model_copy(update={"finetune": config.finetune.model_copy(update={"epochs": 0})})
    assert own_steps(sweep, as_it_is) == steps


def test_dry_run_lists_settings_and_cost_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "grid: {estimator.consistency_lambda: [10, 20]}"
    sweep = load_sweep(sweep_file(tmp_path, grid, LABELS, "compute.executor=local"))
    dry_run_sweep(sweep, Folder(tmp_path / "out"), 2.0, seconds=0.05)
    printed = capsys.readouterr().out
    assert "consistency_lambda=20: estimator.consistency_lambda = 20 (to do)" in printed
    lines = [line.split("  ")[0] for line in printed.splitlines()]
    assert [line for line in lines if line.endswith(("build_dataset", "dual-base"))] == [
        "shared by 2: build_dataset", "consistency_lambda=10: certify-dual-base",
        "consistency_lambda=20: certify-dual-base",
    ]  # fmt: skip
    row = next(line for line in printed.splitlines() if line.startswith("shared by 2: build_dataset"))
    assert row.split()[4:6] == ["40", f"{40 * 3 * 25:,}"]
    assert not (tmp_path / "out").exists()


def test_check_names_a_problem_of_several_settings_once(tmp_path: Path) -> None:
    missing = "base.denoiser=nowhere.safetensors"
    sweep = load_sweep(sweep_file(tmp_path, "grid: {estimator.lr: [0.1, 0.2]}", missing))
    with pytest.raises(DualRSError, match=r"nowhere\.safetensors") as caught:
        check_sweep(sweep, Folder(tmp_path / "out"))
    assert str(caught.value).count("nowhere.safetensors") == 1


@pytest.mark.slow
def test_sweep_killed_and_resumed_runs_no_setting_twice(tmp_path: Path) -> None:
    grid = "grid: {estimator.consistency_lambda: [10, 20, 40, 60]}"
    file, out = sweep_file(tmp_path, grid, LABELS), tmp_path / "out"
    command = [sys.executable, "-m", "jobs.sweep", "--config", str(file), "--out", str(out)]
    names = [f"consistency_lambda={value}" for value in (10, 20, 40, 60)]

    def finished() -> list[str]:
        sweep = load_sweep(file)
        return [setting.name for setting in sweep.settings if is_finished(sweep, setting, Folder(out))]

    def run_until(reached: Callable[[str], bool], ending: signal.Signals) -> int:
        """Start the sweep, send a signal when something has been reached, return the exit code."""
        log = tmp_path / f"{ending.name}.log"
        with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output) as process:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline and not reached(log.read_text()):
                time.sleep(0.2)
            process.send_signal(ending)
            return process.wait(60)

    assert run_until(lambda log: out.exists() and len(finished()) > 0, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(lambda log: ": begins" in log, signal.SIGTERM) == 130
    done = finished()
    assert 1 <= len(done) <= 3
    stamps = {path: path.stat().st_mtime_ns for name in done for path in (out / "settings" / name).rglob("*.*")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    assert f"4 settings, {len(done)} of them finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "a finished setting was touched"
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["setting"] for row in table] == names
    assert len({row["fingerprint"] for row in table}) == 4
    for name in names:
        log = (out / "settings" / name / "sweep_log.txt").read_text()
        assert log.count("estimator: trained on") <= (1 if name in done else 2)
        assert audit(RunDirectory(out / "settings" / name, None, "look"))[0] == []
    before_again = {path: path.stat().st_mtime_ns for path in (out / "settings").rglob("*")}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=240).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before_again} == before_again
