"""Dual randomized smoothing (arXiv 2512.01782): a certified choice of the noise level, then a certificate at it."""

from collections.abc import Sequence
from dataclasses import replace

from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    Bound,
    DualCertificate,
    DualPrediction,
    Procedure,
    Sampling,
)
from core.smoothing import certify, predict

__all__ = ["dual_certify", "dual_predict"]


def dual_certify(sigmas: Sequence[float], sigma_e: float, sampling: Sampling) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY: radius min(R_sigma, R_c), each stage with half of the failure probability (theorem 4.2).

    The union bound needs no independence, so noise that both stages happen to share (sigma == sigma_e) is no flaw:
    each stage still chooses on selection draws and bounds on estimation draws.

    Args:
        sigmas: Sigma, the noise levels in the order of the estimator's outputs.
        sigma_e: noise level of the estimator, at least max(sigmas).
        sampling: draws of each stage; alpha is the total failure probability.
    """
    half = replace(sampling, alpha=sampling.alpha / 2)
    level = yield from certify(sigma_e, half, head=ESTIMATOR)
    if level.abstained:
        return DualCertificate(
            ABSTAIN, 0.0, None, 0.0, 0.0, Bound.NONE, sampling.alpha, half.alpha, half.alpha, level, None
        )
    sigma = sigmas[level.prediction]
    label = yield from certify(sigma, half, head=CLASSIFIER)
    bounded_by = Bound.SIGMA if level.radius < label.radius else Bound.CLASS
    return DualCertificate(
        prediction=label.prediction,
        radius=min(level.radius, label.radius),
        sigma=sigma,
        radius_sigma=level.radius,
        radius_class=label.radius,
        bounded_by=Bound.NONE if label.abstained else bounded_by,
        alpha=sampling.alpha,
        alpha_sigma=half.alpha,
        alpha_class=half.alpha,
        sigma_stage=level,
        class_stage=label,
    )


def dual_predict(sigmas: Sequence[float], sigma_e: float, num: int, alpha: float) -> Procedure[DualPrediction]:
    """DUAL-PREDICT: PREDICT the noise level, then PREDICT the class at it, alpha / 2 each."""
    level = yield from predict(sigma_e, num, alpha / 2, head=ESTIMATOR)
    if level.prediction == ABSTAIN:
        return DualPrediction(ABSTAIN, None, alpha, level, None)
    sigma = sigmas[level.prediction]
    label = yield from predict(sigma, num, alpha / 2, head=CLASSIFIER)
    return DualPrediction(label.prediction, sigma, alpha, level, label)
