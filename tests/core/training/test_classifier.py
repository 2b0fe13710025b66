"""The training of base classifiers: what they see, and what attacks may touch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.config import ClassifierConfig, TrainConfig
from core.config.losses import LossConfig
from core.data import Dataset
from core.models.classifiers import ImageClassifier
from core.models.small import SmallConvNet
from core.training import classifier as training
from core.training.classifier import ClassifierObjective, copies_of, new_classifier, rows_per_image
from core.training.loop import Training

GREY = 128 / 255


def flat(num: int = 64) -> Dataset:
    """Of one grey value: the noise level of a noisy image is the standard deviation of its pixels."""
    return Dataset("flat", tuple(map(str, range(num))), np.full((num, 1, 32, 32), 128, np.uint8), np.arange(num) % 2, 2)


class Watched(nn.Module):
    """A classifier that keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(32 * 32, 2), list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.mark.parametrize("sigma", [(0.25, 0.25), (0.1, 0.4)])
@pytest.mark.parametrize("clean", [False, True])
def test_classifier_sees_noisy_images_at_the_levels_asked_for_and_clean_ones(
    sigma: tuple[float, float], clean: bool
) -> None:
    told: list[Tensor] = []

    class Denoiser(nn.Module):
        def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
            told.append(levels)
            np.testing.assert_allclose(noisy.flatten(1).std(1), levels, rtol=0.12)
            return noisy + 1

    model, config = Watched(), TrainConfig(epochs=2, sigma=sigma, clean=clean, batch_size=24)
    learner = Training(model, ClassifierObjective(flat(), Denoiser(), config, 0, "classifier"))
    (first, *_) = (record for record in learner.run() if record is not None)
    levels = np.sort(torch.cat(told).numpy())
    assert len(levels) == 2 * 64
    # Log-uniform: quantiles of the logarithm are a straight line from end to end.
    np.testing.assert_allclose(levels, np.geomspace(*sigma, len(levels)), rtol=1e-6 if sigma[0] == sigma[1] else 0.3)
    assert len(torch.unique(torch.cat(told))) == (1 if sigma[0] == sigma[1] else 128), "others in each epoch"
    seen = torch.cat(model.seen).flatten(1)
    is_clean = (seen - GREY).abs().amax(1) < 1e-6
    assert is_clean.sum() == (128 if clean else 0)
    np.testing.assert_allclose(seen[~is_clean].mean(1), 1 + GREY, atol=0.08)
    assert ("clean" in first) == clean


def test_classifier_losses_of_clean_images_count_half() -> None:
    torch.manual_seed(0)
    model = Watched()
    config = TrainConfig(sigma=(0.3, 0.3), clean=True, label_smoothing=0.2)
    objective = ClassifierObjective(flat(6), None, config, 0, "classifier")
    batch = objective.batch(0, np.arange(6))
    terms = objective.losses(model, batch)
    images, noise, labels = batch[0], batch[1][0], batch[3]
    expected = []
    for seen in (images + 0.3 * noise, images):
        log_p = model(seen).log_softmax(1)
        expected.append(-0.8 * log_p.gather(1, labels[:, None])[:, 0] - 0.2 * log_p.mean(1))
    torch.testing.assert_close(terms["loss"], (expected[0] + expected[1]) / 2)
    torch.testing.assert_close(terms["clean"], expected[1])


def test_predictor_of_an_attack_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 3))
    scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    class Denoiser(nn.Module):
        def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
            return noisy * scale

    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict = training._predictor(model, Denoiser())
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    logits = predict(images, torch.ones(4), frozen=True)
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    other = images.detach().clone().requires_grad_()
    expected = model(0.5 * other)
    expected.sum().backward()
    assert images.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(images.grad, other.grad)  # through the denoiser


@pytest.mark.parametrize(
    ("name", "copies", "rows"), [("gaussian", 1, 1), ("consistency", 2, 2), ("macer", 16, 16), ("smoothadv", 4, 4 * 11)]
)
def test_rows_of_an_image_in_a_step(name: Any, copies: int, rows: int) -> None:
    config = TrainConfig(loss=LossConfig(name=name))
    assert (copies_of(config), rows_per_image(config)) == (copies, rows)


@pytest.mark.parametrize(
    ("arch", "loss"), [("small_cnn", "smoothmix"), ("resnet110", "gaussian"), ("resnet10t", "consistency")]
)
def test_classifier_of_any_architecture_learns_by_any_loss(arch: str, loss: Any) -> None:
    config = ClassifierConfig(
        arch=arch,
        input_size=32 if arch == "resnet10t" else None,
        train=TrainConfig(loss=LossConfig(name=loss), sigma=(0.25, 0.25), clean=False, epochs=1, batch_size=4),
    )
    assert config.train is not None
    torch.manual_seed(0)
    model = new_classifier(config, (1, 8, 8), 2)
    assert isinstance(model, SmallConvNet if arch == "small_cnn" else ImageClassifier)
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), np.uint8)
    data = Dataset("random", tuple(map(str, range(8))), images, np.arange(8) % 2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = Training(model, ClassifierObjective(data, None, config.train, 0, "classifier"))
    assert [record["epoch"] for record in learner.run() if record is not None] == [1]
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())
