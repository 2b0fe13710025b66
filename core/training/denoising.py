"""Training of a denoiser: as diffusion models are trained, or for the one call that smoothing makes of it."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import DenoiserConfig
from core.config.training import DenoiserTrainConfig
from core.data import Dataset
from core.models.checkpoints import build_denoiser, load_denoiser
from core.models.denoiser import OneShotDenoiser, parse_schedule, trained_unet_config
from core.training.loop import Objective, Schedule
from core.training.samples import Samples

__all__ = ["DenoiserObjective", "new_denoiser"]


def new_denoiser(config: DenoiserConfig, shape: Sequence[int]) -> OneShotDenoiser:
    """The denoiser that the configuration names, with its weights, or initialised by torch's generator.

    Args:
        config: see there.
        shape: ``(C, H, W)`` of the images.

    Raises:
        ModelError: for images that it does not take.
    """
    if config.checkpoint is not None:
        denoiser = load_denoiser(config.checkpoint, schedule=config.schedule, head_dim=config.head_dim)
    else:
        assert config.train is not None
        network = trained_unet_config(shape[0], shape[1], config.train, config.head_dim)
        denoiser = build_denoiser(network, **parse_schedule(config.schedule or "linear-1000"))
    denoiser.check_images(shape)
    return denoiser


class DenoiserObjective(Objective):
    """The mean squared error over pixels of what a `OneShotDenoiser` predicts: a `loop.Objective`.

    `plain`: of the noise (Ho et al. 2020, arXiv 2006.11239, equation 14). `distilled`: of the image that it returns, in
    the pixel scale: sigma^2 times that of the noise, but for pixels that are clamped, which smoothing never sees.

    Args:
        data: the training split.
        config: as `Config.denoiser` fills it in, with `sigma`.
        seed: the run's.
        processes: that hold the images on this machine.
    """

    name = "denoiser"

    def __init__(self, data: Dataset, config: DenoiserTrainConfig, seed: int, *, processes: int = 1) -> None:
        assert config.sigma is not None
        self.seed, self._config = seed, config
        self._low, self._high = map(math.log, config.sigma)
        self.schedule = Schedule.of(config, len(data), steps=config.steps)
        everything = np.arange(len(data))
        self._samples = Samples(data, everything, self.name, seed, augment=config.augment, processes=processes)
        self.threads = self._samples.threads

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Images, standard normal noise of their shape, and a number in [0, 1) for each that becomes its level."""
        noise = self._samples.noise(epoch, chosen, copies=1)[:, 0]
        return self._samples.images(epoch, chosen), noise, self._samples.uniform(epoch, chosen)

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss` of each sample."""
        denoiser, (images, noise, uniform) = cast(OneShotDenoiser, model), batch
        sigma = torch.exp(self._low + (self._high - self._low) * uniform)
        if self._config.objective == "distilled":
            sigma = sigma.float()
            error = denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma) - images
        else:
            every = (uniform * denoiser.num_steps).long()
            t = every if self._config.timesteps else denoiser.timesteps(sigma)
            error = denoiser.predict_noise(denoiser.diffuse(images, noise, t), t) - noise
        return {"loss": error.square().flatten(1).mean(dim=1)}
