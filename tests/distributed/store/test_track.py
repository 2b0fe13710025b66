"""Trackers: the real libraries, offline, where they are installed; a failing one; none."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.config import parse_config
from core.errors import ConfigError
from distributed.store import track
from distributed.store.run_directory import RunDirectory
from distributed.store.track import check_tracker, tracked
from tests.helpers.tiny import PLAIN

SECRET = "0123456789abcdef0123456789abcdef01234567"


def run_with(path: Path, kind: str) -> RunDirectory:
    return RunDirectory(path / "run", parse_config(PLAIN, [f"track={kind}"]))


def follow(run: RunDirectory, folder: Path) -> None:
    """Two jobs of a run: a training, and a report."""
    with tracked(run) as tracker:
        for epoch, loss in ((1, 0.5), (2, 0.25)):
            tracker.log_metrics({"train_base-classifier/loss": loss}, epoch)
    with tracked(run) as tracker:
        tracker.log_metrics({"certified_accuracy/Dual RS/0.25": 0.625})
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("the page")
        tracker.log_artifact(folder, "report")


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_metrics_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = run_with(tmp_path, "mlflow")
    follow(run, tmp_path / "page")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dual-rs")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params == {"dataset": "digits", "sigmas": "0.25, 0.5", "seed": "0"}
    history = client.get_metric_history(found.info.run_id, "train_base-classifier/loss")
    assert [(each.step, each.value) for each in history] == [(1, 0.5), (2, 0.25)]
    assert found.data.metrics["certified_accuracy/Dual RS/0.25"] == 0.625
    page = client.download_artifacts(found.info.run_id, "report/report.html", str(tmp_path))
    assert Path(page).read_text() == "the page"


@pytest.mark.slow
def test_wandb_offline_has_the_metrics_and_the_report_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_API_KEY": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "own"))
    monkeypatch.setattr("sys.argv", ["jobs.report", f"--secret={SECRET}"])
    follow(run_with(tmp_path, "wandb"), tmp_path / "page")
    logs = [file.read_bytes() for file in tmp_path.rglob("run-*.wandb")]
    assert len(logs) == 2
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET.encode() not in everything
    for word in (b"train_base-classifier/loss", b"certified_accuracy/Dual RS/0.25", b"0.625", b"report.html"):
        assert any(word in log for log in logs), word


@pytest.mark.slow
def test_wandb_without_a_key_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with (
        pytest.raises(ConfigError, match=r"track: wandb does not start: .*WANDB_API_KEY, WANDB_MODE=offline"),
        tracked(run_with(tmp_path, "wandb")),
    ):
        pass


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_tracker_that_is_not_installed_says_what_to_install(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else find(name))
    with pytest.raises(ConfigError, match=f"track: {kind} is not installed: python -m pip install {kind}"):
        check_tracker(parse_config(PLAIN, [f"track={kind}"]))
    check_tracker(parse_config(PLAIN, []))


def test_tracker_that_fails_is_left_alone_after_one_warning_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def __init__(self, name: str, run: str, facts: Mapping[str, object]) -> None:
            if name == "no":
                raise ConnectionError("no answer from https://user:secret@host/api?key=secret")

        def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
            raise ConnectionError("no answer from https://user:secret@host/api?key=secret")

    monkeypatch.setattr(track, "_BACKENDS", {"wandb": Failing})
    monkeypatch.setattr(track, "check_tracker", lambda config: None)
    with caplog.at_level(logging.WARNING), tracked(run_with(tmp_path, "wandb")) as tracker:
        tracker.log_metrics({"a/b": 1.0})
        tracker.log_metrics({"a/b": 1.0})
        tracker.log_artifact(tmp_path, "report")
    (line,) = caplog.messages
    assert line.startswith("track: wandb failed")
    assert "secret" not in line
    named = RunDirectory(tmp_path / "no", parse_config(PLAIN, ["track=wandb"]))
    with pytest.raises(ConfigError, match="does not start") as refused, tracked(named):
        pass
    assert "secret" not in str(refused.value)


def test_track_is_no_part_of_the_identity_of_a_run() -> None:
    plain, told = parse_config(PLAIN, []), parse_config(PLAIN, ["track=mlflow"])
    assert plain.identity() == told.identity()
    assert plain.fingerprint() == told.fingerprint()
