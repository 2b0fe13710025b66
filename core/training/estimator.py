"""The variance estimator h_e (arXiv 2512.01782, section 5): its targets, its loss, its training."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from core.confidence import certified_radius, clopper_pearson_lower
from core.config import EstimatorConfig
from core.errors import DataError
from core.network import Denoiser
from core.progress import Progress

__all__ = ["class_weights", "estimator_loss", "label_radii", "train_estimator"]

Floats = NDArray[np.float64]


def label_radii(
    radius: Floats,
    correct: NDArray[np.bool_],
    votes: NDArray[np.int64],
    num_estimation: NDArray[np.int64],
    sigmas: Floats,
    alpha: float,
    mode: str,
) -> Floats:
    """The radii R_c(x, sigma_i) that the estimator learns from: 0 where the class is wrong or nothing is certified.

    Args:
        radius: ``(N, K)`` as certified.
        correct: ``(N, K)`` whether the certified class is the label.
        votes: ``(N, K)`` estimation votes of the chosen class.
        num_estimation: ``(N, K)`` estimation draws.
        sigmas: ``(K,)``.
        alpha: failure probability of the certificates.
        mode: `at_n`, the radii as they are; `at_10k`, those that the same share of votes gives with 10,000 draws.

    Returns:
        float64 ``(N, K)``, pixel scale [0, 1].
    """
    if mode == "at_10k":
        votes_at_10k = np.rint(votes / num_estimation * 10_000).astype(np.int64)
        radius = certified_radius(clopper_pearson_lower(votes_at_10k, 10_000, alpha), sigmas[None, :])
    return np.where(correct, radius, 0.0)


def class_weights(radii: Floats, rebalance: bool = True) -> Floats:
    """w_e(x) = 1 / q_i, q_i the share of samples whose best sigma is that of x; ones without re-balancing.

    Args:
        radii: ``(N, K)``; ties go to the smaller sigma.
        rebalance: whether to weight at all.
    """
    if not rebalance:
        return np.ones(len(radii))
    best = radii.argmax(axis=1)
    share = np.bincount(best, minlength=radii.shape[1]) / len(radii)
    return np.asarray(1.0 / share[best], np.float64)


def estimator_loss(logits: Tensor, radii: Tensor, weight: Tensor, config: EstimatorConfig) -> Tensor:
    """L = mean of w_e (CE + w_r L_con), L_con = lambda KL + eta H, over a batch.

    CE is averaged over the m copies; its target is softmax(radii), or the best sigma (`loss: hard`). With the mean
    prediction f = mean_i p_i, KL = mean_i sum_k f_k (log f_k - log p_ik) and H = -sum_k f_k log f_k (Jeong & Shin
    2020), with the gradient through f too. All of it stays in the log domain: in the textbook form a probability that
    underflows in float32 makes the gradient NaN.

    Args:
        logits: ``(m, B, K)`` of m noisy copies.
        radii: ``(B, K)`` R_c(x, sigma_i), sigma ascending.
        weight: ``(B,)`` w_e.
        config: variant and weights.
    """
    log_p = F.log_softmax(logits, dim=2)
    if config.loss == "hard":
        target = F.one_hot(radii.argmax(dim=1), radii.shape[1]).to(log_p.dtype)
    else:
        target = F.softmax(radii.to(log_p.dtype), dim=1)
    loss = -(target * log_p).sum(dim=2).mean(dim=0)
    if config.loss == "consistency":
        log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
        mean = log_mean.exp()
        divergence = (mean * (log_mean - log_p)).sum(dim=2).mean(dim=0)
        entropy = -(mean * log_mean).sum(dim=1)
        consistency = config.consistency_lambda * divergence + config.consistency_eta * entropy
        loss = loss + consistency_radius(logits, radii, config.consistency_weight) * consistency
    return (weight * loss).mean()


def consistency_radius(logits: Tensor, radii: Tensor, mode: str) -> Tensor:
    """w_r(x), ``(B,)``: how much the consistency of each sample counts; see `EstimatorConfig.consistency_weight`."""
    if mode == "none":
        return torch.ones(len(radii), dtype=logits.dtype, device=logits.device)
    if mode in ("max_radius", "min_radius"):
        radius = radii.amax(dim=1) if mode == "max_radius" else radii.amin(dim=1)
    else:
        predicted = logits.argmax(dim=2)
        index = predicted.amax(dim=0) if mode == "strong" else predicted.amin(dim=0)
        radius = radii.gather(1, index[:, None])[:, 0]
    return radius.to(logits.dtype)


def train_estimator(
    model: nn.Module,
    denoiser: Denoiser | None,
    pixels: Tensor,
    radii: Floats,
    sigma_e: float,
    config: EstimatorConfig,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train `model` in place to name the sigma with the largest radius, stably under noise of level `sigma_e`.

    Samples with radius 0 at every sigma are left out. Same seed, thread count and machine: same weights.

    Args:
        model: ``(B, C, H, W)`` in [0, 1] -> ``(B, K)``, on any device; batches and noise are made on the CPU.
        denoiser: fixed, the same as at test time; None for a denoiser-free estimator.
        pixels: ``(N, C, H, W)`` float32 in [0, 1].
        radii: ``(N, K)`` from `label_radii`.
        sigma_e: noise level of the estimator.
        config: loss, optimiser and schedule.
        seed: of batches and noise.
        progress: counts epochs.

    Returns:
        Mean loss of each epoch.

    Raises:
        DataError: when no sample has a radius to learn from.
    """
    kept = np.flatnonzero(radii.max(axis=1) > 0)
    if not kept.size:
        raise DataError("every training sample has radius 0 at every sigma: nothing to learn a noise level from")
    pixels = pixels[torch.from_numpy(kept)]
    device = next(model.parameters()).device
    target = torch.from_numpy(radii[kept]).float().to(device)
    weight = torch.from_numpy(class_weights(radii[kept], config.rebalance)).float().to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step, config.lr_gamma)
    history = []
    model.train()
    for _ in range(config.epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(pixels), generator=generator), config.batch_size):
            copies = pixels[batch].repeat(config.num_copies, 1, 1, 1)
            noisy = (copies + sigma_e * torch.empty_like(copies).normal_(generator=generator)).to(device)
            with torch.no_grad():
                level = torch.full((len(noisy),), sigma_e, device=device)
                images = noisy if denoiser is None else denoiser(noisy, level)
            logits = model(images).view(config.num_copies, len(batch), -1)
            loss = estimator_loss(logits, target[batch], weight[batch], config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        history.append(total / len(pixels))
        progress.update(1, f"loss {history[-1]:.4f}")
    model.eval()
    return history
