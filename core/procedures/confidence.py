"""Exact binomial confidence bounds and the radius they certify, in float64 and rounded towards zero.

The quantiles come from SciPy, whose last few bits are not guaranteed. A certificate is a promise, so every bound is
moved towards the safe side by `SLACK` (`LOW_SLACK` up to 1/2, where nothing is certified and SciPy is worse), which is
larger than any error seen against 50-digit arithmetic (`tests/core/procedures/test_confidence.py`) and far smaller than
what one draw more or less changes.
"""

import functools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from core.errors import ConfigError
from core.law import GAUSSIAN, Floats, Law

__all__ = [
    "binomial_p_value",
    "bound_and_radius",
    "certified_radius",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "draws_needed",
    "largest_radius",
    "log_e_value",
    "lower_bound",
    "lower_bounds",
    "probability_missed",
    "probability_of_radius",
    "radius_of_two_bounds",
    "top_two",
]

SLACK = 2.0**-44
"""Relative step towards the safe side, 256 units in the last place; SciPy was seen to be off by 36."""

LOW_SLACK = 2.0**-30
"""The step for bounds up to 1/2, where SciPy was seen to be off by 3e-12."""

MIN_ALPHA = 1e-100
"""Smaller ones are refused: SciPy was seen to be off by 2% at 1e-300."""


def _check_counts(k: NDArray[np.int64], n: NDArray[np.int64], alpha: ArrayLike) -> None:
    if np.any(n < 1) or np.any(k < 0) or np.any(k > n):
        raise ConfigError(f"need 0 <= successes <= draws and draws >= 1, got successes={k!r}, draws={n!r}")
    if not np.all((np.asarray(alpha) >= MIN_ALPHA) & (np.asarray(alpha) < 1.0)):
        raise ConfigError(f"alpha is a failure probability and must lie in [{MIN_ALPHA:g}, 1), got {alpha!r}")


def clopper_pearson_lower(
    successes: ArrayLike, num: ArrayLike, alpha: ArrayLike, low_slack: float = LOW_SLACK
) -> Floats:
    """One-sided exact lower confidence bound of a success probability (Clopper & Pearson 1934).

    P[bound <= p] >= 1 - alpha for every true p: the bound is BetaInv(alpha; k, n - k + 1), and 0 for k = 0.

    Args:
        successes: k, integers in [0, num]; any shape that broadcasts with the others.
        num: n >= 1.
        alpha: failure probability in [1e-100, 1).
        low_slack: the relative step for bounds up to 1/2.

    Returns:
        float64 in [0, 1), never above the exact bound.

    Raises:
        ConfigError: for counts or an alpha out of range.
    """
    k, n = np.asarray(successes, np.int64), np.asarray(num, np.int64)
    _check_counts(k, n, alpha)
    bound = special.betaincinv(np.maximum(k, 1), n - k + 1, np.asarray(alpha, np.float64))
    bound = bound * (1.0 - np.where(bound <= 0.5, low_slack, SLACK))
    return np.asarray(np.where(k == 0, 0.0, bound))


def clopper_pearson_upper(successes: ArrayLike, num: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided exact upper confidence bound, 1 - `clopper_pearson_lower` of the failures.

    Returns:
        float64 in (0, 1], never below the exact bound.
    """
    upper = 1.0 - clopper_pearson_lower(np.subtract(num, successes), num, alpha)
    return np.asarray(np.minimum(np.nextafter(upper, 2.0), 1.0))  # the subtraction rounds to nearest


def lower_bound(successes: ArrayLike, num: ArrayLike, alpha: ArrayLike, law: Law = GAUSSIAN) -> Floats:
    """The lower bound of a probability that `law` takes: Clopper & Pearson's, or the share where `num` are all copies.

    In the first arithmetic bounds up to 1/2 may lie 3e-12 above the exact ones.
    """
    if law.exhaustive:
        return np.asarray(np.asarray(successes, np.int64) / np.asarray(num, np.int64) * (1.0 - SLACK))
    return clopper_pearson_lower(successes, num, alpha, SLACK if law.arithmetic == 1 else LOW_SLACK)


def certified_radius(p_lower: ArrayLike, sigma: ArrayLike, law: Law = GAUSSIAN) -> Floats:
    """The radius that a majority certifies; under Gaussian noise sigma * Phi^-1(p_lower) (Cohen et al. 2019, theorem 1,
    with p_B = 1 - p_A).

    Args:
        p_lower: lower bound of the top class's probability, in [0, 1).
        sigma: noise level, > 0, pixel scale [0, 1].
        law: what the noise proves.

    Returns:
        float64 radius in the norm of `law`, pixel scale, rounded towards zero; 0.0 where p_lower <= 1/2 (nothing is
        certified).
    """
    p = np.asarray(p_lower, np.float64)
    radius = law.scale(sigma) * law.quantile(np.maximum(p, 0.5)) * (1.0 - SLACK)
    return np.asarray(np.where(p > 0.5, radius, 0.0))


@functools.lru_cache(maxsize=65_536)
def bound_and_radius(successes: int, num: int, alpha: float, sigma: float, law: Law = GAUSSIAN) -> tuple[float, float]:
    """`lower_bound` and the `certified_radius` of it; cached, for with few draws the same votes recur."""
    p_lower = float(lower_bound(successes, num, alpha, law))
    return p_lower, float(certified_radius(p_lower, sigma, law))


def radius_of_two_bounds(one: int, other: int, num: int, alpha: float, sigma: float, law: Law = GAUSSIAN) -> float:
    """Half of the difference of both quantiles: of Gaussian noise sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)) (Cohen et al.
    2019, theorem 1), with a bound of either at `alpha`.

    Args:
        one: of `num` draws those in A; p_A is bounded from below.
        other: those outside B; p_B is bounded from above by one less their lower bound.
        num: draws.
        alpha: failure probability of each bound.
        sigma: noise level.
        law: what the noise proves.

    Returns:
        The radius, rounded towards zero; 0.0 where nothing is certified. At one = other it is `certified_radius`.
    """
    if not one or not other:
        return 0.0  # no bound: the quantile may be infinite
    a, b = (float(law.quantile(bound)) for bound in lower_bound([one, other], num, alpha, law))
    return max(0.0, float(law.scale(sigma)) / 2 * (a + b - SLACK * (abs(a) + abs(b))))


def largest_radius(sigma: float, num: int, alpha: float, law: Law = GAUSSIAN) -> float:
    """The largest radius that `num` draws can certify: all of them agree, a bound of alpha^(1/num)."""
    return float(certified_radius(lower_bound(num, num, alpha, law), sigma, law))


def draws_needed(radius: float, sigma: float, alpha: float, law: Law = GAUSSIAN) -> int:
    """The fewest draws whose `largest_radius` exceeds `radius` (beyond a million, to within a few); all that there are
    under an exhaustive law.

    Raises:
        ConfigError: for a radius that no number of draws certifies, or none below 10^15.
    """
    if radius >= law.limit(sigma):
        raise ConfigError(f"no radius from {law.limit(sigma):.4g} on can be certified at sigma = {sigma:g}")
    if law.exhaustive:
        return law.copies(sigma)
    certain = float(np.log(law.cdf(radius / law.scale(sigma))))
    if certain > -1e-15:  # of what rounding leaves
        raise ConfigError(f"a radius of {radius:g} cannot be certified at sigma = {sigma:g} in 10^15 draws")
    needed = math.floor(math.log(alpha) / certain) + 1
    while needed < 1_000_000 and largest_radius(sigma, needed, alpha, law) <= radius:
        needed += 1
    return needed


def log_e_value(successes: ArrayLike, num: ArrayLike, p0: float) -> Floats:
    """Log of the evidence against "the success probability is at most p0" after `num` draws.

    The likelihood ratio of a Beta(1/2, 1/2) mixture, truncated to (p0, 1], against p0. For every true p <= p0 it is a
    non-negative supermartingale that starts at 1 (each ratio p1 against p0 with p1 > p0 rises with the successes), so
    with probability at least 1 - a it never reaches 1 / a, however often it is looked at (Ville's inequality).

    Where it is above 1 / 0.49 and p0 >= 1/2 it falls as p0 rises: the slope of its logarithm is
    h (1 - 1/M) - (S - n p0) / (p0 (1 - p0)), the prior's hazard h is at most 1 / (2 sqrt(p0) (1 - p0)), and
    S - n p0 >= p0 ln M. So whoever reaches 1 / a at some p0, chosen by whatever data, reaches it at every smaller one
    too, the true p among them: a target may depend on the other stage's draws even where both read the same noise.

    Args:
        successes: S, integers in [0, num].
        num: n >= 0.
        p0: in (0, 1).

    Returns:
        float64, -inf where it underflows.
    """
    s, n = np.asarray(successes), np.asarray(num)
    a = b = 0.5
    with np.errstate(divide="ignore"):
        tail = np.log(special.betaincc(a + s, b + n - s, p0)) - np.log(special.betaincc(a, b, p0))
    mixture = special.betaln(a + s, b + n - s) - special.betaln(a, b)
    return np.asarray(mixture + tail - s * math.log(p0) - (n - s) * math.log1p(-p0))


def probability_of_radius(radius: ArrayLike, sigma: float, law: Law = GAUSSIAN) -> Floats:
    """The probability that certifies a radius, rounded up: showing that p is above it certifies at least as much.

    Under Gaussian noise Phi(radius / sigma). 1 or more where no probability does.
    """
    return np.asarray(law.cdf(np.asarray(radius, np.float64) / law.scale(sigma)) * (1.0 + SLACK))


@functools.lru_cache(maxsize=64)
def lower_bounds(num: int, alpha: float, law: Law = GAUSSIAN) -> Floats:
    """`lower_bound` for every number of successes 0 .. num; cached, read-only."""
    bounds = lower_bound(np.arange(num + 1), num, alpha, law)
    bounds.setflags(write=False)
    return bounds


def binomial_p_value(successes: int, num: int) -> float:
    """Two-sided exact p-value of `successes` out of `num` against probability 1/2; 1.0 at num = 0.

    The binomial at 1/2 is symmetric, so it is twice the smaller tail. As the test of the two top classes it keeps its
    level although they were chosen by the same draws (Hung & Fithian 2019).
    """
    return min(1.0, 2.0 * float(special.bdtr(min(successes, num - successes), num, 0.5)))


def probability_missed(total: int, odd: int, drawn: int) -> float:
    """P[none of `odd` rows is among `drawn` of `total`, drawn without replacement] (hypergeometric)."""
    terms = special.gammaln(np.array([total - odd, total - drawn, total - odd - drawn, total], np.float64) + 1.0)
    return float(np.exp(terms[0] + terms[1] - terms[2] - terms[3]))  # a factorial below 0 is infinite


def top_two(counts: NDArray[np.int64]) -> tuple[int, int, int]:
    """The most frequent class and the votes of the first and the second; ties go to the smaller index."""
    first = int(counts.argmax())
    second = int(np.delete(counts, first).max()) if counts.size > 1 else 0
    return first, int(counts[first]), second
