import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.config import parse_config
from distributed.run_directory import RunDirectory
from distributed.shards import ShardStore
from jobs import build_dataset, pipeline
from tests.tiny import PLAIN, tiny_run

ROOT = Path(__file__).parent.parent
JOBS = [
    "audit",
    "build_dataset",
    "certify",
    "finetune_classifier",
    "pipeline",
    "predict",
    "recertify",
    "report",
    "shift",
    "status",
    "train_base",
    "train_estimator",
]


def call(job: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("job", JOBS)
def test_help_explains_the_job_and_its_flags(job: str) -> None:
    result = call(job, "--help")
    assert result.returncode == 0
    for part in (f"python -m jobs.{job}", "--config", "--out", "Exit codes"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--out", "{tmp}/run"], 2, "name a configuration with --config"),
        (["--out", "{tmp}/run", "--config", "nowhere.yaml"], 2, "cannot read the configuration 'nowhere.yaml'"),
        (["--out", "{tmp}/run", "--config", "configs/digits.yaml", "sigma_e=0.1"], 2, "sigma_e: must be at least"),
        (["--out", "{tmp}/run", "--config", "configs/digits.yaml"], 2, "run the earlier steps"),
        (["--config", "configs/digits.yaml"], 2, "required: --out"),
    ],
)
def test_certify_bad_input_is_one_message_and_an_exit_code(
    args: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = call("certify", "--method", "dual", *(arg.format(tmp=tmp_path) for arg in args))
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_pipeline_small_run_then_again_then_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = parse_config(
        PLAIN,
        [
            "compute.executor=local",
            "dataset.test_size=800",
            "dataset.train.first=300",
            "dataset.test.first=100",
            "base.denoiser_steps=40",
            "base.classifier_epochs=5",
            "estimator.epochs=2",
            "finetune.epochs=1",
            "finetune.num_sigma_draws=20",
            "labels.num_selection=5",
            "labels.num_estimation=20",
            "certify.num_selection=5",
            "certify.num_estimation=20",
            "certify.multiscale=true",
        ],
    )
    run = RunDirectory(tmp_path / "run", config)
    pipeline.run(run)
    out = capfd.readouterr().out
    assert "| Dual RS " in out
    assert ShardStore(run.path, "dataset").read().num_rows == 300 * 2
    assert ShardStore(run.path, "certificates/standard").read().num_rows == 100 * 2
    assert "[7/8] certify --method multiscale" in out
    for store, name in (("certificates/dual", "Dual RS"), ("certificates/multiscale", "Multiscale")):
        table = ShardStore(run.path, store).read().to_pandas()
        # The printed table is what the rows say.
        line = next(line for line in out.splitlines() if line.startswith(f"| {name} "))
        printed = [float(x) for x in re.findall(r"\d+\.\d+", line)]
        expected = [100 * np.mean(table.correct & (table.radius > r)) for r in config.report.radii]
        assert printed == pytest.approx(expected, abs=0.005)
    steps = json.loads((run.path / "manifest.json").read_text())["steps"]
    assert set(steps) == {
        "train_base", "build_dataset", "train_estimator", "finetune_classifier", "certify-standard", "certify-dual",
        "certify-multiscale",
    }  # fmt: skip
    for name in ("report.md", "report.html", "certified_accuracy.png", "table.csv"):
        assert (run.path / "report" / name).stat().st_size > 0
    stamps = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.*") if "report" not in p.parts}
    pipeline.run(RunDirectory(run.path, None))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "a finished step was run again"
    assert call("report", "--out", str(run.path), "report.radii=[0.1]").returncode == 0

    audit = call("audit", "--out", str(run.path), "--replay", "5")
    assert (audit.returncode, audit.stdout.splitlines()[-1]) == (0, "nothing found")
    assert call("recertify", "--out", str(run.path), "alpha=1e-3").returncode == 0
    wrong = call("recertify", "--out", str(run.path), "beta=1")
    assert (wrong.returncode, wrong.stderr) == (2, "error: unknown beta; known: alpha, share, sigmas, split\n")
    (run.path / "dataset" / ShardStore(run.path, "dataset").files()[0]).unlink()
    audit = call("audit", "--out", str(run.path))
    assert audit.returncode == 3
    assert re.search(r"dataset: part-000000-0000\d\d.parquet: is missing", audit.stderr)


def test_jobs_that_only_look_leave_the_run_directory_as_it_is(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local")
    build_dataset.run(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for job in ("status", "audit"):
        assert call(job, "--out", str(run.path), "compute.max_replicas=3").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    missing = call("status", "--out", str(tmp_path / "none"), "--config", "configs/digits.yaml")
    assert (missing.returncode, (tmp_path / "none").exists()) == (2, False)
    assert "holds no manifest.json" in missing.stderr


def test_job_that_cannot_write_says_so_in_one_line() -> None:
    result = call("build_dataset", "--out", "/proc/run", "--config", "configs/digits.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write to '/proc/run'")
    assert len(result.stderr.splitlines()) == 1
