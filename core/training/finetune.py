"""Fine-tuning of the classifier at each sample's own noise level (arXiv 2512.01782, section 5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import FinetuneConfig
from core.network import Denoiser
from core.progress import Progress
from core.records import ESTIMATOR, Draws, Phase, Procedure

__all__ = ["choose_sigma", "finetune_classifier"]


def choose_sigma(sigmas: Sequence[float], sigma_e: float, num: int) -> Procedure[float]:
    """The noise level that most of `num` noisy copies vote for; an estimate for training, without a guarantee."""
    votes = (yield Draws(sigma_e, num, (ESTIMATOR,), Phase.SELECTION))[ESTIMATOR]
    return sigmas[int(votes.argmax())]


def finetune_classifier(
    model: nn.Module,
    denoiser: Denoiser | None,
    pixels: Tensor,
    labels: Tensor,
    sigma: Tensor,
    config: FinetuneConfig,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train `model` in place with cross-entropy on images noised at their own sigma, then denoised.

    Same seed, thread count and machine: same weights.

    Args:
        model: ``(B, C, H, W)`` in [0, 1] -> ``(B, num_classes)``, on any device; batches and noise are made on the CPU.
        denoiser: fixed; None for a classifier that takes the noisy image itself.
        pixels: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64.
        sigma: ``(N,)`` float32, from `choose_sigma`.
        config: epochs, batch, rates.
        seed: of batches and noise.
        progress: counts epochs.

    Returns:
        Mean loss of each epoch.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    history = []
    model.train()
    for _ in range(config.epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(pixels), generator=generator), config.batch_size):
            images, level = pixels[batch], sigma[batch]
            noisy = images + level.view(-1, 1, 1, 1) * torch.empty_like(images).normal_(generator=generator)
            noisy, level = noisy.to(device), level.to(device)
            with torch.no_grad():
                inputs = noisy if denoiser is None else denoiser(noisy, level)
            loss = F.cross_entropy(model(inputs), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(batch)
        history.append(total / len(pixels))
        progress.update(1, f"loss {history[-1]:.4f}")
    model.eval()
    return history
