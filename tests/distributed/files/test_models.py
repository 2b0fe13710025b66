"""Models from object stores, from the hub, and from this machine: what is fetched, hashed and refused."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow.fs as pafs
import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects

from core.config import parse_config
from core.errors import ConfigError, ModelError
from core.models.checkpoints import load_model
from core.models.classifiers import ImageClassifier
from core.models.diffusers_folder import write_folder
from core.models.hub import is_hub_name
from core.models.resnet_cifar import ResNetCifar
from distributed.checks.preflight import check
from distributed.files.models import fetch_model, model_sha256
from distributed.files.storage import Folder
from distributed.store.run_directory import RunDirectory
from distributed.store.sources import local_models
from jobs import train_base
from tests.core.models.test_diffusers_folder import tiny_denoiser
from tests.helpers.s3 import FlakyProxy, uri
from tests.helpers.tiny import PLAIN


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A denoiser's folder and a ResNet-110, and a temporary folder without copies of others."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    write_folder(tiny_denoiser(), tmp_path / "denoiser")
    torch.manual_seed(0)
    torch.save(ResNetCifar(10, channels=1).state_dict(), tmp_path / "resnet.pt")
    return tmp_path


def upload(source: Path, server: FlakyProxy, key: str) -> str:
    folder = Folder(uri(server, key))
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.is_file():
            name = path.name if source.is_file() else path.relative_to(source).as_posix()
            (folder.parent if source.is_file() else folder).write(name, path.read_bytes())
    return folder.uri


def config_of(denoiser: object, resnet: object) -> Any:
    classifier = f"{{arch: resnet110, checkpoint: '{resnet}', mean: [0.3], std: [0.7]}}"
    return parse_config(PLAIN, [f"base.denoiser={denoiser}", f"base.classifier={classifier}", "dataset.test_size=20"])


def test_models_of_a_store_are_fetched_once_and_noted(
    local: Path, server: FlakyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    (local / "denoiser" / "tf_model.h5").write_bytes(b"of no use")
    denoiser = upload(local / "denoiser", server, "once/denoiser")
    resnet = upload(local / "resnet.pt", server, "once/resnet.pt")
    config = config_of(denoiser, resnet)
    assert check(RunDirectory(local / "run", config, "dry"), ["train_base"]).problems == []
    fetched = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fetching")]
    assert sorted(line.split()[1].partition("/once/")[2].partition("?")[0] for line in fetched) == [
        "denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors", "denoiser/scheduler_config.json",
        "resnet.pt",
    ]  # fmt: skip
    directory = RunDirectory(local / "run", config)
    train_base.run(directory)
    assert "fetching" not in capsys.readouterr().out
    classifier = load_model(directory.model("classifier"))
    assert isinstance(classifier, ImageClassifier)
    weights = torch.load(local / "resnet.pt", weights_only=True)
    assert all(torch.equal(value, weights[key]) for key, value in classifier.net.state_dict().items())
    manifest = RunDirectory(local / "run", None, "look").manifest
    assert manifest["sources"] == {
        "base.denoiser.checkpoint": {"named": denoiser, "sha256": model_sha256(local / "denoiser")},
        "base.classifier.checkpoint": {"named": resnet, "sha256": model_sha256(local / "resnet.pt")},
    }
    taken = manifest["steps"]["train_base"]["taken"]
    assert (taken["denoiser"]["checkpoint"], taken["classifier"]["checkpoint"]) == (denoiser, resnet)


def test_weights_of_a_store_bring_what_is_said_beside_them(local: Path, server: FlakyProxy) -> None:
    """A file of a hub's folder, named itself: its normalisation is in another one."""
    (local / "vit").mkdir()
    for name in ("model.safetensors", "preprocessor_config.json", "pytorch_model.bin"):
        (local / "vit" / name).write_text(name)
    there = fetch_model(upload(local / "vit", server, "beside/vit").replace("/vit", "/vit/model.safetensors"))
    assert {path.name for path in there.parent.iterdir()} == {"model.safetensors", "preprocessor_config.json"}
    before = model_sha256(there)
    assert before == model_sha256(local / "vit" / "model.safetensors")
    (local / "vit" / "preprocessor_config.json").write_text("another")
    assert model_sha256(local / "vit" / "model.safetensors") != before


@pytest.mark.parametrize("place", ["local", "file", "s3"])
def test_model_that_changed_under_its_address_is_refused(place: str, local: Path, server: FlakyProxy) -> None:
    """The step was begun and has not finished."""
    resnet = local / "resnet.pt"
    named = {"local": str(resnet), "file": f"file://{resnet}"}.get(place) or upload(resnet, server, "changed/resnet.pt")
    config = config_of(local / "denoiser", named)
    local_models(RunDirectory(local / "run", config), "base")
    local_models(RunDirectory(local / "run", config), "base")
    torch.save(ResNetCifar(10, channels=1).state_dict(), resnet)
    if place == "s3":
        time.sleep(1.1)  # its dates are whole seconds, and the size is the same
        upload(resnet, server, "changed/resnet.pt")
    with pytest.raises(ConfigError, match=r"base.classifier.checkpoint: .* is not the file that .* began with"):
        local_models(RunDirectory(local / "run", config), "base")
    (problem,) = check(RunDirectory(local / "run", config, "dry"), ["train_base"]).problems
    assert str(problem).startswith("base.classifier.checkpoint: ")
    local_models(RunDirectory(local / "other", config), "base")


def test_model_that_no_store_has_is_refused_with_its_key(local: Path, server: FlakyProxy) -> None:
    config = config_of(uri(server, "nothing/x.pt"), "checkpoints/vit")
    problems = check(RunDirectory(local / "run", config, "dry"), ["train_base"]).problems
    first, second = map(str, problems)
    assert first.startswith("base.denoiser: no checkpoint at 's3://bucket/nothing/x.pt")
    assert (
        second
        == "base.classifier: no checkpoint at 'checkpoints/vit'; look at the path (jobs.fetch gets published files)"
    )


def test_copy_of_a_store_is_whole_or_not_there(
    local: Path, server: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(local / "resnet.pt", server, "whole/resnet.pt")

    def broken(source: Any, target: Any, length: int) -> None:
        target.write(source.read(1000))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", broken)
        with pytest.raises(Exception, match="got 1,000 bytes of"):
            fetch_model(address)
    assert [path for path in (local / "tmp").rglob("*") if path.is_file()] == []
    assert fetch_model(address).read_bytes() == (local / "resnet.pt").read_bytes()


@pytest.mark.parametrize("safe", [True, False])
def test_model_of_the_hub_brings_no_pickle_where_there_are_safetensors(
    safe: bool, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["config.json", "pytorch_model.bin", "tf_model.h5", "README.md", *(["model.safetensors"] if safe else [])]

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/vit"
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (local / "snapshot").mkdir(exist_ok=True)
            (local / "snapshot" / file).write_text(file)
        return str(local / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    there = {path.name for path in fetch_model("someone/vit").iterdir()}
    assert there == {"config.json", "model.safetensors" if safe else "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("named", "hub"),
    [
        ("google/ddpm-cifar10-32", True),
        ("checkpoints/vit", False),
        ("google/x.pt", False),
        ("a/b/c", False),
        ("s3://bucket/x", False),
        ("vit", False),
        ("./vit", False),
    ],
)
def test_is_hub_name(named: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(named) is hub
    if hub:  # a folder of that name comes first, and is asked for where its parent is there
        Path(named.partition("/")[0]).mkdir()
        assert not is_hub_name(named)


def test_folder_without_weights_is_refused_as_an_address(server: FlakyProxy, local: Path) -> None:
    (local / "empty").mkdir()
    (local / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no such file, and no folder with one of model.safetensors"):
        fetch_model(upload(local / "empty", server, "empty/vit"))
    system = Folder(uri(server, "x"))._place[0]
    assert system.get_file_info("bucket/empty/vit/config.json").type == pafs.FileType.File
