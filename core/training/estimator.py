"""The variance estimator h_e (arXiv 2512.01782, section 5): its targets, its loss, its training."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from core.config import CertifyConfig, ClassifierConfig, Config, EstimatorConfig
from core.config.models import SMALL_CNN
from core.config.training import OptimisationConfig
from core.data import Dataset
from core.errors import ConfigError, DataError
from core.law import GAUSSIAN, Floats, Law, law_of
from core.machine.network import Denoiser
from core.machine.noise_key import training_key
from core.models.features import FeatureExtractor, FeatureHead, expert_place, new_router
from core.procedures.confidence import certified_radius, lower_bound
from core.training.classifier import new_classifier
from core.training.features import Features
from core.training.loop import Objective, Schedule
from core.training.losses import consistency_terms
from core.training.radius_loss import largest_share, radius_losses, voted_radius
from core.training.samples import Samples

__all__ = [
    "EstimatorObjective",
    "class_weights",
    "estimator_losses",
    "hold_out",
    "label_radii",
    "learnable",
    "new_estimator",
    "shrunk_radii",
]

_CERTIFY = CertifyConfig()

_LEAST = 1e-3
"""Shares of votes below this one count as this one: how far a class is behind then makes no difference."""

_STATISTICS = 256
"""Samples whose features a head is standardised with."""


def label_radii(
    radius: Floats,
    correct: NDArray[np.bool_],
    votes: NDArray[np.int64],
    num_estimation: NDArray[np.int64],
    sigmas: Floats,
    alpha: float,
    mode: str,
    law: Law = GAUSSIAN,
) -> Floats:
    """The radii R_c(x, sigma_i) that the estimator learns from, ``(N, K)`` in the pixel scale [0, 1]: 0 where the class
    is wrong or nothing is certified.

    Mode `at_n` takes them as certified, `at_10k` those that the same share of votes (``(N, K)`` of the chosen class, of
    as many draws) gives with 10,000 draws at `alpha`. For `shrunk` see `shrunk_radii`.
    """
    if mode == "at_10k":
        votes_at_10k = np.rint(votes / num_estimation * 10_000).astype(np.int64)
        radius = certified_radius(lower_bound(votes_at_10k, 10_000, alpha, law), sigmas[None, :], law)
    return np.where(correct, radius, 0.0)


def shrunk_radii(
    votes: NDArray[np.int64],
    num: NDArray[np.int64],
    sigmas: Floats,
    num_estimation: int,
    alpha: float,
    law: Law = GAUSSIAN,
) -> Floats:
    """The radii R_c(x, sigma_i) that the test's draws, `num_estimation` at `alpha`, would certify, were the shares of
    votes what they seem; and how far the class is from having the majority where it has none, as a radius below 0.

    200 votes of 200 are not 10,000 of 10,000. So each share, of the true class's votes in `num` draws (``(N, K)`` each;
    samples without draws have radius 0), is the mean of its posterior, under a Beta prior that has the mean and the
    variance of all samples' shares at that sigma, less the variance of the draws.

    Returns:
        float64 ``(N, K)``, pixel scale [0, 1]: the radius of the lower bound, or of the share where that is below
        1/2; 0 where the share is above 1/2 and the bound is not.
    """
    radii = np.zeros(votes.shape)
    for level, sigma in enumerate(sigmas.tolist()):
        drawn = num[:, level] > 0
        k, n = votes[drawn, level], num[drawn, level]
        if not len(k):
            continue
        mean = (k.sum() + 0.5) / (n.sum() + 1)
        once, size = mean * (1 - mean), n.mean()
        # The variance of k/n is once (1/n + (1 - 1/n) / (a + b + 1)) under Beta(a, b).
        between = (np.square(k / n - mean).mean() / once - 1 / size) / max(1 - 1 / size, 1e-9)
        strength = 1 / float(np.clip(between, 1e-6, 1 - 1e-6)) - 1
        share = (k + strength * mean) / (n + strength)
        lower = lower_bound(np.rint(share * num_estimation).astype(np.int64), num_estimation, alpha, law)
        behind = law.scale(sigma) * law.quantile(np.clip(share, _LEAST, 0.5))
        radii[drawn, level] = certified_radius(lower, sigma, law) + behind
    return radii


def learnable(radii: Floats) -> NDArray[np.int64]:
    """The samples, int64, that training takes: those of radii ``(N, K)`` with one above 0 at some sigma.

    Raises:
        DataError: when there is none.
    """
    kept = np.flatnonzero(radii.max(axis=1, initial=0.0) > 0)
    if not kept.size:
        raise DataError("every training sample has radius 0 at every sigma: nothing to learn a noise level from")
    return kept


def class_weights(radii: Floats, rebalance: bool = True) -> Floats:
    """w_e(x) = 1 / q_i, q_i the share of samples whose best sigma (of two, the smaller) is that of x; ones without
    re-balancing.
    """
    if not rebalance:
        return np.ones(len(radii))
    best = radii.argmax(axis=1)
    share = np.bincount(best, minlength=radii.shape[1]) / len(radii)
    return np.asarray(1.0 / share[best], np.float64)


def estimator_losses(logits: Tensor, radii: Tensor, weight: Tensor, config: EstimatorConfig) -> dict[str, Tensor]:
    """w_e (CE + w_r L_con) of each sample as `loss` ``(B,)``, L_con = lambda KL + eta H, and of it `cross_entropy` (w_e
    CE); the published loss is its mean over a batch.

    CE is averaged over the copies of the logits ``(m, B, K)``; its target is softmax(radii), or the best sigma (`loss:
    hard`). With the mean prediction f = mean_i p_i, KL = mean_i sum_k f_k (log f_k - log p_ik) and H = -sum_k f_k log
    f_k (Jeong & Shin 2020), with the gradient through f too.
    """
    log_p = F.log_softmax(logits, dim=2)
    if config.loss == "hard":
        target = F.one_hot(radii.argmax(dim=1), radii.shape[1]).to(log_p.dtype)
    else:
        target = F.softmax(radii.to(log_p.dtype), dim=1)
    cross_entropy = weight * -(target * log_p).sum(dim=2).mean(dim=0)
    if config.loss != "consistency":
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    divergence, entropy = consistency_terms(log_p)
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


def hold_out(num: int, share: float, seed: int, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `num` samples are learnt from and which are held out, int64, ascending; a function of the arguments.

    Raises:
        ConfigError: when either would have none.
    """
    key = int.from_bytes(training_key(seed, name, "holdout", 0, "")[:7], "little")
    order, held = np.random.default_rng(key).permutation(num), round(share * num)
    if share and not 0 < held < num:
        raise ConfigError(
            f"estimator.holdout: {share:g} of {num} labelled samples leaves {num - held} to learn from and {held} to "
            "hold out; change it, or label more samples"
        )
    return np.sort(order[held:]), np.sort(order[:held])


def new_estimator(config: Config, shape: Sequence[int], classifier: Callable[[str], nn.Module]) -> nn.Module:
    """The network that `estimator.backbone` asks for, for images ``(C, H, W)``, before its training; initialised by
    torch's generator. A router on features reads the classifiers' networks.
    """
    backbone, outputs = config.estimator.backbone, len(config.sigmas)
    if config.estimator.reads_features:
        place = expert_place(config.classifiers.values(), config.estimator_sigma)
        return new_router([*map(classifier, config.classifiers)], place, shape, config.estimator.hidden, outputs)
    return new_classifier(backbone or ClassifierConfig(arch=SMALL_CNN), shape, outputs, new_head=True)


class EstimatorObjective(Objective):
    """To name the sigma with the largest radius, stably under noise of level `sigma_e`.

    Samples with radius 0 at every sigma are left out.

    Args:
        radii: ``(N, K)`` from `label_radii` or `shrunk_radii`, in the data's order.
        extractor: with `backbone: features`, what the model, its head, reads; on the model's device.
        certify: the draws and alpha that the router is trained for; only the losses of the agreement claim and the
            samples held out ask.

    Raises:
        DataError: when no sample has a radius to learn from.
        ConfigError: when too few samples are left or held out, or their features do not fit into memory.
    """

    def __init__(
        self,
        data: Dataset,
        radii: Floats,
        sigma_e: float,
        denoiser: Denoiser | None,
        config: EstimatorConfig,
        seed: int,
        *,
        extractor: FeatureExtractor | None = None,
        certify: CertifyConfig = _CERTIFY,
        noise: str = "gaussian",
        processes: int = 1,
    ) -> None:
        name, kept = "train_estimator", learnable(radii)
        learnt, held = hold_out(len(kept), config.holdout, seed, name)
        samples, held_out = (
            Samples(data, kept[part], name, seed, augment=how, noise=noise, processes=processes)
            for part, how in ((learnt, config.augment), (held, "none"))
        )
        same = config.model_dump(include={"batch_size", "lr", "weight_decay", "lr_step", "lr_gamma"})
        super().__init__(samples, Schedule(OptimisationConfig(schedule="step", **same), config.epochs))
        self.num_held_out = len(held)
        self._config, self._sigma_e, self._denoiser, self._extractor = config, sigma_e, denoiser, extractor
        if config.loss != "radius":
            radii = radii.clip(0.0)
        self._radii, self._held_radii = (torch.from_numpy(radii[kept[part]]).float() for part in (learnt, held))
        self._weight = torch.from_numpy(class_weights(radii[kept[learnt]], config.rebalance)).float()
        self._largest = largest_share(certify.num_estimation, certify.alpha * certify.router_share)
        self._law = law_of(noise)
        self._copies = self._reader(samples, config.feature_copies, processes)
        self._held_copies = self._reader(held_out, config.holdout_copies, processes)

    def _reader(self, samples: Samples, copies: int, processes: int) -> Callable[[int, NDArray[np.int64], int], Tensor]:
        """What reads, in an epoch, so many noisy copies of some samples, or their features."""
        if self._extractor is None:
            return lambda epoch, chosen, num: samples.noisy(epoch, chosen, self._sigma_e, num)
        width = self._extractor.width(samples.data.shape)
        return Features(samples, self._sigma_e, copies, self._extract, width, processes=processes).batch

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy copies (or their features), radii, weights, and whether this is still warm-up."""
        warming = torch.full((len(chosen),), epoch < round(self._config.warmup * self._config.epochs))
        copies = self._copies(epoch, chosen, self._config.num_copies)
        return copies, self._radii[chosen], self._weight[chosen], warming

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `estimator_losses` or `radius_losses` say of each sample."""
        copies, radii, weight, warming = batch
        logits = self._logits(model, copies, self._config.num_copies)
        if self._config.claims_agreement:
            return radius_losses(logits, radii, warming, self._sigma_e, self._largest, self._config, self._law)
        return estimator_losses(logits, radii, weight, self._config)

    def prepare(self, model: nn.Module) -> None:
        """Standardise the inputs of a head: by all copies of some samples that lie evenly among those learnt from."""
        if self._extractor is not None:
            assert isinstance(model, FeatureHead)
            some = np.unique(np.linspace(0, len(self) - 1, min(len(self), _STATISTICS)).astype(np.int64))
            model.standardise(self._copies(0, some, self._config.feature_copies))

    def worth(self, model: nn.Module, chosen: NDArray[np.int64]) -> Tensor:
        """The radius T that the votes of the copies promise (`voted_radius`)."""
        config, device = self._config, next(model.parameters()).device
        num = config.holdout_copies
        size = max(1, config.batch_size * config.num_copies // num)  # rows of a training step
        found = [torch.zeros(0, device=device)]
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            logits = self._logits(model, self._held_copies(0, part, num).to(device), num)
            votes = F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=0)
            radii = self._held_radii[part].to(device)
            found.append(voted_radius(votes, radii, self._sigma_e, self._largest, self._law))
        return torch.cat(found)

    def _logits(self, model: nn.Module, copies: Tensor, num: int) -> Tensor:
        """``(num, B, K)`` of noisy copies, or of their features."""
        inputs = copies.float() if self._extractor is not None else self._denoised(copies)
        logits: Tensor = model(inputs)
        return logits.view(num, len(copies) // num, -1)

    def _denoised(self, noisy: Tensor) -> Tensor:
        with torch.no_grad():
            level = torch.full((len(noisy),), self._sigma_e, device=noisy.device)
            images: Tensor = noisy if self._denoiser is None else self._denoiser(noisy, level)
        return images

    def _extract(self, noisy: Tensor) -> Tensor:
        assert self._extractor is not None
        features: Tensor = self._extractor(self._denoised(noisy.to(next(self._extractor.parameters()).device)))
        return features
