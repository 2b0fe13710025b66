"""Losses on noisy copies alone: gaussian, consistency, macer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.training.losses.terms import (
    Loss,
    NoisyBatch,
    Predict,
    consistency_terms,
    cross_entropy,
    for_sigma,
    log_mean,
    log_probabilities,
)

__all__ = ["Consistency", "Gaussian", "Macer"]


@dataclass(frozen=True)
class Gaussian(Loss):
    """Cross-entropy of noisy copies, published: 1 (arXiv 1902.02918)."""

    smoothing: float = 0.0
    name = "gaussian"

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`."""
        log_p = log_probabilities(predict, batch.images, batch.scaled_noise, batch.sigma)
        return {"loss": cross_entropy(log_p, batch.labels, self.smoothing).mean(dim=0)}


@dataclass(frozen=True)
class Consistency(Loss):
    """Cross-entropy + weight mean_i KL(f || p_i) + eta H(f), f the mean of the copies' softmax (arXiv 2006.04062).

    Args:
        weight: lambda; published: 20, 10, 10 on CIFAR-10, 10, 5, 5 on MNIST at sigma = .25, .5, 1.
        eta: published: .5.
    """

    copies: int = 2
    weight: float | None = None
    eta: float = 0.5
    smoothing: float = 0.0
    name = "consistency"

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`; `cross_entropy`, `divergence` (the KL) and `entropy` without their weights."""
        log_p = log_probabilities(predict, batch.images, batch.scaled_noise, batch.sigma)
        entropy_at_labels = cross_entropy(log_p, batch.labels, self.smoothing).mean(dim=0)
        apart, entropy = consistency_terms(log_p)
        weight = for_sigma(self.weight, (20.0, 10.0, 10.0), batch.sigma)
        return {
            "loss": entropy_at_labels + weight * apart + self.eta * entropy,
            "cross_entropy": entropy_at_labels,
            "divergence": apart,
            "entropy": entropy,
        }


@dataclass(frozen=True)
class Macer(Loss):
    """-log f_y + weight sigma/2 (gamma - xi), f the mean of the copies' softmax (arXiv 2001.02378).

    xi = Phi^-1(pA) - Phi^-1(pB) of the two largest means of softmax(beta logits); the second term is there where A is
    the label and xi <= gamma, and a constant where it is not. The mean is over all samples, as published. Unlike the
    published code all of it is in float64, which ends at no probability of 0 or 1.

    Args:
        weight: lambda; published: 12, 4, 12 on CIFAR-10, 16, 16, 6 on MNIST at sigma = .25, .5, 1.
        deferred: share of the training in which the second term is left out; published: until the learning rate first
            drops for sigma = 1, else 0.
    """

    copies: int = 16
    weight: float | None = None
    beta: float = 16.0
    gamma: float = 8.0
    deferred: float = 0.0
    smoothing: float = 0.0
    name = "macer"

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`; `cross_entropy` of the mean prediction; `radius`, sigma xi / 2 where the class is right, else 0."""
        log_p = log_probabilities(predict, batch.images, batch.scaled_noise, batch.sigma).double()
        entropy_at_labels = cross_entropy(log_mean(log_p), batch.labels, self.smoothing)
        sharp = (self.beta * log_p).softmax(dim=2).mean(dim=0)
        top, classes = sharp.topk(2, dim=1)
        counts = classes[:, 0] == batch.labels
        # A score outside the open interval has an infinite quantile, and its gradient is NaN even where it is masked.
        low, high = torch.finfo(top.dtype).tiny, 1.0 - torch.finfo(top.dtype).eps
        quantiles = torch.special.ndtri(top.clamp(low, high))
        margin = quantiles[:, 0] - quantiles[:, 1]
        half = batch.sigma.double() / 2.0
        counted = counts & (margin <= self.gamma)
        weight = for_sigma(self.weight, (12.0, 4.0, 12.0), batch.sigma) * float(batch.done >= self.deferred)
        missing = torch.where(counted, half * (self.gamma - margin), 0.0)
        return {
            "loss": entropy_at_labels + weight * missing,
            "cross_entropy": entropy_at_labels,
            "radius": torch.where(counts, half * margin, 0.0).detach(),
        }
