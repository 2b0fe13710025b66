"""Losses on images or noise that an attack has moved: smoothadv, smoothmix, cat_rs.

All attacks see the network frozen, in evaluation mode, as the published codes do (`Predict`).
"""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from core.training.losses.terms import (
    Loss,
    NoisyBatch,
    Predict,
    cross_entropy,
    divergence,
    for_sigma,
    log_mean,
    log_probabilities,
    warmed,
)

__all__ = ["CatRs", "SmoothAdv", "SmoothMix", "binomial_draw"]

_FLOOR = 1e-8
"""Added to the length of a gradient by SmoothMix and CAT-RS: where the network is sure, steps get shorter."""


@dataclass(frozen=True)
class SmoothAdv(Loss):
    """Cross-entropy of the noisy copies of an attacked image (arXiv 1906.04584, PGD, trained on all its noise vectors).

    The attack raises -log f_y, f the mean softmax of the same noisy copies: `steps` steps of length 2 epsilon / steps
    along the normalised gradient, each put back into [0, 1] and then into the ball. Where the gradient is 0 the image
    stays; the published code takes a random step there.

    Args:
        copies: published: 4, 8, 2 at sigma = .25, .5, 1 (as Jeong et al. chose from the paper's; it has 1 to 8).
        steps: published: 10 (the paper has 2 to 10).
        epsilon: radius of the ball, pixel scale [0, 1]; published for these: 1, 1, 2.
        warmup: share of the training in which epsilon grows from 0; published: 10 epochs of 150, by epochs.
    """

    copies: int = 4
    steps: int = 10
    epsilon: float | None = None
    warmup: float = 1 / 15
    smoothing: float = 0.0
    name = "smoothadv"

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`."""
        images, noise = batch.images, batch.scaled_noise
        epsilon = for_sigma(self.epsilon, (1.0, 1.0, 2.0), batch.sigma) * warmed(batch.done, self.warmup)
        moved = images
        for _ in range(self.steps):
            moved = moved + _wide(2.0 * epsilon / self.steps) * _unit(_uphill(predict, batch, moved))
            moved = images + _within(moved.clamp(0.0, 1.0) - images, epsilon)
        log_p = log_probabilities(predict, moved, noise, batch.sigma)
        return {"loss": cross_entropy(log_p, batch.labels, self.smoothing).mean(dim=0)}


@dataclass(frozen=True)
class SmoothMix(Loss):
    """Cross-entropy + weight KL to a label that fades towards an attacked image (arXiv 2111.09277).

    The attack takes `steps` steps of `step_size` along the normalised gradient of -log f_y, f the mean softmax of the
    same noisy copies, kept within [0, 1] and not bounded otherwise. The mixture (1 - l) x + l x', l uniform over
    [0, 1/2], is to be answered with (1 - l) f + l/K, with the gradient through f too. This second term counts where f
    answers the label.

    Args:
        copies: published: 2 on CIFAR-10, 4 on MNIST.
        weight: eta; published: 5 (MNIST: 1 or 5).
        steps: published: 4 (MNIST: 2 or 3, 4, 8 at sigma = .25, .5, 1).
        step_size: alpha, pixel scale [0, 1]; published: .5, 1, 2 (MNIST: 1).
        one_step: whether the image after one step, within the step's length times the warm-up, stands in for the clean
            one in both terms; published: with and without.
        warmup: share of the training in which the second term's weight grows from 0; published: 10 epochs of 150.
    """

    copies: int = 2
    weight: float = 5.0
    steps: int = 4
    step_size: float | None = None
    one_step: bool = False
    warmup: float = 1 / 15
    smoothing: float = 0.0
    name = "smoothmix"
    num_uniform = 1

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`; `cross_entropy`; `mixture`, the KL where it counts, else 0."""
        noise, warm = batch.scaled_noise, warmed(batch.done, self.warmup)
        clean, attacked = self._attack(predict, batch, warm)
        log_p = log_probabilities(predict, clean, noise, batch.sigma)
        log_f = log_mean(log_p)
        share = batch.uniform[:, 0].to(log_f.dtype) / 2.0
        target = torch.logaddexp(torch.log1p(-share)[:, None] + log_f, torch.log(share / log_f.shape[1])[:, None])
        mixture = clean + _wide(share) * (attacked - clean)
        apart = divergence(target, log_probabilities(predict, mixture, noise, batch.sigma)).mean(dim=0)
        entropy_at_labels = cross_entropy(log_p, batch.labels, self.smoothing).mean(dim=0)
        counted = torch.where(log_f.argmax(dim=1) == batch.labels, apart, 0.0)
        return {
            "loss": entropy_at_labels + self.weight * warm * counted,
            "cross_entropy": entropy_at_labels,
            "mixture": counted,
        }

    def _attack(self, predict: Predict, batch: NoisyBatch, warm: float) -> tuple[Tensor, Tensor]:
        """The clean side of the mixture and the attacked one."""
        length = for_sigma(self.step_size, (0.5, 1.0, 2.0), batch.sigma)
        clean = moved = batch.images
        for step in range(self.steps):
            if self.one_step and step == 1:
                clean = clean + _within(moved - clean, warm * length)
            moved = (moved + _wide(length) * _unit(_uphill(predict, batch, moved), _FLOOR)).clamp(0.0, 1.0)
        return clean, moved


@dataclass(frozen=True)
class CatRs(Loss):
    """Cross-entropy of the easiest copies + weight the worst divergence under attacked noise (arXiv 2212.09000).

    With p the share of the m copies that answer the label and K ~ Bin(m, p), at least 1: the sum of the K smallest
    cross-entropies, over m. Where K = m, the largest of the copies' KL(t || .) is added, each after an attack on its
    noise that raises it: `steps` steps of 2 epsilon / steps along the normalised gradient, put back into the ball
    around the noise, its mean and its mean square kept as published (the noise less its mean is divided by the root of
    its mean square, not of its variance).

    t is what a teacher's smoothed classifier says (`NoisyBatch.soft`; published: the hard votes of 10,000 copies at
    sigma = .25 of a network trained with `gaussian`). Without a teacher it is the mean softmax of the network's own
    copies, without a gradient: that is not the published loss.

    Args:
        weight: lambda; published: .5, 1, 2 at sigma = .25, .5, 1.
    """

    copies: int = 4
    weight: float | None = None
    steps: int = 4
    epsilon: float = 1.0
    smoothing: float = 0.0
    name = "cat_rs"
    num_uniform = 1

    def __call__(self, predict: Predict, batch: NoisyBatch) -> dict[str, Tensor]:
        """`loss`; `cross_entropy`, of the easiest copies; `divergence`, the largest KL where it counts, else 0."""
        log_p = log_probabilities(predict, batch.images, batch.scaled_noise, batch.sigma)
        copies = len(log_p)
        share = (log_p.argmax(dim=2) == batch.labels).double().mean(dim=0)
        chosen = binomial_draw(batch.uniform[:, 0], copies, share).clamp_min(1)
        ascending = cross_entropy(log_p, batch.labels, self.smoothing).sort(dim=0).values
        rank = torch.arange(copies, device=chosen.device)[:, None]
        easiest = torch.where(rank < chosen, ascending, 0.0).mean(dim=0)
        target = log_mean(log_p).detach() if batch.soft is None else batch.soft.to(log_p.dtype).log()
        noise = self._attack(predict, batch, target)
        apart = divergence(target, log_probabilities(predict, batch.images, noise, batch.sigma))
        worst = torch.where(chosen == copies, apart.amax(dim=0), 0.0)
        weight = for_sigma(self.weight, (0.5, 1.0, 2.0), batch.sigma)
        return {"loss": easiest + weight * worst, "cross_entropy": easiest, "divergence": worst}

    def _attack(self, predict: Predict, batch: NoisyBatch, target: Tensor) -> Tensor:
        noise = start = batch.scaled_noise
        mean, size = _moments(start)
        for _ in range(self.steps):
            with torch.enable_grad():
                asked = noise.detach().requires_grad_()
                log_p = log_probabilities(predict, batch.images, asked, batch.sigma, frozen=True)
                (gradient,) = torch.autograd.grad(divergence(target, log_p).sum() / len(noise), asked)
            step = 2.0 * self.epsilon / self.steps * _unit(gradient.flatten(0, 1), _FLOOR)
            moved = (noise + step.view_as(noise) - start).flatten(0, 1)
            noise = start + _within(moved, moved.new_full((len(moved),), self.epsilon)).view_as(start)
            new_mean, new_size = _moments(noise)
            noise = mean + (noise - new_mean) / new_size * size
        return noise


def binomial_draw(uniform: Tensor, num: int, share: Tensor) -> Tensor:
    """``(B,)`` int64 Bin(num, share) by its inverse distribution function at uniform numbers in [0, 1), exactly ``num``
    where the share is 1.
    """
    share, uniform = share.double(), uniform.double()
    mass = torch.stack([comb(num, k) * share**k * (1.0 - share) ** (num - k) for k in range(num)])
    return (uniform >= mass.cumsum(dim=0)).sum(dim=0)


def _uphill(predict: Predict, batch: NoisyBatch, images: Tensor) -> Tensor:
    """``(B, C, H, W)`` gradient of -log of the label's mean softmax over the noisy copies."""
    with torch.enable_grad():
        asked = images.detach().requires_grad_()
        log_p = log_probabilities(predict, asked, batch.scaled_noise, batch.sigma, frozen=True)
        (gradient,) = torch.autograd.grad(cross_entropy(log_mean(log_p), batch.labels).sum(), asked)
    return gradient


def _unit(gradient: Tensor, floor: float = 0.0) -> Tensor:
    """Of each sample, its direction; 0 stays 0."""
    length = gradient.flatten(1).norm(dim=1) + floor
    return gradient / _wide(torch.where(length > 0, length, 1.0))


def _within(moved: Tensor, radius: Tensor) -> Tensor:
    """Each sample's displacement, shortened to its radius where it is longer."""
    length = moved.flatten(1).norm(dim=1)
    return moved * _wide(torch.where(length > radius, radius / length, 1.0))


def _moments(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and root of the mean square of each ``(C, H, W)`` of ``(m, B, C, H, W)``."""
    pixels = (2, 3, 4)
    return noise.mean(dim=pixels, keepdim=True), noise.square().mean(dim=pixels, keepdim=True).sqrt()


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
