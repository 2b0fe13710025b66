"""Models of one's own through the jobs that use them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import parse_config
from core.data import Dataset
from core.errors import ModelError
from core.models.checkpoints import build_denoiser, load_model
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser, trained_unet_config
from core.models.diffusers_folder import write_folder
from core.models.resnet_cifar import ResNetCifar
from core.models.small import SmallConvNet
from distributed.checks.dry_run import dry_run
from distributed.store.run_directory import RunDirectory
from jobs import train_base, train_estimator
from tests.core.models.test_diffusers_folder import tiny_denoiser
from tests.helpers.tiny import PLAIN


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A denoiser folder, and a ResNet-110 for grey images with 12 classes."""
    write_folder(tiny_denoiser(), tmp_path / "denoiser")
    torch.manual_seed(0)
    torch.save(ResNetCifar(12, channels=1).state_dict(), tmp_path / "resnet.pt")
    return tmp_path


LABELS = "label_map: [0,1,2,3,4,5,6,7,8,11]"


def own(models: Path, *overrides: str) -> RunDirectory:
    classifier = f"{{arch: resnet110, checkpoint: {models / 'resnet.pt'}, mean: [0.3], std: [0.7], {LABELS}}}"
    given = [f"base.denoiser={models / 'denoiser'}", f"base.classifier={classifier}", "dataset.test_size=50"]
    return RunDirectory(models / "run", parse_config(PLAIN, [*given, *overrides]))


def test_train_base_own_models_are_copied_into_the_run(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = own(models)
    train_base.run(directory)
    assert isinstance(load_model(directory.model("denoiser")), OneShotDenoiser)
    classifier = load_model(directory.model("classifier"))
    assert isinstance(classifier, ImageClassifier)
    weights = torch.load(models / "resnet.pt", weights_only=True)
    assert torch.equal(classifier.net.state_dict()["conv1.weight"], weights["conv1.weight"])
    assert classifier(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    taken = RunDirectory(directory.path, None, "look").manifest["steps"]["train_base"]["taken"]
    assert taken["denoiser"]["schedule"] == "linear-1000 (scheduler_config.json)"
    assert (taken["classifier"]["mean"], taken["classifier"]["weights"]) == (
        "[0.3] (the configuration)",
        "all of the file",
    )
    assert taken["classifier"]["labels"] == "label_map of the configuration"
    assert f"classifier: taken as checkpoint {models / 'resnet.pt'}; weights all of the file" in capsys.readouterr().out


def test_train_base_outputs_are_taken_by_the_names_of_the_data_sets_classes(models: Path) -> None:
    """The checkpoint has the digits the other way round, and two more."""
    names = [*"9876543210", "x", "y"]
    weights = torch.load(models / "resnet.pt", weights_only=True)
    torch.save({"state_dict": weights, "classes": names}, models / "resnet.pt")
    directory = own(models, "base.classifier.label_map=null")
    for split in ("train", "test"):
        data = directory.data(split)
        directory._data[split] = replace(data, class_names=tuple("0123456789")), data.digest()
    train_base.run(directory)
    classifier = load_model(directory.model("classifier"))
    assert isinstance(classifier, ImageClassifier)
    assert classifier.spec["label_map"] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_train_base_models_that_do_not_fit_the_data_are_refused(models: Path) -> None:
    with pytest.raises(ModelError, match="has 12 classes, 10 are needed"):
        train_base.run(own(models, "base.classifier.label_map=null"))
    write_folder(build_denoiser(trained_unet_config(3, 8)), models / "colour")
    with pytest.raises(ModelError, match="takes images of 3 channels, got 1"):
        train_base.run(RunDirectory(models / "other", parse_config(PLAIN, [f"base.denoiser={models / 'colour'}"])))


def test_train_estimator_backbone_takes_a_checkpoint_with_another_head(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def radii(directory: RunDirectory, train: Dataset) -> np.ndarray:
        values = np.zeros((len(train), 2))
        values[:40, 0], values[20:40, 1] = 0.3, 0.4
        return values

    monkeypatch.setattr("distributed.training.labels.training_radii", radii)
    backbone = f"estimator.backbone={{arch: resnet110, checkpoint: {models / 'resnet.pt'}, mean: [0.5], std: [0.5]}}"
    directory = own(models, backbone, "estimator.epochs=1", "estimator.lr=0.00001")
    train_base.run(directory)
    train_estimator.run(directory)
    assert "checkpoint's last layer is replaced by a new one with 2 outputs" in capsys.readouterr().out
    estimator = load_model(directory.model("estimator"))
    assert isinstance(estimator, ImageClassifier)
    assert estimator.num_outputs == 2
    start = torch.load(models / "resnet.pt", weights_only=True)["layer1.0.conv1.weight"]
    assert float((estimator.net.state_dict()["layer1.0.conv1.weight"] - start).abs().max()) < 1e-3


POOL = "base.experts={0.25: {width: 4, train: {epochs: 3}}, 0.5: {width: 8, train: {epochs: 3}}}"


def test_train_base_pool_has_an_expert_of_its_own_architecture_for_each_sigma(tmp_path: Path) -> None:
    small = ["base.denoiser.train.steps=3", "compute.executor=local"]
    directory = RunDirectory(tmp_path / "run", parse_config(PLAIN, [POOL, *small]))
    train_base.run(directory)
    for role, width in (("classifier-0.25", 4), ("classifier-0.5", 8)):
        expert = load_model(directory.model(role))
        assert isinstance(expert, SmallConvNet)
        assert expert.spec["width"] == width
    assert not directory.model("classifier").exists()
    assert set(directory.manifest["steps"]["train_base"]["clean_accuracy"]) == {"classifier-0.25", "classifier-0.5"}


def test_dry_run_counts_the_training_of_every_expert_and_says_what_each_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["base.denoiser.train.steps=3", "compute.executor=local"]
    dry_run(RunDirectory(tmp_path / "run", parse_config(PLAIN, [POOL, *small]), "dry"), ["train_base"], None, 0.05)
    out = capsys.readouterr().out
    for role, width in (("classifier-0.25", 4), ("classifier-0.5", 8)):
        line = next(line for line in out.splitlines() if line.startswith(f"train_base, {role}"))
        assert f"{3 * 97}" in line.split()
        num = sum(tensor.numel() for tensor in SmallConvNet(1, 8, 10, width).state_dict().values())
        assert any(text.startswith(role) and f"{num:,} parameters" in text for text in out.splitlines())


def test_dry_run_counts_the_copies_that_a_head_on_features_computes_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["backbone=features", "feature_copies=3", "holdout=0.2", "holdout_copies=5", "epochs=50"]
    config = parse_config(PLAIN, [POOL, "compute.executor=local", *(f"estimator.{key}" for key in keys)])
    run = RunDirectory(tmp_path / "run", config, "dry")
    dry_run(run, ["train_base", "build_dataset", "train_estimator"], None, 0.05)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("train_estimator"))
    assert f"{78 * 3 + 19 * 5}" in line.split()
    assert "not measured" not in out
    assert any(line.startswith("estimator") and "from features" in line for line in out.splitlines())
