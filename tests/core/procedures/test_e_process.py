"""The e-process: its value, its supermartingale property and its crossing probability, exactly."""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

from core.procedures.confidence import log_e_value, probability_of_radius
from tests.helpers.lattice import crossing, looks

SLACK = 1e-6
"""What `core.procedures.ladder` adds to the log threshold; here it also bounds the error of `log_e_value`."""


def exact_log_e_value(successes: int, num: int, p0: float) -> float:
    """The mixture of likelihood ratios by quadrature at 40 digits; shares no formula with `log_e_value`.

    With p = sin(t)^2 the Beta(1/2, 1/2) distribution, truncated to (p0, 1], is the uniform one of t.
    """
    with mpmath.workdps(40):
        q = mpmath.mpf(p0)
        low, high = mpmath.asin(mpmath.sqrt(q)), mpmath.pi / 2
        peak, width = mpmath.asin(mpmath.sqrt(mpmath.mpf(successes) / num)), 1 / mpmath.sqrt(4 * num)
        cuts = [low, *(t for j in (-24, -8, -2, 0, 2, 8, 24) if low < (t := peak + j * width) < high), high]

        def ratio(t: mpmath.mpf) -> mpmath.mpf:
            return (mpmath.sin(t) ** 2 / q) ** successes * (mpmath.cos(t) ** 2 / (1 - q)) ** (num - successes)

        return float(mpmath.log(mpmath.quad(ratio, cuts) / (high - low)))


@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.977, 0.9999])
@pytest.mark.parametrize(("successes", "num"), [(0, 1), (1, 1), (2, 5), (5, 5), (30, 40), (40, 40), (99, 100)])
def test_log_e_value_equals_quadrature_at_forty_digits(successes: int, num: int, p0: float) -> None:
    assert math.isclose(float(log_e_value(successes, num, p0)), exact_log_e_value(successes, num, p0), abs_tol=1e-12)


@pytest.mark.parametrize("p0", [0.5 + 1e-9, 0.9, 0.98])
@pytest.mark.parametrize("num", [1000, 100_000, 1_000_000])
def test_log_e_value_near_its_threshold_errs_by_less_than_the_slack(num: int, p0: float) -> None:
    successes = int(smallest_crossing(p0, np.array([num]), 1e-4)[0])
    assert successes < num
    error = abs(float(log_e_value(successes, num, p0)) - exact_log_e_value(successes, num, p0))
    assert error < SLACK / 10, f"off by {error:.2e}"


@pytest.mark.parametrize("p0", [0.5, 0.75, 0.9, 0.99, 0.9999])
def test_log_e_value_starts_at_one_and_is_a_martingale_at_p0_and_a_supermartingale_below(p0: float) -> None:
    assert float(log_e_value(0, 0, p0)) == 0.0
    for num in (0, 1, 2, 10, 99, 500):
        s = np.arange(num + 1)
        now = np.exp(log_e_value(s, num, p0))
        failed, succeeded = np.exp(log_e_value(s, num + 1, p0)), np.exp(log_e_value(s + 1, num + 1, p0))
        assert np.all(now[s <= num * p0] <= 1.0)
        # Far below p0 the tail of the Beta distribution loses its digits, and then all of it, to underflow.
        exact = special.betaincc(0.5 + s, 1.5 + num - s, p0) > 1e-290
        assert exact[s >= num * p0].all()
        np.testing.assert_allclose((p0 * succeeded + (1 - p0) * failed)[exact], now[exact], rtol=1e-9)
        for p in (0.0, 0.3, 0.5 * p0, 0.99 * p0):
            assert np.all((p * succeeded + (1 - p) * failed)[exact] < now[exact])


@given(num=st.integers(1, 5000), share=st.floats(0, 1), p0=st.floats(0.01, 0.9999))
def test_log_e_value_rises_with_the_successes(num: int, share: float, p0: float) -> None:
    successes = int(share * (num - 1))
    low, high = log_e_value(np.array([successes, successes + 1]), num, p0)
    if special.betaincc(0.5 + successes, 0.5 + num - successes, p0) > 1e-290:
        assert low < high
    else:  # far below p0 the tail of the Beta distribution loses its digits, and there is no evidence
        assert low < 0
        assert high < 0


@pytest.mark.parametrize("alpha", [0.4, 0.01, 0.00005])
def test_log_e_value_that_crosses_at_p0_crosses_at_every_smaller_p0(alpha: float) -> None:
    """So a target may depend on the votes, as it does where both stages read the same copies: what crosses at a target
    that is not true crosses at the true probability too, which has its failure probability set aside."""
    nums = np.unique(np.geomspace(1, 20_000, 60).astype(np.int64))
    p0s = np.concatenate([np.linspace(0.5, 0.999, 250), 1 - np.geomspace(1e-3, 1e-9, 50)[1:]])
    needed = np.array([smallest_crossing(float(p0), nums, alpha) for p0 in p0s])
    assert np.all(np.diff(needed, axis=0) >= 0)
    assert np.all((needed[0] < needed[-1])[nums > 100])


def smallest_crossing(p0: float, nums: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """For each number of draws the fewest successes that show p > p0; one more than the draws where none do."""
    low, high = np.full_like(nums, -1), nums + 1
    while np.any(high - low > 1):
        middle = (low + high) // 2
        crosses = log_e_value(middle, nums, p0) >= math.log(1 / alpha) + SLACK
        low, high = np.where(crosses, low, middle), np.where(crosses, middle, high)
    return high


@cache
def crossing_probability(p0: float, alpha: float, most: int, every: int, p: float) -> float:
    at = looks(most, every)
    needed = dict(zip(at, smallest_crossing(p0, np.array(at), alpha), strict=True))
    return crossing(p, at, lambda successes, num: successes >= needed[num])


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.00005])
@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.9332, 0.9772, 0.99])
def test_log_e_value_crossing_probability_by_dynamic_programming_is_at_most_alpha(
    p0: float, alpha: float, every: int
) -> None:
    found = crossing_probability(p0, alpha, 2000, every, p0)
    assert found <= alpha, f"crosses with {found / alpha:.3f} alpha"
    assert crossing_probability(p0, alpha, 2000, every, 0.99 * p0) < found


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.00005])
def test_log_e_value_crossing_probability_at_every_draw_is_above_half_of_alpha_somewhere(alpha: float) -> None:
    found = max(crossing_probability(p0, alpha, 2000, 1, p0) for p0 in (0.5, 0.8413, 0.9332))
    assert found > 0.75 * alpha, f"crosses with {found / alpha:.3f} alpha"  # a bug of 2 alpha would exceed alpha


@given(radius=st.floats(1e-9, 6), sigma=st.floats(0.05, 2))
@settings(deadline=None)
def test_probability_of_radius_against_forty_digits_is_never_below(radius: float, sigma: float) -> None:
    with mpmath.workdps(40):
        exact = mpmath.ncdf(mpmath.mpf(radius) / mpmath.mpf(min(sigma, float(np.float32(sigma)))))
        p = mpmath.mpf(float(probability_of_radius(radius, sigma)))
        assert exact < p < exact * (1 + mpmath.mpf(10) ** -12)
