"""Standard randomized smoothing: CERTIFY and PREDICT of Cohen et al. 2019 (arXiv 1902.02918), as generators.

A procedure asks for draws by yielding `Draws` and is sent the votes. It knows nothing of networks or devices, so it
reads like the paper's pseudo-code and is tested by sending it counts.
"""

import math
from typing import NamedTuple

import numpy as np

from core.errors import ConfigError
from core.procedures.confidence import (
    binomial_p_value,
    bound_and_radius,
    certified_radius,
    clopper_pearson_upper,
    top_two,
)
from core.procedures.randomized import randomized_lower, uniform_of
from core.records import (
    ABSTAIN,
    AUXILIARY,
    CLASSIFIER,
    Answer,
    Certificate,
    Counts,
    Draws,
    Phase,
    Prediction,
    Procedure,
    Sampling,
    paired,
)

__all__ = ["Estimation", "certificate", "certify", "estimate", "estimation_draws", "furthest", "predict", "stage_bound"]


def certify(sigma: float, sampling: Sampling, head: str = CLASSIFIER) -> Procedure[Certificate]:
    """CERTIFY: choose the class on selection draws, bound its probability on fresh estimation draws.

    Args:
        sigma: noise level, > 0, pixel scale [0, 1].
        sampling: draws of the two phases and the failure probability.
        head: the network that votes.

    Returns:
        A `Certificate`, wrong with probability at most `sampling.alpha` over the noise.
    """
    sampling = sampling.at(sigma)
    ahead = estimation_draws(sigma, sampling, (head,))
    selection = (yield Draws(sigma, sampling.num_selection, (head,), Phase.SELECTION, ahead=ahead))[head]
    estimation = (yield from estimate(sigma, sampling, (head,)))[head]
    return certificate(selection, estimation.counts, sigma, sampling, estimation)


class Estimation(NamedTuple):
    """What comes of a head's estimation draws.

    Attributes:
        counts: its votes.
        missed: those of the first `Sampling.num_reference` draws that the reference did not cast too, by class; None
            without one.
        uniform: of the randomised bound; None without.
    """

    counts: Counts
    missed: Counts | None = None
    uniform: float | None = None


def estimate(sigma: float, sampling: Sampling, heads: tuple[str, ...]) -> Procedure[dict[str, Estimation]]:
    """All estimation draws of heads."""
    asked = estimation_draws(sigma, sampling, heads)
    answers: list[Answer] = []
    for draws in asked:
        answers.append((yield draws))
    first = answers[0]
    return {
        head: Estimation(
            np.sum([answer[head] for answer in answers], axis=0),
            first[paired(head)][:-1] if paired(head) in asked[0].heads else None,
            uniform_of(int(first[AUXILIARY][0])) if asked[0].auxiliary else None,
        )
        for head in heads
    }


def estimation_draws(sigma: float, sampling: Sampling, heads: tuple[str, ...]) -> tuple[Draws, ...]:
    """What `estimate` asks for: all draws, the first of them of the reference as well where there is one."""
    sampling = sampling.at(sigma)
    num, seen, randomized = sampling.num_estimation, sampling.num_reference, sampling.bound == "randomized"
    asked = (*heads, *map(paired, heads)) if seen else heads
    rest = (Draws(sigma, num - seen, heads, Phase.ESTIMATION, start=seen),) if 0 < seen < num else ()
    return Draws(sigma, seen or num, asked, Phase.ESTIMATION, auxiliary=randomized, ahead=rest), *rest


def stage_bound(
    successes: int, sampling: Sampling, missed: int = 0, uniform: float | None = None
) -> tuple[float, float]:
    """The lower bound of an event's probability that a stage's votes show: for the reference, where there is one.

    For networks f and f' on the same draws, P[f' = c] >= P[f = c, f' = c] = P[f = c] - P[f = c, f' != c]. The first is
    bounded from below by all estimation draws, the second from above by those that the reference saw too, each at its
    share of alpha: their difference holds with probability 1 - alpha, whatever the two sets of draws have in common
    (after Ugare et al., arXiv 2305.19521, who bound P[f != f']). The event must not depend on these draws.

    Args:
        successes: estimation draws that show the event.
        sampling: of the stage.
        missed: of the first `num_reference` draws, those that show it while the reference does not.
        uniform: of the randomised bound.

    Returns:
        p_lower in [0, 1), and the upper bound of P[f = c, f' != c], 0.0 without a reference.
    """
    alpha, upper = sampling.alpha, 0.0
    if sampling.num_reference:
        spent = alpha * sampling.reference_share
        alpha = math.nextafter(alpha - spent, 0.0)
        upper = float(clopper_pearson_upper(missed, sampling.num_reference, spent))
    if sampling.bound == "randomized":
        p_lower = randomized_lower(successes, sampling.num_estimation, alpha, uniform)
    else:
        p_lower = bound_and_radius(successes, sampling.num_estimation, alpha, 1.0, sampling.law)[0]
    return max(0.0, math.nextafter(p_lower - upper, -1.0)) if upper else p_lower, upper


def certificate(
    selection: Counts, estimation: Counts, sigma: float, sampling: Sampling, more: Estimation | None = None
) -> Certificate:
    """The certificate that the votes of both phases give, with what came `more` of the estimation where there is a
    reference or the bound is randomised; also recomputes one from stored counts.
    """
    top_class = int(selection.argmax())
    s = sampling.at(sigma)
    missed, uniform = (more.missed, more.uniform) if more else (None, None)
    if s.num_reference and missed is None:
        raise ConfigError("a certificate for a reference needs the votes that it did not cast")
    lost = 0 if missed is None else int(missed[top_class])
    p_lower, upper = stage_bound(int(estimation[top_class]), s, lost, uniform)
    certified = p_lower > 0.5
    return Certificate(
        prediction=top_class if certified else ABSTAIN,
        radius=float(certified_radius(p_lower, sigma, sampling.law)),
        p_lower=p_lower,
        sigma=sigma,
        num_selection=s.num_selection,
        num_estimation=s.num_estimation,
        counts_selection=selection,
        counts_estimation=estimation,
        alpha=sampling.alpha,
        num_reference=sampling.num_reference,
        counts_missed=missed,
        disagreement_upper=upper,
        uniform=uniform,
        law=sampling.law,
    )


def furthest(sigma: float, sampling: Sampling) -> float:
    """The radius that no certificate of these draws exceeds: all agree, with the reference too, and U is least."""
    sampling = sampling.at(sigma)
    p_lower, _ = stage_bound(sampling.num_estimation, sampling, 0, uniform_of(0))
    return float(certified_radius(p_lower, sigma, sampling.law))


def predict(sigma: float, num: int, alpha: float, head: str = CLASSIFIER) -> Procedure[Prediction]:
    """PREDICT: the most frequent class if an exact test tells it from the second, else ABSTAIN.

    Args:
        sigma: noise level, > 0, pixel scale [0, 1].
        num: noisy copies.
        alpha: probability of returning a class other than the smoothed classifier's.
        head: the network that votes.
    """
    if num < 1 or not 0.0 < alpha < 1.0:
        raise ConfigError(f"PREDICT needs num >= 1 and alpha in (0, 1), got num={num!r}, alpha={alpha!r}")
    counts = (yield Draws(sigma, num, (head,), Phase.PREDICTION))[head]
    top_class, first, second = top_two(counts)
    p_value = binomial_p_value(first, first + second)
    return Prediction(top_class if p_value <= alpha else ABSTAIN, p_value, sigma, num, counts, alpha)
