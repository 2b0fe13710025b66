"""Training of a denoiser: as diffusion models are trained, or for the one call that smoothing makes of it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import DenoiserConfig, DenoiserTrainConfig
from core.data import Dataset
from core.models.checkpoints import build_denoiser, build_own_denoiser, load_denoiser
from core.models.denoiser import OneShotDenoiser, parse_schedule, trained_unet_config
from core.models.own_code import load_own
from core.training.loop import Objective, Schedule
from core.training.samples import Samples

__all__ = ["DenoisingObjective", "new_denoiser"]


def new_denoiser(config: DenoiserConfig, shape: Sequence[int], *, untrained: bool = False) -> OneShotDenoiser:
    """The denoiser that the configuration names, with its weights, or initialised by torch's generator: without a
    checkpoint, or where that is missing (`untrained`, see `load_denoiser`).

    Raises:
        ModelError: as `load_denoiser` and `build_own`.
        ConfigError: see `trained_unet_config`.
    """
    if config.arch is not None:
        assert config.schedule is not None, "as checked with the configuration"
        denoiser = build_own_denoiser(config.arch, config.schedule, shape[0])
        if config.checkpoint is not None and not untrained:
            denoiser.taken |= load_own(denoiser.unet, config.checkpoint, config.arch)
        return denoiser.eval()
    if config.checkpoint is not None:
        return load_denoiser(config.checkpoint, schedule=config.schedule, head_dim=config.head_dim, untrained=untrained)
    assert config.train is not None
    unet = trained_unet_config(shape[0], shape[1], config.train, config.head_dim)
    return build_denoiser(unet, **parse_schedule(config.schedule or "linear-1000"))


class DenoisingObjective(Objective):
    """The mean squared error over pixels of what a `OneShotDenoiser` predicts.

    `plain`: of the noise (Ho et al. 2020, arXiv 2006.11239, equation 14). `distilled`: of the image that it returns, in
    the pixel scale: sigma^2 times that of the noise, but for pixels that are clamped, where smoothing sees no error; at
    each of `sigmas` as likely. `config` is as `Config.denoiser` fills it in, with `sigma`.
    """

    def __init__(
        self,
        data: Dataset,
        config: DenoiserTrainConfig,
        sigmas: Sequence[float],
        seed: int,
        name: str,
        *,
        processes: int = 1,
    ) -> None:
        samples = Samples(data, np.arange(len(data)), name, seed, augment=config.augment, processes=processes)
        super().__init__(samples, Schedule.of_steps(config, config.steps, len(data)))
        assert config.sigma is not None
        self._config, (self._low, self._high) = config, map(math.log, config.sigma)
        self._sigmas = torch.tensor(sigmas, dtype=torch.float32)

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Images, standard normal noise of their shape, and a number in [0, 1) for each that becomes its level."""
        noise = self._samples.noise(epoch, chosen, 1.0, copies=1)[:, 0]
        return self._samples.images(epoch, chosen), noise, self._samples.uniform(epoch, chosen)

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss` of each sample."""
        assert isinstance(model, OneShotDenoiser)
        images, noise, uniform = batch
        if self._config.objective == "distilled":
            sigma = self._sigmas.to(images.device)[(uniform * len(self._sigmas)).long()]
            error = model(images + sigma.view(-1, 1, 1, 1) * noise, sigma) - images
        else:
            if self._config.timesteps:
                t = (uniform * model.num_steps).long()
            else:
                t = model.timesteps(torch.exp(self._low + (self._high - self._low) * uniform))
            error = model.predict_noise(model.diffuse(images, noise, t), t) - noise
        return {"loss": error.square().flatten(1).mean(dim=1)}
