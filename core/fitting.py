"""A router for classifiers of one's own, from images and labels: the pipeline's steps 2 and 3 in one call."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from core.config import CertifyConfig, EstimatorConfig
from core.data.arrays import as_pixels
from core.data.dataset import Dataset
from core.errors import ConfigError
from core.machine.network import Denoiser
from core.models.features import FeatureRouter, expert_place, new_router
from core.progress import Progress
from core.smoothed import SmoothedClassifier, pool_of
from core.training.estimator import EstimatorObjective, shrunk_radii
from core.training.loop import Training

__all__ = ["ROUTER", "fit_router"]

ROUTER = EstimatorConfig.model_validate(
    {
        "backbone": "features",
        "loss": "radius",
        "label_radius": "shrunk",
        "num_copies": 8,
        "feature_copies": 32,
        "epochs": 40,
        "batch_size": 512,
        "lr": 2e-3,
        "lr_step": 12,
        "temperature": 0.05,
        "warmup": 0.25,
        "holdout": 0.1,
    }
)
"""How `fit_router` trains unless told otherwise; the keys of `estimator` in a configuration."""


def fit_router(
    images: NDArray[Any] | Tensor,
    labels: ArrayLike,
    classifier: nn.Module | Mapping[float, nn.Module],
    sigmas: Sequence[float],
    num_classes: int,
    *,
    sigma_e: float | None = None,
    denoiser: Denoiser | None = None,
    num_votes: int = 120,
    num_estimation: int = 10_000,
    alpha: float = 0.001,
    router_share: float = 0.1,
    config: EstimatorConfig = ROUTER,
    seed: int = 0,
    batch_size: int = 1000,
    progress: bool = True,
) -> FeatureRouter:
    """Train a router for the agreement claim: the `estimator` of a `DualSmoothedClassifier` with these classifiers.

    Every image is smoothed at every level, its true class's shares of votes become radii, and a small head on what the
    classifiers say of one noisy copy learns to pick the level that makes the claim's radius large. Nothing is promised
    of it: whatever it picks, `certify(..., claim="agreement")` certifies. Do not certify what it learnt from.

    Args:
        images: training images, uint8 ``(N, C, H, W)``, ``(N, H, W)`` or ``(N, H, W, C)``, or floats in [0, 1] that
            are 8-bit values divided by 255.
        labels: their classes, ``(N,)``, from 0.
        classifier: one network, or one for each of `sigmas`; the router keeps copies. Those of `core.models` give their
            penultimate features, any other its log-probabilities alone.
        sigmas: Sigma, ascending, pixel scale [0, 1].
        num_classes: width of the classifier's logits.
        sigma_e: noise level of the router; max(sigmas) unless given.
        denoiser: as of the smoothed classifier.
        num_votes: noisy copies of each image at each level.
        num_estimation: draws that the certificates will be made with.
        alpha: failure probability that they will spend.
        router_share: the router's part of it.
        config: of the training; `backbone` is `features`.
        seed: of noise, order and weights.
        batch_size: rows of a forward pass.
        progress: show two bars, with rate and ETA.

    Returns:
        ``(B, C, H, W)`` -> logits ``(B, len(sigmas))``, in evaluation mode, on the classifier's device.

    Raises:
        ConfigError: for levels that are not ascending, or another backbone.
        DataError: for images or labels that do not fit, or when no image is certified at any level.
    """
    levels = [float(sigma) for sigma in sigmas]
    if levels != sorted(set(levels)):
        raise ConfigError(f"sigmas must be ascending and distinct, got {tuple(sigmas)}")
    if not config.reads_features:
        raise ConfigError("config.backbone must be 'features': train other estimators with jobs.train_estimator")
    served: list[float | None]
    if isinstance(classifier, Mapping):
        by_level, served = pool_of(classifier, levels), [*levels]
    else:
        by_level, served = dict.fromkeys(levels, classifier), [None]
    truth = np.asarray(labels, np.int64)
    array = images.numpy(force=True) if isinstance(images, Tensor) else np.asarray(images)
    pixels = as_pixels(array, len(truth), "images")
    ids = tuple(f"fit_router {place}" for place in range(len(pixels)))
    data = Dataset("images", ids, pixels, truth, num_classes)

    votes = np.zeros((len(data), len(levels)), np.int64)
    with Progress(votes.size, "votes", "certificates") if progress else nullcontext() as bar:
        for place, sigma in enumerate(levels):
            smoothed = SmoothedClassifier(by_level[sigma], num_classes, sigma, seed=seed, denoiser=denoiser)
            # One draw chooses a class that nobody asks for: the votes of the true class are what is learnt from.
            for start in range(0, len(data), batch_size):
                part = slice(start, start + batch_size)
                found = smoothed.certify_many(
                    pixels[part],
                    num_selection=1,
                    num_estimation=num_votes - 1,
                    batch_size=batch_size,
                    example_ids=ids[part],
                )
                counts = np.stack([each.counts_selection + each.counts_estimation for each in found])
                votes[part, place] = np.take_along_axis(counts, truth[part, None], axis=1)[:, 0]
                if bar is not None:
                    bar.update(len(found))
    terms = CertifyConfig(num_estimation=num_estimation, alpha=alpha, claim="agreement", router_share=router_share)
    num = np.full_like(votes, num_votes)
    radii = shrunk_radii(votes, num, np.array(levels), num_estimation, alpha * (1 - router_share))

    # Copies: freezing the caller's would change them, and training them later the router.
    experts = [copy.deepcopy(by_level[sigma]) for sigma in levels[: len(served)]]
    level = max(levels) if sigma_e is None else float(sigma_e)
    place = expert_place(served, level)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = new_router(experts, place, data.shape, config.hidden, len(levels))
    router.head.to(next(router.extractor.parameters()).device)
    objective = EstimatorObjective(
        data, radii, level, denoiser, config, seed, extractor=router.extractor, certify=terms
    )
    training = Training(router.head, objective)
    with Progress(training.samples_total, "router", "samples") if progress else nullcontext() as bar:
        for record in training.run():
            if bar is not None:
                held_out = record.get("held_out") if record else None
                bar.update(training.samples_done - bar.done, f"held-out radius {held_out:.4f}" if held_out else "")
    return router.eval()
