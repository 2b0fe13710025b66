"""Networks of the user's own code through every job, in this process and on replicas and workers of Ray."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import ModelError
from core.files import file_sha256
from core.models.checkpoints import load_model
from distributed.store.run_directory import RunDirectory
from jobs import audit, pipeline
from tests.helpers.miniatures import SMALL
from tests.helpers.tiny import run_main

ROOT = Path(__file__).parents[2]
SOURCE = """
from torch import nn

class Noise(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images, t):
        return self.layer(images)

def classifier(num_classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))

def noise(channels):
    return Noise(channels)
"""
KEYS = (
    *SMALL,
    "sigmas=[0.25, 0.5]",
    "dataset.test_size=1700",
    "dataset.test={share: 0.01}",
    "base.denoiser={arch: 'own_jobs:noise', schedule: linear-1000}",
    "base.classifier={arch: 'own_jobs:classifier', train: {epochs: 1}}",
    "estimator.backbone={arch: 'own_jobs:classifier'}",
    "estimator.label_radius=shrunk",
)


def config(folder: Path, *more: str) -> list[str]:
    """The command line of a small run on the digits."""
    (folder / "c.yaml").write_text("sigmas: [0.25, 0.5]\n")
    return ["--config", str(folder / "c.yaml"), "--out", str(folder / "run"), *KEYS, *more]


@pytest.mark.slow
def test_own_code_goes_through_every_step_and_a_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "own_jobs.py"
    source.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_main(pipeline, *config(tmp_path)) == 0, capsys.readouterr().err
    digest = file_sha256(source)
    directory = RunDirectory(tmp_path / "run", None, "look")
    assert directory.manifest["sources"] == {
        "base.denoiser.arch": {"named": "own_jobs:noise", "sha256": digest},
        "base.classifier.arch": {"named": "own_jobs:classifier", "sha256": digest},
        "estimator.backbone.arch": {"named": "own_jobs:classifier", "sha256": digest},
    }
    assert digest in directory.manifest["steps"]["train_base"]["taken"]["classifier"]["code"]
    for name in ("denoiser", "classifier", "classifier_finetuned", "estimator"):
        with pytest.raises(ModelError, match="names code"):
            load_model(directory.model(name))
    assert run_main(audit, "--out", str(tmp_path / "run"), "--replay", "3") == 0

    # Another source: what has still to be run is refused before it begins.
    source.write_text(SOURCE.replace("nn.ReLU()", "nn.Tanh()"))
    del sys.modules["own_jobs"]
    importlib.invalidate_caches()
    (tmp_path / "run/models/classifier_finetuned.safetensors").unlink()
    capsys.readouterr()
    assert run_main(pipeline, *config(tmp_path)) != 0
    error = capsys.readouterr().err
    assert "own_jobs.py on " in error
    assert "put the source back as it was" in error


@pytest.fixture
def started(tmp_path: Path) -> Callable[[Path, Path], subprocess.CompletedProcess[str]]:
    """Runs the pipeline in a Ray of its own; the driver finds modules of one folder, and works in another."""
    script = tmp_path / "script" / "start.py"
    script.parent.mkdir()
    script.write_text(
        "import sys\nsys.path.append(sys.argv.pop(1))\nfrom jobs import pipeline\nsys.exit(pipeline.main())\n"
    )

    def start(modules: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        more = ("compute.executor=ray", "compute.max_replicas=2", "compute.train_workers=1")
        command = [sys.executable, str(script), str(modules), *config(tmp_path, *more)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)

    return start


@pytest.mark.slow
def test_own_code_runs_on_replicas_and_training_workers_that_can_import_it(
    tmp_path: Path, started: Callable[[Path, Path], subprocess.CompletedProcess[str]]
) -> None:
    """The working directory is on the path of Ray's workers, other folders of the driver are not."""
    (tmp_path / "work").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "own_jobs.py").write_text(SOURCE)
    refused = started(tmp_path / "hidden", tmp_path / "work")
    assert refused.returncode == 3
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot import 'own_jobs' on " in line
    assert "working directory" in line
    (tmp_path / "hidden" / "own_jobs.py").rename(tmp_path / "work" / "own_jobs.py")
    done = started(tmp_path / "work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"]
    assert {"train_base", "build_dataset", "train_estimator", "finetune_classifier", "certify-dual"} <= steps.keys()
