"""The small denoiser and classifier of a data set that has no published checkpoints."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import BaseModelsConfig
from core.data import Dataset
from core.models.checkpoints import build_denoiser
from core.models.denoiser import OneShotDenoiser, trained_unet_config
from core.models.small import SmallConvNet
from core.progress import Progress

__all__ = ["train_classifier", "train_denoiser"]


def _log_uniform(num: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.exp(torch.empty(num).uniform_(math.log(low), math.log(high), generator=generator))


def train_denoiser(data: Dataset, config: BaseModelsConfig, seed: int, progress: Progress) -> OneShotDenoiser:
    """Train a noise predictor with the usual squared error, noise levels log-uniform over `config.noise_range`.

    Same seed, thread count and machine: same weights.

    Args:
        data: training images.
        config: sizes and rates.
        seed: of initialisation, batches and noise.
        progress: counts steps.

    Returns:
        The exponential moving average of the weights, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = data.pixels()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_denoiser(trained_unet_config(pixels.shape[1], pixels.shape[2]))
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.denoiser_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.denoiser_lr, total_steps=config.denoiser_steps
    )
    model.train()
    for step in range(config.denoiser_steps):
        images = pixels[torch.randint(len(pixels), (config.denoiser_batch,), generator=generator)]
        t = model.timesteps(_log_uniform(len(images), *config.noise_range, generator))
        noise = torch.empty_like(images).normal_(generator=generator)
        signal, level = (model.get_buffer(name)[t].view(-1, 1, 1, 1) for name in ("_signal", "_noise"))
        loss = F.mse_loss(model.predict_noise(signal * (2 * images - 1) + level * noise, t), noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        decay = min(config.denoiser_ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        progress.update(1, f"loss {loss.item():.4f}")
    return average


def train_classifier(
    data: Dataset, denoiser: OneShotDenoiser | None, config: BaseModelsConfig, seed: int, progress: Progress
) -> SmallConvNet:
    """Train a small classifier on clean and on denoised images, half and half; without a denoiser on noisy ones alone.

    Noise levels are log-uniform over `config.noise_range`. Clean images look like what a denoiser returns; without one
    smoothing never shows them to the classifier. Same seed, thread count and machine: same weights.

    Args:
        data: training images and labels.
        denoiser: fixed; None for a classifier that reads the noisy image itself.
        config: sizes and rates.
        seed: of initialisation, batches and noise.
        progress: counts epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = data.pixels(), torch.from_numpy(data.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallConvNet.for_images(pixels.shape[1:], data.num_classes, config.classifier_width)
    steps = math.ceil(len(pixels) / config.classifier_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.classifier_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.classifier_lr, total_steps=steps * config.classifier_epochs
    )
    model.train()
    for _ in range(config.classifier_epochs):
        for batch in torch.split(torch.randperm(len(pixels), generator=generator), config.classifier_batch):
            images = pixels[batch]
            sigma = _log_uniform(len(images), *config.noise_range, generator)
            noise = torch.empty_like(images).normal_(generator=generator)
            seen, answers = images + sigma.view(-1, 1, 1, 1) * noise, labels[batch]
            if denoiser is not None:
                with torch.no_grad():
                    seen, answers = torch.cat([images, denoiser(seen, sigma)]), answers.repeat(2)
            loss = F.cross_entropy(model(seen), answers)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        progress.update(1, f"loss {loss.item():.4f}")
    return model.eval()
