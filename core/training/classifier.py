"""Training of a base classifier on noisy images, behind a denoiser or without one."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import ClassifierConfig
from core.config.models import SMALL_CNN
from core.config.training import OptimisationConfig, TrainConfig
from core.data import Dataset
from core.machine.noise_key import random_of, training_key
from core.machine.user_modules import evaluating
from core.models.checkpoints import load_classifier
from core.models.small import SmallConvNet
from core.training.loop import Objective, Schedule
from core.training.losses import NoisyBatch, Predict, make_loss
from core.training.samples import Samples

__all__ = ["ClassifierObjective", "copies_of", "new_classifier", "numbers_of", "rows_per_image"]


def new_classifier(
    config: ClassifierConfig,
    shape: Sequence[int],
    num_outputs: int,
    class_names: Sequence[str] | None = None,
    *,
    new_head: bool = False,
) -> nn.Module:
    """The network that the configuration names, for images ``(C, H, W)``, with its weights, or initialised by torch's
    generator. For the other arguments see `load_classifier`.
    """
    if config.arch == SMALL_CNN:
        return SmallConvNet.for_images(shape, num_outputs, config.width)
    return load_classifier(config, num_outputs, shape[0], class_names=class_names, new_head=new_head)


def _predictor(model: nn.Module, denoiser: nn.Module | None) -> Predict:
    """The logits of noisy images that the losses ask for: of the classifier, behind its denoiser if it has one."""

    def predict(images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        seen = images if denoiser is None else denoiser(images, sigma)
        if not frozen:
            logits: Tensor = model(seen)
            return logits
        weights = {name: value.detach() for name, value in model.named_parameters()}
        with evaluating(model.modules()):
            attacked: Tensor = torch.func.functional_call(model, weights, (seen,))
        return attacked

    return predict


def copies_of(config: OptimisationConfig) -> int:
    """Noisy copies of each image in a step."""
    return make_loss(config.loss).copies if isinstance(config, TrainConfig) else 1


def numbers_of(config: OptimisationConfig) -> dict[str, Any]:
    """Those of the loss as it is minimised; None for one that follows each image's sigma, as published."""
    if not isinstance(config, TrainConfig):
        return {}
    return asdict(make_loss(config.loss, config.label_smoothing))


def rows_per_image(config: TrainConfig) -> int:
    """Noisy rows through the network for each image of a step, those of attacks included."""
    loss, rows = make_loss(config.loss), 0

    def predict(images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        nonlocal rows
        rows += len(images)
        return images.flatten(1)

    image = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    noise = torch.linspace(-1, 1, loss.copies * 16).view(loss.copies, 1, 1, 4, 4)
    one, uniform = torch.ones(1), torch.full((1, loss.num_uniform), 0.5)
    loss(predict, NoisyBatch(image, noise, one, torch.zeros(1, dtype=torch.int64), uniform, done=1.0))
    return rows


class ClassifierObjective(Objective):
    """A loss of `core.training.losses` on images noised at levels of `TrainConfig.sigma`.

    `config` is as `Config.classifier` fills it in: with `sigma` and `clean`.
    """

    def __init__(
        self,
        data: Dataset,
        denoiser: nn.Module | None,
        config: TrainConfig,
        seed: int,
        name: str,
        *,
        noise: str = "gaussian",
        processes: int = 1,
    ) -> None:
        places = np.arange(len(data))
        samples = Samples(data, places, name, seed, augment=config.augment, noise=noise, processes=processes)
        super().__init__(samples, Schedule(config, config.epochs))
        assert config.sigma is not None
        self._config, (self._low, self._high) = config, map(math.log, config.sigma)
        self._denoiser = None if denoiser is None else denoiser.requires_grad_(False)
        self._loss = make_loss(config.loss, config.label_smoothing)
        self._labels = torch.from_numpy(data.labels)
        self._uniform: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """What `NoisyBatch` holds, in its order."""
        uniform = self._uniform_of(epoch)[chosen]
        sigma = torch.exp(self._low + (self._high - self._low) * uniform[:, 0])
        noise = self._samples.noise(epoch, chosen, sigma, self._loss.copies).transpose(0, 1).contiguous()
        done = torch.tensor(epoch / self.schedule.epochs)
        return self._samples.images(epoch, chosen), noise, sigma, self._labels[chosen], uniform[:, 1:], done

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Those of the loss, and `clean`, the cross-entropy of the clean images, where it is learnt."""
        images, noise, sigma, labels, uniform, done = batch
        predict = _predictor(model, self._denoiser)
        terms = self._loss(predict, NoisyBatch(images, noise, sigma, labels, uniform, done.item()))
        if not self._config.clean:
            return terms
        smoothing = self._config.label_smoothing
        clean = F.cross_entropy(model(images).float(), labels, reduction="none", label_smoothing=smoothing)
        return {**terms, "loss": (terms["loss"] + clean) / 2, "clean": clean}

    def _uniform_of(self, epoch: int) -> Tensor:
        """``(N, 1 + u)`` in [0, 1) for all samples: of the noise level, and what the loss takes."""
        if self._uniform[0] != epoch:
            key = training_key(self.seed, self.name, "uniform", epoch, "")
            drawn = random_of(key).random((len(self), 1 + self._loss.num_uniform), dtype=np.float32)
            self._uniform = (epoch, torch.from_numpy(drawn))
        return self._uniform[1]
