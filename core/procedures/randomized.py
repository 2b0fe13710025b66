"""The randomised Clopper-Pearson bound (Stevens 1950; for smoothing Voracek 2024, arXiv 2406.17830).

The votes of n draws are integers, so the bound of Clopper and Pearson fails with less than alpha for almost every true
probability. A uniform number U, independent of the draws, between one count and the next makes it fail with alpha
exactly. U is a function of the draws' key (`core.machine.noise_key.auxiliary`): chosen anew, it would be a selection.
"""

import functools

from scipy import special

from core.errors import ConfigError
from core.procedures.confidence import LOW_SLACK, SLACK, clopper_pearson_lower

__all__ = ["randomized_lower", "uniform_of"]


def uniform_of(number: int) -> float:
    """Of [0, 2^53) to (0, 1], exactly, and no smaller than what is uniform there: on the safe side."""
    return (number + 1) / 2.0**53


@functools.lru_cache(maxsize=65_536)
def randomized_lower(successes: int, num: int, alpha: float, uniform: float | None) -> float:
    """One-sided lower confidence bound of a success probability whose failure probability is alpha exactly.

    The p at which U P[S >= k] + (1 - U) P[S >= k + 1] = alpha: Clopper-Pearson's for U = 1, that of one success more
    for U -> 0. It is never above 2^(-1/n): where all draws are successes and U is below 2 alpha, it would be there or
    beyond, up to 1 with probability alpha, and so certify any radius. Up to that p, P[bound > p] = alpha.

    Args:
        successes: k in [0, num].
        num: n >= 1.
        alpha: failure probability in [1e-100, 1/2).
        uniform: U in (0, 1].

    Returns:
        float64 in [0, 2^(-1/n)], never above the exact bound; 0.0 for k = 0.

    Raises:
        ConfigError: for an argument out of range.
    """
    if uniform is None or not 0.0 < uniform <= 1.0 or not alpha < 0.5:
        raise ConfigError(f"the randomised bound needs alpha < 1/2 and a number in (0, 1], got {alpha!r}, {uniform!r}")
    k, n = successes, num
    low = float(clopper_pearson_lower(k, n, alpha))
    if k == 0:
        return 0.0
    cap = 2.0 ** (-1.0 / n)
    high = cap if k == n else min(cap, float(special.betaincinv(k + 1, n - k, alpha)))
    if high == cap and _p_value(cap, k, n, uniform) <= alpha:
        low = cap
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _p_value(middle, k, n, uniform) <= alpha else (low, middle)
    return low * (1.0 - (SLACK if low > 0.5 else LOW_SLACK))


def _p_value(p: float, k: int, n: int, uniform: float) -> float:
    """U P[S >= k] + (1 - U) P[S >= k + 1] for S of n draws at p: of the test of "at most p"."""
    more = float(special.betainc(k + 1, n - k, p)) if k < n else 0.0
    return uniform * float(special.betainc(k, n - k + 1, p)) + (1.0 - uniform) * more
