"""What the losses share: their batch, their network, and the terms that several of them have."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

__all__ = [
    "Loss",
    "NoisyBatch",
    "Predict",
    "consistency_terms",
    "cross_entropy",
    "divergence",
    "for_sigma",
    "log_mean",
    "log_probabilities",
    "warmed",
]


@dataclass(frozen=True)
class NoisyBatch:
    """Images of a step and all that is random about it.

    Attributes:
        images: ``(B, C, H, W)`` float32 in [0, 1], augmented.
        noise: ``(m, B, C, H, W)`` standard normal.
        sigma: ``(B,)`` noise level of each image, pixel scale [0, 1].
        labels: int64 ``(B,)``.
        uniform: ``(B, u)`` in [0, 1), u at least the loss's `num_uniform`.
        done: share of the training that is over, from 0 to 1.
        soft: ``(B, K)`` probabilities that a teacher's smoothed classifier gives the classes, or None.
    """

    images: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor
    uniform: Tensor
    done: float
    soft: Tensor | None = None

    @property
    def scaled_noise(self) -> Tensor:
        """``(m, B, C, H, W)`` noise of each image's level."""
        return self.noise * self.sigma.to(self.noise.dtype).view(-1, 1, 1, 1)


class Predict(Protocol):
    """The classifier, behind its denoiser if it has one."""

    def __call__(self, images: Tensor, sigma: Tensor, *, frozen: bool = False) -> Tensor:
        """Logits ``(N, K)``, differentiable in the images.

        Args:
            images: ``(N, C, H, W)``, noisy.
            sigma: ``(N,)`` their noise levels.
            frozen: for attacks: in evaluation mode (BatchNorm's running statistics, which stay as they are; no
                dropout) and without a gradient for the weights, as all published codes attack.
        """


@dataclass(frozen=True)
class Loss(ABC):
    """A loss of base classifiers. It keeps no state, so a batch has the same loss at every call.

    Attributes:
        name: as in the configuration.
        num_uniform: how many numbers of `NoisyBatch.uniform` it takes.
        copies: of each image, noisy ones, m.
    """

    name: ClassVar[str]
    num_uniform: ClassVar[int] = 0
    copies: int = 1

    @abstractmethod
    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """Terms by name, each ``(B,)``, float32 or better; `loss` is what is minimised, the others are noted."""


def log_probabilities(
    predict: Predict, images: Tensor, noise: Tensor, sigma: Tensor, *, frozen: bool = False
) -> Tensor:
    """``(m, B, K)`` log-softmax of noisy copies, seen in one pass, float32 or better whatever the network computes in.

    The images are ``(B, C, H, W)``, or one for each copy; their noise is ``(m, B, C, H, W)``, of the noise level
    itself.
    """
    copies = len(noise)
    logits = predict((images + noise).flatten(0, 1), sigma.repeat(copies), frozen=frozen)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits.log_softmax(dim=1).view(copies, len(sigma), -1)


def cross_entropy(log_p: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """``(..., B)`` of log-probabilities ``(..., B, K)``; the label's target is 1 - smoothing + smoothing / K."""
    at_label = log_p.gather(-1, labels.expand(log_p.shape[:-1])[..., None])[..., 0]
    return -(1.0 - smoothing) * at_label - smoothing * log_p.mean(dim=-1)


def log_mean(log_p: Tensor) -> Tensor:
    """``(B, K)`` logarithm of the mean over the copies of ``(m, B, K)``. In the textbook form a probability that
    underflows makes the gradient NaN.
    """
    return torch.logsumexp(log_p, dim=0) - math.log(len(log_p))


def divergence(log_target: Tensor, log_p: Tensor) -> Tensor:
    """KL(target || p) over the last dimension, from logarithms; a target of 0 adds nothing."""
    return (log_target.exp() * (log_target.clamp_min(-1e4) - log_p)).sum(dim=-1)


def consistency_terms(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,)`` each, of log-probabilities ``(m, B, K)``: mean_i KL(f || p_i) and the entropy H(f) of the mean
    prediction f = mean_i p_i, with the gradient through f too (Jeong & Shin 2020).
    """
    log_f = log_mean(log_p)
    return divergence(log_f, log_p).mean(dim=0), -(log_f.exp() * log_f).sum(dim=-1)


def for_sigma(given: float | None, published: tuple[float, float, float], sigma: Tensor) -> Tensor:
    """``(B,)`` what is given, or what was published for the nearest of sigma = .25, .5, 1 (in the logarithm)."""
    values = torch.tensor(published if given is None else (given,) * 3, dtype=sigma.dtype, device=sigma.device)
    borders = torch.tensor([0.25, 0.5], dtype=sigma.dtype, device=sigma.device) * math.sqrt(2.0)
    return values[torch.bucketize(sigma, borders)]


def warmed(done: float, warmup: float) -> float:
    """From 0 to 1 over the first `warmup` of the training, linearly."""
    return min(1.0, done / warmup) if warmup > 0 else 1.0
