import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.config import parse_config
from core.errors import ConfigError, DataError, ModelError
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from jobs import audit, build_dataset, certify, pipeline, recertify, report, status
from jobs.__main__ import main, summaries
from jobs._cli import EXIT_CODES, job_parser, number, run_job
from tests.helpers.tiny import PLAIN, run_main, tiny_run

ROOT = Path(__file__).parents[2]
JOBS = list(summaries())


def call(job: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("job", JOBS)
def test_help_explains_the_job_and_its_flags(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"jobs.{job}").main()
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    flags = ("--debug",) if job in ("convert", "fetch") else ("--debug", "--config", "--out")
    for part in (f"python -m jobs.{job}", EXIT_CODES, *flags):
        assert part in out
    assert summaries()[job].rstrip(".:") in out


def test_list_has_every_job_in_one_line_and_the_pipeline_in_order() -> None:
    result = subprocess.run([sys.executable, "-m", "jobs"], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("  ") and not line.startswith("  -")]
    assert [line.split()[0] for line in lines] == JOBS
    assert all(re.fullmatch(r"  \w+ +[A-Z].*[.]", line) for line in lines)
    steps = [name for name in JOBS if summaries()[name].startswith("Step")]
    assert JOBS[: len(steps) + 1] == ["pipeline", *steps]
    assert steps[:5] == ["train_base", "build_dataset", "train_estimator", "finetune_classifier", "certify"]


def test_list_that_nobody_reads_to_its_end_is_no_error() -> None:
    """As behind `| head`, which may be gone before the list comes."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", "jobs", "--names"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_list_and_help_load_neither_torch_nor_ray() -> None:
    code = (
        "import importlib, sys, jobs.__main__ as m; m.main(); print({'pyarrow', 'torch', 'ray'} & set(sys.modules))\n"
        "for name in m.summaries(): importlib.import_module(f'jobs.{name}')\n"
        "print({'torch', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-2:] == ["set()", "set()"]


@pytest.mark.parametrize("name", ["status", "jobs.status"])
def test_list_with_a_name_runs_the_job_with_its_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["jobs", name, "--out", str(tmp_path)])
    assert main() == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["jobs", name, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "usage: python -m jobs.status" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raport", "error: no job 'raport'; did you mean python -m jobs.report?\n"),
        ("xyz", "error: no job 'xyz'; known: pipeline, "),
        ("_cli.x", "error: no job '_cli.x'; known: pipeline, "),
    ],
)
def test_name_that_no_job_has_gets_the_nearest_one(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs", name])
    assert main() == 2
    assert capsys.readouterr().err.startswith(message)
    result = call(name)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def parsed(job: str) -> argparse.ArgumentParser:
    parser = job_parser(job, "Says what it does.")
    parser.add_argument("--count", type=number, default=0)
    return parser


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (ConfigError("seed: is wrong"), 2, "error: seed: is wrong\n"),
        (DataError("image 7 is broken"), 3, "error: image 7 is broken\n"),
        (ModelError("no weights"), 3, "error: no weights\n"),
        (OSError(28, "No space left on device", "/full"), 3, "error: a file or the storage failed: [Errno 28] No "),
        (KeyboardInterrupt(), 130, "interrupted; what is committed stays"),
    ],
)
def test_run_job_ends_with_the_code_and_one_line(
    error: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["job", "--out", "run"])
    assert run_job(parsed("report"), run) == code
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert len(err.splitlines()) == (error is not None)
    monkeypatch.setattr(sys, "argv", ["job", "--out", "run", "--debug"])
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            run_job(parsed("report"), run)


def test_run_job_count_below_zero_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--out", "run", "--count", "-1"])
    with pytest.raises(SystemExit) as ended:
        run_job(parsed("report"), lambda args: None)
    assert ended.value.code == 2
    assert "--count: invalid number value: '-1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "{tmp}/run"], "name a configuration with --config"),
        (["--out", "{tmp}/run", "--config", "nowhere.yaml"], "cannot read the configuration 'nowhere.yaml'"),
        (["--out", "{tmp}/run", "--config", "configs/digits.yaml", "sigma_e=0.1"], "sigma_e: must be at least"),
        (["--out", "{tmp}/run", "--config", "configs/digits.yaml"], "run the earlier steps"),
        (["--config", "configs/digits.yaml"], "required: --out"),
    ],
)
def test_certify_bad_input_is_one_message_and_an_exit_code(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_main(certify, "--method", "dual", *(arg.format(tmp=tmp_path) for arg in args)) == 2
    assert message in (said := capsys.readouterr().err)
    assert "Traceback" not in said


def test_pipeline_small_run_then_again_then_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = parse_config(
        PLAIN,
        [
            "compute.executor=local", "dataset.test_size=800", "dataset.train.first=300", "dataset.test.first=100",
            "base.denoiser.train.steps=40", "base.classifier.train.epochs=5", "estimator.epochs=2", "finetune.epochs=1",
            "finetune.num_sigma_draws=20", "labels.num_selection=5", "labels.num_estimation=20",
            "certify.num_selection=5", "certify.num_estimation=20", "certify.multiscale=true",
        ],
    )  # fmt: skip
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
    for name in ("report.md", "report.html", "certified_accuracy.png", "table.csv", "headroom.csv"):
        assert (run.path / "report" / name).stat().st_size > 0
    stamps = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.*") if "report" not in p.parts and p.name != "card.md"}
    pipeline.run(RunDirectory(run.path, None))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "a finished step was run again"
    assert run_main(report, "--out", str(run.path), "report.radii=[0.1]") == 0

    audited = call("audit", "--out", str(run.path), "--replay", "5")
    assert (audited.returncode, audited.stdout.splitlines()[-1]) == (0, "nothing found")
    assert run_main(recertify, "--out", str(run.path), "alpha=1e-3", "claim=agreement") == 0
    (headroom,) = (run.path / "recertified").glob("*/report/headroom.csv")
    assert headroom.stat().st_size > 0
    capfd.readouterr()
    assert run_main(recertify, "--out", str(run.path), "beta=1") == 2
    known = "alpha, claim, router, share, sigmas, split"
    assert capfd.readouterr().err == f"error: unknown beta; known: {known}\n"
    (run.path / "dataset" / ShardStore(run.path, "dataset").files()[0]).unlink()
    assert run_main(audit, "--out", str(run.path)) == 3
    assert re.search(r"dataset: part-000000-0000\d\d.parquet: is missing", capfd.readouterr().err)


def test_pipeline_certifies_what_is_claimed() -> None:
    certified = [
        [name for name in pipeline.steps_of(parse_config(PLAIN, values)) if name.startswith("certify")]
        for values in ([], ["certify.claim=agreement"])
    ]
    assert certified == [["certify-standard", "certify-dual"], ["certify-standard", "certify-agreement"]]


def test_jobs_that_only_look_leave_the_run_directory_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local")
    build_dataset.run(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for job in (status, audit):
        assert run_main(job, "--out", str(run.path), "compute.max_replicas=3") == 0
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert run_main(status, "--out", str(tmp_path / "none"), "--config", str(ROOT / "configs/digits.yaml")) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_job_that_cannot_write_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(build_dataset, "--out", "/proc/run", "--config", str(ROOT / "configs/digits.yaml")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write to '/proc/run'")
