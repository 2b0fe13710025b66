"""What travels with `ray job submit --working-dir .`, by Ray's own rules, and what a job says of the rest."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from core.config import parse_config
from core.errors import ConfigError
from distributed.cluster.upload import LEFT_OUT, check_upload
from distributed.files.storage import Folder
from jobs import build_dataset
from tests.helpers.tiny import PLAIN, run_main

ROOT = Path(__file__).parents[3]


def travels(root: Path, names: list[str]) -> set[str]:
    """Those files of a working directory that Ray uploads."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    shutil.copy(ROOT / ".gitignore", root / ".gitignore")
    excludes = yaml.safe_load((ROOT / "deploy/runtime_env.yaml").read_text())["excludes"]
    match = packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])
    found: list[Path] = []
    packaging._dir_travel(root, [match], found.append, include_gitignore=True)
    return {path.relative_to(root).as_posix() for path in found if path.is_file()} - {".gitignore"}


def test_upload_leaves_out_folders_of_the_checkout_and_none_of_the_data(tmp_path: Path) -> None:
    stays = [f"{name}/deep/x.png" for name in (*LEFT_OUT, ".git", ".venv", "dual_rs.egg-info")]
    stays += ["core/__pycache__/x.pyc", "bench/results.json"]
    goes = [f"own/{name}/x.png" for name in (*LEFT_OUT, "dual_rs.egg-info")]
    goes += ["core/a.py", "configs/digits.yaml", "my_models.py", "constraints.txt", "core/data/x.py"]
    assert travels(tmp_path, [*stays, *goes]) == set(goes)


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job in Ray's copy of the working directory."""
    package = tmp_path / "_ray_pkg_0123"
    package.mkdir()
    monkeypatch.chdir(package)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    return package


OWN = (
    "base.denoiser=runs/a/denoiser.safetensors",
    "base.classifier={checkpoint: checkpoints/c.safetensors}",
    "estimator.backbone={checkpoint: s3://bucket/b.safetensors}",
)


def test_check_upload_names_each_file_that_stayed_at_home(submitted: Path, tmp_path: Path) -> None:
    out, config = Folder(tmp_path / "run"), parse_config(PLAIN, OWN)
    steps = ["train_base", "train_estimator"]
    with pytest.raises(
        ConfigError, match=r"^base.denoiser.checkpoint: 'runs/a/den.*', base.classifier.check"
    ) as caught:
        check_upload(config, steps, out)
    assert "s3://bucket/b" not in str(caught.value)
    (submitted / "checkpoints").mkdir()
    (submitted / "checkpoints/c.safetensors").touch()
    with pytest.raises(ConfigError, match=r"^base.denoiser.checkpoint: 'runs/a/denoiser.safetensors': not on "):
        check_upload(config, steps, out)
    check_upload(config, ["certify-dual"], out)  # from the run directory
    for name, refused in (("google/ddpm", False), ("runs/ddpm", True), ("a/b/ddpm", True), ("none", False)):
        own = parse_config(PLAIN, [f"base.denoiser={name}"])
        if not refused:
            check_upload(own, steps, out)
            continue
        with pytest.raises(ConfigError, match=r"base\.denoiser"):
            check_upload(own, steps, out)
    with pytest.raises(
        ConfigError, match=r"^estimator.backbone.checkpoint: '/nowhere/b': not on .* absolute path that"
    ):
        check_upload(parse_config(PLAIN, ["estimator.backbone={checkpoint: /nowhere/b}"]), ["train_estimator"], out)
    data = parse_config(PLAIN | {"dataset": {"name": "cifar10", "path": "data/cifar", "test": {"ids_file": "ids"}}})
    with pytest.raises(ConfigError, match=r"^dataset.path: 'data/cifar', dataset.test.ids_file: 'ids'"):
        check_upload(data, ["certify-dual"], out)


def test_check_upload_run_directory_in_rays_copy_is_refused(submitted: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: 'runs/a' would lie in Ray's temporary copy"):
        check_upload(parse_config(PLAIN), [], Folder("runs/a"))
    check_upload(parse_config(PLAIN), [], Folder("s3://bucket/run"))


def test_job_whose_files_stayed_at_home_says_so_in_its_first_line(
    submitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(PLAIN))
    assert run_main(build_dataset, "--config", str(config), "--out", str(tmp_path / "run"), *OWN) == 2
    assert capsys.readouterr().err.startswith(
        "error: base.denoiser.checkpoint: 'runs/a/denoiser.safetensors', base.classifier"
    )
