"""Models of one's own through the jobs that use them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import parse_config
from core.data import Dataset
from core.errors import ModelError
from core.models.checkpoints import build_denoiser, load_model
from core.models.classifiers import ImageClassifier
from core.models.denoiser import OneShotDenoiser, small_unet_config
from core.models.diffusers_folder import write_folder
from core.models.resnet_cifar import ResNetCifar
from distributed.run_directory import RunDirectory
from jobs import train_base, train_estimator
from tests.test_models import tiny_denoiser
from tests.tiny import PLAIN


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A denoiser folder, and a ResNet-110 for grey images with 12 classes."""
    write_folder(tiny_denoiser(), tmp_path / "denoiser")
    torch.manual_seed(0)
    torch.save(ResNetCifar(12, channels=1).state_dict(), tmp_path / "resnet.pt")
    return tmp_path


def own(models: Path, *overrides: str) -> RunDirectory:
    classifier = f"{{arch: resnet110, checkpoint: {models / 'resnet.pt'}, label_map: [0,1,2,3,4,5,6,7,8,11]}}"
    given = [f"base.denoiser={models / 'denoiser'}", f"base.classifier={classifier}", "dataset.test_size=50"]
    return RunDirectory(models / "run", parse_config(PLAIN, [*given, *overrides]))


def test_train_base_own_models_are_copied_into_the_run(models: Path) -> None:
    directory = own(models)
    train_base.run(directory)
    assert isinstance(load_model(directory.model("denoiser")), OneShotDenoiser)
    classifier = load_model(directory.model("classifier"))
    assert isinstance(classifier, ImageClassifier)
    weights = torch.load(models / "resnet.pt", weights_only=True)
    assert torch.equal(classifier.net.state_dict()["conv1.weight"], weights["conv1.weight"])
    assert classifier(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_train_base_models_that_do_not_fit_the_data_are_refused(models: Path) -> None:
    with pytest.raises(ModelError, match="has 12 classes, 10 are needed"):
        train_base.run(own(models, "base.classifier.label_map=null"))
    write_folder(build_denoiser(small_unet_config(3, 8)), models / "colour")
    with pytest.raises(ModelError, match="takes images of 3 channels, got 1"):
        train_base.run(RunDirectory(models / "other", parse_config(PLAIN, [f"base.denoiser={models / 'colour'}"])))


def test_train_estimator_backbone_takes_a_checkpoint_with_another_head(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def radii(directory: RunDirectory, train: Dataset) -> np.ndarray:
        values = np.zeros((len(train), 2))
        values[:40, 0], values[20:40, 1] = 0.3, 0.4
        return values

    monkeypatch.setattr("distributed.labels.training_radii", radii)
    backbone = f"estimator.backbone={{arch: resnet110, checkpoint: {models / 'resnet.pt'}}}"
    directory = own(models, backbone, "estimator.epochs=1", "estimator.lr=0.00001")
    train_base.run(directory)
    train_estimator.run(directory)
    assert "checkpoint's last layer is replaced by a new one with 2 outputs" in capsys.readouterr().out
    estimator = load_model(directory.model("estimator"))
    assert isinstance(estimator, ImageClassifier)
    assert estimator.num_outputs == 2
    start = torch.load(models / "resnet.pt", weights_only=True)["layer1.0.conv1.weight"]
    assert float((estimator.net.state_dict()["layer1.0.conv1.weight"] - start).abs().max()) < 1e-3
