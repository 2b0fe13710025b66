"""Multiscale: a cascade over the noise levels (Jeong & Shin 2023, arXiv 2310.16779), with bounds that hold.

The cascade g is a fixed function of the base classifier f: from the largest sigma down, the first level at which some
class has a probability above 1/2 decides for it; where no level does, g abstains. It is certified at x like this:
the deciding level shows its class c beyond 1/2, and every level above shows each *other* class below 1/2, all of it
throughout the ball. Whether a level above is undecided there, or decides for c itself, does not matter: g is c.
docs/guarantees.md holds the theorem and its proof.

Three things are not as in the code of the authors: bounds are Clopper-Pearson's, not asymptotic multinomial intervals;
alpha is divided over the levels so that it adds up to alpha (theirs, alpha / (k + 1), does not); and a level whose own
class is in doubt does not end the cascade, as long as a level below may still decide for that class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from core.errors import ConfigError
from core.law import Law
from core.procedures.confidence import bound_and_radius, lower_bound
from core.procedures.smoothing import certify
from core.records import ABSTAIN, Certificate, Outcome, Procedure, Sampling

__all__ = ["MultiscaleCertificate", "level_alphas", "multiscale_certify"]


@dataclass(frozen=True, slots=True, eq=False)
class MultiscaleCertificate(Outcome):
    """The outcome of Multiscale (Jeong & Shin 2023) for one input.

    With probability at least 1 - alpha over the noise of all levels, the prediction (if it is not ABSTAIN) is the class
    of the cascade everywhere in the open ball of `radius`.

    Attributes:
        prediction: class index, or ABSTAIN.
        radius: min(radius_level, radius_above), or 0.0.
        sigma: noise level that decided; None where abstaining.
        levels: certificates of the levels that were asked, the largest sigma first. All but the last one abstained.
        radius_level: radius of the class at the last level alone; 0.0 where that one abstained too.
        radius_above: radius within which no level above decides for another class; infinite where there is none above,
            0.0 where the last level abstained.
        sigma_bound: the level that bounds the radius: `sigma` or one above it; None where abstaining.
        alpha: total failure probability; `levels[-1].alpha` is the share of it that every bound of this one spends.
    """

    prediction: int
    radius: float
    sigma: float | None
    levels: tuple[Certificate, ...]
    radius_level: float
    radius_above: float
    sigma_bound: float | None
    alpha: float

    @property
    def num_draws(self) -> int:
        """Noisy copies spent on all levels that were asked."""
        return sum(level.num_draws for level in self.levels)


def level_alphas(alpha: float, num_levels: int, shares: Sequence[float] = ()) -> tuple[float, ...]:
    """What a certificate may spend, by the level that decides: shares of `alpha` in the order of Sigma, equal unless
    given; adds up to at most `alpha`.

    Raises:
        ConfigError: for shares that are not one for each level, not positive, or add up to more than 1.
    """
    shares = tuple(shares) or (1.0 / num_levels,) * num_levels
    total = max(1.0, math.fsum(shares))
    if len(shares) != num_levels or min(shares) <= 0.0 or total > 1.0 + 1e-12:
        raise ConfigError(
            f"shares of alpha: expected one for each of {num_levels} noise levels, positive and at most 1 in all, got "
            f"{list(shares)}"
        )
    alphas = [alpha * share / total for share in shares]
    while sum(map(Fraction, alphas)) > Fraction(alpha):  # exactly
        alphas = [math.nextafter(each, 0.0) for each in alphas]
    return tuple(alphas)


def multiscale_certify(
    sigmas: Sequence[float], sampling: Sampling, shares: Sequence[float] = ()
) -> Procedure[MultiscaleCertificate]:
    """CERTIFY the cascade, the largest sigma first.

    The level that decides says how much of alpha is spent: its own bound and those of the levels above are all at its
    share, for the radius is too large only if the one bound that should have been the smallest is.
    """
    if not sampling.plain:
        raise ConfigError("Multiscale knows neither a reference nor the randomised bound")
    alphas = level_alphas(sampling.alpha, len(sigmas), shares)
    levels: list[Certificate] = []
    for place in reversed(range(len(sigmas))):
        level = yield from certify(sigmas[place], replace(sampling, alpha=alphas[place]))
        levels.append(level)
        if not level.abstained or (place > 0 and _is_hopeless(levels, max(alphas[:place]), sampling.law)):
            break
    return _join(levels, sampling)


def _join(levels: Sequence[Certificate], sampling: Sampling) -> MultiscaleCertificate:
    last, above = levels[-1], levels[:-1]
    others = [0.0 if last.abstained else _radius_of_others(level, last, sampling.law) for level in above]
    radii = [last.radius, *others]
    radius = min(radii)
    certified = radius > 0.0
    bound = (last, *above)[radii.index(radius)]  # on a tie the level that decided
    return MultiscaleCertificate(
        prediction=last.prediction if certified else ABSTAIN,
        radius=radius,
        sigma=last.sigma if certified else None,
        levels=tuple(levels),
        radius_level=last.radius,
        radius_above=0.0 if last.abstained else min(radii[1:], default=math.inf),
        sigma_bound=bound.sigma if certified else None,
        alpha=sampling.alpha,
    )


def _radius_of_others(level: Certificate, last: Certificate, law: Law) -> float:
    """Radius within which no class but that of `last` has a probability above 1/2 at `level`.

    Its most frequent other class alone is bounded: the true one's bound is no better, so there is nothing to correct
    for the number of classes. A draw without a vote counts for that class too.
    """
    votes = level.counts_estimation
    highest = int(np.delete(votes, last.prediction).max(initial=0))
    successes, num = int(votes.sum()) - highest, level.num_estimation
    return bound_and_radius(successes, num, last.alpha, level.sigma, law)[1]


def _is_hopeless(levels: Sequence[Certificate], alpha: float, law: Law) -> bool:
    """Whether no level below can certify any class, at most at `alpha`: two classes are in doubt already."""
    in_doubt: set[int] = set()
    for level in levels:
        votes = level.counts_estimation
        p_lower = lower_bound(votes.sum() - votes, level.num_estimation, alpha, law)
        in_doubt |= set(np.flatnonzero(p_lower <= 0.5).tolist())
    return len(in_doubt) > 1
