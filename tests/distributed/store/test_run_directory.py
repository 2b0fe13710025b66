import json
from pathlib import Path

import pytest

from core.config import parse_config
from core.errors import ConfigError
from core.files import file_sha256
from distributed.store.run_directory import RunDirectory

PLAIN = {"sigmas": [0.25, 0.5], "report": {"radii": [0, 0.5]}}


def test_run_directory_opened_again_remembers_its_configuration(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run", parse_config(PLAIN, ["seed=4"]))
    assert RunDirectory(tmp_path / "run", None).config == first.config
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert manifest["versions"]["torch"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["manifest.json"]


def test_run_directory_other_configuration_is_refused_with_each_difference(tmp_path: Path) -> None:
    RunDirectory(tmp_path, parse_config(PLAIN))
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path, parse_config(PLAIN, ["seed=1", "certify.alpha=0.01"]))
    assert "certify.alpha: 0.001 there, 0.01 now" in str(caught.value)
    assert "seed: 0 there, 1 now" in str(caught.value)
    RunDirectory(tmp_path, parse_config(PLAIN, ["report.radii=[0.1]", "compute.max_replicas=1"]))
    assert RunDirectory(tmp_path, None).config.report.radii == (0.1,)


def test_run_directory_without_manifest_or_with_a_foreign_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a configuration with --config"):
        RunDirectory(tmp_path, None)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a manifest of ours"):
        RunDirectory(tmp_path, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": []},
        {"steps": ["train_base"]},
        {"steps": None},
        {"steps": {"train_base": []}},
        {"steps": {"train_base": {"read": {}}}},
        {"steps": {"train_base": {"read": {}, "wrote": []}}},
        {"data": []},
        {"config": []},
    ],
)
def test_run_directory_with_a_manifest_of_other_types_says_so_in_one_line(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    RunDirectory(tmp_path, parse_config(PLAIN))
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ConfigError, match="is not a manifest of ours") as caught:
        RunDirectory(tmp_path, None)
    assert "\n" not in str(caught.value)


def test_is_done_only_with_the_models_that_were_used(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, parse_config(PLAIN))
    with pytest.raises(ConfigError, match="is not there yet"):
        run.model_hashes(["classifier"])
    run.model("classifier").parent.mkdir()

    def train(content: str) -> str:
        run.model("classifier").write_text(content)
        digest = file_sha256(run.model("classifier"))
        run.finish("train", read={}, wrote={"classifier": digest}, facts={})
        return digest

    first = train("x")
    assert run.is_done("train", writes=("classifier",))
    run.finish("use", read={"classifier": first}, wrote={}, facts={})
    assert RunDirectory(tmp_path, None).is_done("use", ("classifier",))
    run.model("classifier").write_text("tampered")
    with pytest.raises(ConfigError, match="is not the file that this run wrote"):
        run.is_done("use", ("classifier",))
    train("y")
    assert not run.is_done("use", ("classifier",))
    other = RunDirectory(tmp_path, None)
    run.finish("one", read={}, wrote={}, facts={})
    other.finish("two", read={}, wrote={}, facts={})
    assert {"one", "two", "train", "use"} <= set(RunDirectory(tmp_path, None).manifest["steps"])
    run.model("classifier").unlink()
    assert not run.is_done("train", writes=("classifier",))
