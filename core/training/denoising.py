"""Training of a denoiser that is to be used in one shot."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import DenoiserConfig, DenoiserTrainConfig
from core.data import Dataset
from core.machine.noise_key import training_key
from core.models.checkpoints import build_denoiser, build_own_denoiser, load_denoiser
from core.models.denoiser import OneShotDenoiser, parse_schedule
from core.models.own_code import load_own
from core.training.loop import Objective, Schedule
from core.training.samples import Samples

__all__ = ["DenoiserObjective", "new_denoiser"]


def new_denoiser(config: DenoiserConfig, shape: Sequence[int]) -> OneShotDenoiser:
    """Initialised by torch's generator."""
    if config.arch is not None:
        assert config.schedule is not None, "as checked with the configuration"
        denoiser = build_own_denoiser(config.arch, config.schedule, shape[0])
        if config.checkpoint is not None:
            denoiser.taken |= load_own(denoiser.unet, config.checkpoint, config.arch)
        return denoiser.eval()
    if config.checkpoint is not None:
        return load_denoiser(config.checkpoint, schedule=config.schedule, head_dim=config.head_dim)
    train = config.train
    assert train is not None
    unet = {
        "sample_size": shape[1],
        "in_channels": shape[0],
        "out_channels": shape[0],
        "layers_per_block": train.layers,
        "block_out_channels": train.channels,
        "down_block_types": ("DownBlock2D",) * len(train.channels),
        "up_block_types": ("UpBlock2D",) * len(train.channels),
        "norm_num_groups": train.groups,
        "add_attention": False,
    }
    return build_denoiser(unet, **parse_schedule(config.schedule or "linear-1000"))


class DenoiserObjective(Objective):
    name = "denoiser"

    def __init__(
        self,
        data: Dataset,
        config: DenoiserTrainConfig,
        seed: int,
        *,
        processes: int = 1,
    ) -> None:
        assert config.sigma is not None
        self.seed = seed
        name = self.name
        self._low, self._high = map(math.log, config.sigma)
        self.schedule = Schedule.of(config, len(data), steps=config.steps)
        self._samples = Samples(data, np.arange(len(data)), name, seed, augment=config.augment, processes=processes)
        self.threads = self._samples.threads

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, ...]:
        key = int.from_bytes(training_key(self.seed, self.name, "uniform", epoch, ""), "little")
        u = np.random.Generator(np.random.SFC64(key)).random(len(self), dtype=np.float32)[chosen]
        sigma = torch.exp(self._low + (self._high - self._low) * torch.from_numpy(u))
        return self._samples.images(epoch, chosen), self._samples.noise(epoch, chosen, 1)[:, 0], sigma

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, OneShotDenoiser)
        images, noise, sigma = batch
        t = model.timesteps(sigma)
        signal, level = (model.get_buffer(name)[t].view(-1, 1, 1, 1) for name in ("_signal", "_noise"))
        predicted = model.predict_noise(signal * (2 * images - 1) + level * noise, t)
        return {"loss": (predicted - noise).square().flatten(1).mean(dim=1)}
