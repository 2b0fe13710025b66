"""Dual randomized smoothing (arXiv 2512.01782): a certified choice of the noise level, then a certificate at it."""

from collections.abc import Sequence

from core.procedures.smoothing import certificate, certify, estimate, estimation_draws, predict
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    AlphaSplit,
    Bound,
    Certificate,
    Draws,
    DualCertificate,
    DualPrediction,
    Phase,
    Procedure,
    Sampling,
    stage_sampling,
)

__all__ = ["dual_certify", "dual_predict", "join_stages", "selection_heads"]


def dual_certify(
    sigmas: Sequence[float], sigma_e: float, sampling: Sampling, split: AlphaSplit = "halves"
) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY: radius min(R_sigma, R_c), each stage with half of the failure probability (theorem 4.2).

    Where the chosen level is sigma_e itself, both stages read the same (denoised) copies. The union bound needs no
    independence between the stages, and each one still chooses on selection draws and bounds on estimation draws, so
    sharing changes neither the claim nor, the noise being keyed by level and phase, a single vote.

    Args:
        sigmas: Sigma, the noise levels in the order of the estimator's outputs.
        sigma_e: noise level of the estimator, at least max(sigmas).
        sampling: draws of each stage; alpha is the total failure probability.
        split: how it is spent, see `core.records.AlphaSplit`.
    """
    stage = stage_sampling(sampling, split)
    heads = selection_heads(sigmas, sigma_e)
    ahead = estimation_draws(sigma_e, stage, heads) if heads == (ESTIMATOR,) else ()
    selection = yield Draws(sigma_e, stage.num_selection, heads, Phase.SELECTION, ahead=ahead)
    sigma = sigmas[int(selection[ESTIMATOR].argmax())]
    shared = sigma == sigma_e
    asked = heads if shared else (ESTIMATOR,)
    found = yield from estimate(sigma_e, stage, asked)
    level = certificate(selection[ESTIMATOR], found[ESTIMATOR].counts, sigma_e, stage, found[ESTIMATOR])
    if level.abstained:
        return join_stages(level, None, sigmas, sampling.alpha)
    if shared:
        label = certificate(selection[CLASSIFIER], found[CLASSIFIER].counts, sigma, stage, found[CLASSIFIER])
    else:
        label = yield from certify(sigma, stage, head=CLASSIFIER)
    return join_stages(level, label, sigmas, sampling.alpha)


def selection_heads(sigmas: Sequence[float], sigma_e: float) -> tuple[str, ...]:
    """Who votes on the estimator's selection draws: the classifier too where its level may turn out to be sigma_e."""
    return (ESTIMATOR, CLASSIFIER) if sigma_e in sigmas else (ESTIMATOR,)


def join_stages(
    level: Certificate, label: Certificate | None, sigmas: Sequence[float], alpha: float, tie: Bound = Bound.CLASS
) -> DualCertificate:
    """The certificate that both stages give together; also recomputes one from stored stages.

    `label` is None where the classifier was not run; `tie` is the stage that is said to bound equal radii.
    """
    shared = 0
    if label is not None and label.sigma == level.sigma:
        shared = level.num_selection + min(level.num_estimation, label.num_estimation)
    abstained = level.abstained or label is None or label.abstained
    radius_class = label.radius if label else 0.0
    if abstained:
        bounded_by = Bound.NONE
    elif level.radius == radius_class:
        bounded_by = tie
    else:
        bounded_by = Bound.SIGMA if level.radius < radius_class else Bound.CLASS
    return DualCertificate(
        prediction=ABSTAIN if abstained or label is None else label.prediction,
        radius=0.0 if abstained else min(level.radius, radius_class),
        sigma=None if level.abstained else sigmas[level.prediction],
        radius_sigma=level.radius,
        radius_class=radius_class,
        bounded_by=bounded_by,
        alpha=alpha,
        alpha_sigma=level.alpha,
        alpha_class=label.alpha if label else level.alpha,
        sigma_stage=level,
        class_stage=label,
        num_shared=shared,
    )


def dual_predict(sigmas: Sequence[float], sigma_e: float, num: int, alpha: float) -> Procedure[DualPrediction]:
    """DUAL-PREDICT: PREDICT the noise level, then PREDICT the class at it, alpha / 2 each."""
    level = yield from predict(sigma_e, num, alpha / 2, head=ESTIMATOR)
    if level.prediction == ABSTAIN:
        return DualPrediction(ABSTAIN, None, alpha, level, None)
    sigma = sigmas[level.prediction]
    label = yield from predict(sigma, num, alpha / 2, head=CLASSIFIER)
    return DualPrediction(label.prediction, sigma, alpha, level, label)
