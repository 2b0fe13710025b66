"""The variance estimator h_e (arXiv 2512.01782, section 5): its targets, its loss, its training."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import EstimatorConfig
from core.data import Dataset
from core.errors import DataError
from core.machine.network import Denoiser
from core.procedures.confidence import certified_radius, clopper_pearson_lower
from core.training.loop import Schedule
from core.training.samples import Samples

__all__ = ["EstimatorObjective", "class_weights", "estimator_losses", "label_radii", "learnable"]

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


def learnable(radii: Floats) -> NDArray[np.int64]:
    """The samples, int64, that training takes: those with a radius at some sigma.

    Args:
        radii: ``(N, K)``.

    Raises:
        DataError: when there is none.
    """
    kept = np.flatnonzero(radii.max(axis=1, initial=0.0) > 0)
    if not kept.size:
        raise DataError("every training sample has radius 0 at every sigma: nothing to learn a noise level from")
    return kept


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


def estimator_losses(logits: Tensor, radii: Tensor, weight: Tensor, config: EstimatorConfig) -> dict[str, Tensor]:
    """w_e (CE + w_r L_con) of each sample, L_con = lambda KL + eta H; the published loss is its mean over a batch.

    CE is averaged over the m copies; its target is softmax(radii), or the best sigma (`loss: hard`). With the mean
    prediction f = mean_i p_i, KL = mean_i sum_k f_k (log f_k - log p_ik) and H = -sum_k f_k log f_k (Jeong & Shin
    2020), with the gradient through f too. All of it stays in the log domain: in the textbook form a probability that
    underflows in float32 makes the gradient NaN.

    Args:
        logits: ``(m, B, K)`` of m noisy copies.
        radii: ``(B, K)`` R_c(x, sigma_i), sigma ascending.
        weight: ``(B,)`` w_e.
        config: variant and weights.

    Returns:
        ``(B,)`` each: `loss`, and of it `cross_entropy` (w_e CE).
    """
    log_p = F.log_softmax(logits, dim=2)
    if config.loss == "hard":
        target = F.one_hot(radii.argmax(dim=1), radii.shape[1]).to(log_p.dtype)
    else:
        target = F.softmax(radii.to(log_p.dtype), dim=1)
    cross_entropy = weight * -(target * log_p).sum(dim=2).mean(dim=0)
    if config.loss != "consistency":
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(dim=2).mean(dim=0)
    entropy = -(mean * log_mean).sum(dim=1)
    consistency = config.consistency_lambda * divergence + config.consistency_eta * entropy
    w_r = consistency_radius(logits, radii, config.consistency_weight)
    return {"loss": cross_entropy + weight * w_r * consistency, "cross_entropy": cross_entropy}


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


class EstimatorObjective:
    """To name the sigma with the largest radius, stably under noise of level `sigma_e`: a `loop.Objective`.

    Samples with radius 0 at every sigma are left out.

    Args:
        data: the training split.
        radii: ``(N, K)`` from `label_radii`, in the data's order.
        sigma_e: noise level of the estimator.
        denoiser: fixed, the same as at test time, on the model's device; None for a denoiser-free estimator.
        config: loss, optimiser and schedule.
        seed: the run's.
        processes: that hold the images on this machine.

    Raises:
        DataError: when no sample has a radius to learn from.
    """

    name = "train_estimator"

    def __init__(
        self,
        data: Dataset,
        radii: Floats,
        sigma_e: float,
        denoiser: Denoiser | None,
        config: EstimatorConfig,
        seed: int,
        *,
        processes: int = 1,
    ) -> None:
        kept = learnable(radii)
        self.seed, self._config, self._sigma_e, self._denoiser = seed, config, sigma_e, denoiser
        self.schedule = Schedule(
            config.epochs, config.batch_size, config.lr, config.weight_decay, config.lr_step, config.lr_gamma
        )
        self._samples = Samples(data, kept, self.name, seed, processes=processes)
        self.threads = self._samples.threads
        self._radii = torch.from_numpy(radii[kept]).float()
        self._weight = torch.from_numpy(class_weights(radii[kept], config.rebalance)).float()

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy copies, radii and weights."""
        levels = [self._sigma_e] * len(chosen)
        noisy = self._samples.noisy(epoch, chosen, levels, self._config.num_copies)
        return noisy, self._radii[chosen], self._weight[chosen]

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss` and `cross_entropy` of each sample (`estimator_losses`)."""
        noisy, radii, weight = batch
        with torch.no_grad():
            level = torch.full((len(noisy),), self._sigma_e, device=noisy.device)
            images = noisy if self._denoiser is None else self._denoiser(noisy, level)
        logits = model(images).view(self._config.num_copies, len(radii), -1)
        return estimator_losses(logits, radii, weight, self._config)
