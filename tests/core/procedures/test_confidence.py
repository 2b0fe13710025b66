import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from core.errors import ConfigError
from core.law import GAUSSIAN, Gaussian
from core.procedures.confidence import (
    binomial_p_value,
    bound_and_radius,
    certified_radius,
    clopper_pearson_lower,
    clopper_pearson_upper,
    draws_needed,
    largest_radius,
    log_e_value,
    lower_bound,
    lower_bounds,
    probability_missed,
    probability_of_radius,
    radius_of_two_bounds,
    top_two,
)


def exact_tail(n: int, k: int, p: mpmath.mpf) -> mpmath.mpf:
    """P[Bin(n, p) >= k] by its sum, at 40 digits."""
    term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
    total = term
    for i in range(k, n):
        term = term * (n - i) / (i + 1) * p / (1 - p)
        total += term
        if i > n * p and term < total * mpmath.mpf(10) ** -38:
            break
    return total


def looseness(bound: mpmath.mpf) -> mpmath.mpf:
    """By which share of it a bound may at most be too low."""
    return mpmath.mpf(10) ** (-11 if bound > 0.5 else -8)


CASES = [
    (k, n, alpha)
    for n in (1, 10, 100, 1000, 10_000, 100_000)
    for k in sorted({1, max(1, n // 3), max(1, n * 9 // 10), max(1, n - 1), n})
    for alpha in (0.1, 0.001, 0.0005, 1e-9)
]


@pytest.mark.parametrize(("k", "n", "alpha"), CASES)
def test_clopper_pearson_lower_against_forty_digits_is_valid_and_tight(k: int, n: int, alpha: float) -> None:
    with mpmath.workdps(40):
        bound = mpmath.mpf(float(clopper_pearson_lower(k, n, alpha)))
        assert exact_tail(n, k, bound) <= mpmath.mpf(alpha)
        assert exact_tail(n, k, bound * (1 + looseness(bound))) > mpmath.mpf(alpha)


@pytest.mark.parametrize(
    ("k", "n", "alpha", "above"),
    [  # where SciPy's quantile, less 2^-44 of it, lay above the bound, and by which share of it
        (1996, 10_000, 1e-6, 4e-14),
        (100_000, 1_000_000, 1e-6, 9e-13),
        (100_000, 1_000_000, 1e-20, 1e-12),
        (163_369, 1_000_000, 1e-80, 2e-12),
        (90, 100, 1e-20, 5e-15),
    ],
)
def test_clopper_pearson_lower_up_to_one_half_is_never_above_fifty_digits(
    k: int, n: int, alpha: float, above: float
) -> None:
    with mpmath.workdps(50):
        bound, before = (mpmath.mpf(float(lower_bound(k, n, alpha, Gaussian(version)))) for version in (2, 1))
        assert before <= 0.5
        assert exact_tail(n, k, before * (1 - mpmath.mpf(above))) > mpmath.mpf(alpha), "the case shows nothing"
        assert exact_tail(n, k, bound) < mpmath.mpf(alpha)


@pytest.mark.parametrize("alpha", [0.05, 1e-4, 1e-12, 1e-19, 1e-40, 1e-100])
def test_clopper_pearson_lower_and_upper_of_random_counts_are_safe_at_any_alpha(alpha: float) -> None:
    random = np.random.default_rng(0)
    with mpmath.workdps(50):
        for n in (9, 200, 3000):
            for k in random.integers(1, n + 1, 6).tolist():
                lower, upper = (f(k, n, alpha) for f in (clopper_pearson_lower, clopper_pearson_upper))
                assert exact_tail(n, k, mpmath.mpf(float(lower))) < mpmath.mpf(alpha)
                assert upper == 1.0 or exact_tail(n, n - k, 1 - mpmath.mpf(float(upper))) < mpmath.mpf(alpha)


def test_bounds_above_one_half_are_those_of_the_first_arithmetic() -> None:
    """Nothing that certifies has moved but by the noise level, and that only where float32 is smaller."""
    one, two = (lower_bound(np.arange(1001), 1000, 0.001, Gaussian(version)) for version in (1, 2))
    assert np.array_equal(one[one > 0.5], two[one > 0.5])
    assert np.all(two[1:] <= one[1:])
    assert np.all(two > one * (1 - 1e-9) - 1e-300)
    assert [float(GAUSSIAN.scale(sigma)) for sigma in (0.12, 0.1, 0.25)] == [float(np.float32(0.12)), 0.1, 0.25]
    assert float(Gaussian(1).scale(0.12)) == 0.12
    assert 0.0 < 1 - float(certified_radius(0.9, 0.12) / certified_radius(0.9, 0.12, Gaussian(1))) < 3e-8
    assert float(certified_radius(0.9, 0.1)) == float(certified_radius(0.9, 0.1, Gaussian(1)))


@pytest.mark.parametrize(
    ("total", "odd", "drawn"), [(10, 1, 3), (100, 10, 20), (10, 8, 3), (10, 9, 7), (5, 0, 5), (1_000, 7, 300)]
)
def test_probability_missed_equals_the_ratio_of_binomials(total: int, odd: int, drawn: int) -> None:
    exact = math.comb(total - odd, drawn) / math.comb(total, drawn)
    assert probability_missed(total, odd, drawn) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize("p", [0.5000001, 0.6, 0.9, 0.999, 1 - 1e-9])
def test_certified_radius_against_forty_digits_is_never_above(p: float, sigma: float) -> None:
    with mpmath.workdps(40):
        applied = min(mpmath.mpf(sigma), mpmath.mpf(float(np.float32(sigma))))  # what noise is scaled with, at most
        exact = applied * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)
        radius = mpmath.mpf(float(certified_radius(p, sigma)))
        assert exact * (1 - mpmath.mpf(10) ** -12) < radius < exact


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize(("one", "other"), [(700, 700), (900, 970), (990, 400), (1000, 1000)])
def test_radius_of_two_bounds_against_forty_digits_is_never_above(one: int, other: int, sigma: float) -> None:
    bounds = clopper_pearson_lower([one, other], 1000, 0.001).tolist()
    with mpmath.workdps(40):
        applied = min(mpmath.mpf(sigma), mpmath.mpf(float(np.float32(sigma))))
        exact = applied / 2 * sum(mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1) for p in bounds)
        radius = mpmath.mpf(radius_of_two_bounds(one, other, 1000, 0.001, sigma))
        assert exact * (1 - mpmath.mpf(10) ** -12) < radius < exact


@pytest.mark.parametrize("n", [12, 100, 1000])
def test_clopper_pearson_lower_failure_probability_by_exact_sum_is_just_below_alpha(n: int) -> None:
    alpha = 0.001
    bounds = clopper_pearson_lower(np.arange(n + 1), n, alpha)
    worst = 0.0
    for bound in bounds[1:]:  # the failure probability peaks for a true p just below a value of the bound
        p = bound * (1 - 1e-9)
        worst = max(worst, float(stats.binom.pmf(np.flatnonzero(bounds > p), n, p).sum()))
    assert worst <= alpha
    assert worst > 0.99 * alpha  # a 2 alpha (or alpha / 2) bug leaves this band


@pytest.mark.parametrize(("k", "n", "alpha"), CASES)
def test_clopper_pearson_upper_against_forty_digits_is_valid_and_tight(k: int, n: int, alpha: float) -> None:
    with mpmath.workdps(40):
        bound = mpmath.mpf(float(clopper_pearson_upper(k - 1, n, alpha)))
        # P[Bin(n, p) <= k - 1] = P[Bin(n, 1 - p) >= n - k + 1]
        assert exact_tail(n, n - k + 1, 1 - bound) <= mpmath.mpf(alpha)
        slightly_less = (1 - bound) * (1 + looseness(1 - bound)) + mpmath.mpf(10) ** -15
        assert exact_tail(n, n - k + 1, slightly_less) > mpmath.mpf(alpha)
    assert clopper_pearson_upper(n, n, alpha) == 1.0


@given(n=st.integers(1, 20_000), share=st.floats(0, 1), alpha=st.floats(1e-12, 0.5))
def test_clopper_pearson_lower_is_monotone_in_successes_and_alpha(n: int, share: float, alpha: float) -> None:
    k = int(share * (n - 1))
    low, high = clopper_pearson_lower([k, k + 1], n, alpha)
    assert 0 <= low < high < (k + 1) / n
    assert clopper_pearson_lower(k, n, alpha / 2) <= low


@given(p=st.floats(0, 0.999999), sigma=st.floats(0.01, 4))
def test_certified_radius_is_linear_in_sigma_and_zero_up_to_one_half(p: float, sigma: float) -> None:
    radius = float(certified_radius(p, sigma))
    assert math.isclose(float(certified_radius(p, 2 * sigma)), 2 * radius, rel_tol=1e-14)
    assert (radius > 0) == (p > 0.5)


def test_certified_radius_without_a_bound_above_one_half_is_zero() -> None:
    radii = certified_radius([0.0, 0.3, 0.5, math.nan], 0.25)
    assert radii.tolist() == [0.0] * 4
    assert not np.signbit(radii).any()
    assert certified_radius(math.nextafter(0.5, 1.0), 0.25) > 0.0


@pytest.mark.parametrize(
    ("radius", "sigma", "alpha"),
    [
        (1.0, 0.5, 0.0005),
        (0.0, 1.0, 0.001),
        (3.0, 1.0, 0.001),
        (0.6, 0.5, 0.001),
        (2.0, 0.5, 0.001),
        (0.3, 0.12, 0.1),
        (3.0, 2.0, 0.001),
    ],
)
def test_draws_needed_is_the_fewest_that_reach_the_radius(radius: float, sigma: float, alpha: float) -> None:
    n = draws_needed(radius, sigma, alpha)
    assert largest_radius(sigma, n, alpha) > radius
    assert n == 1 or largest_radius(sigma, n - 1, alpha) <= radius


@pytest.mark.parametrize("num", [12, 20, 300])
def test_draws_needed_for_just_what_so_many_reach_is_one_more(num: int) -> None:
    assert draws_needed(largest_radius(0.5, num, 0.001), 0.5, 0.001) == num + 1


def test_draws_needed_beyond_a_million_is_the_formula() -> None:
    expected = math.log(0.001) / stats.norm.logcdf(5.0)  # Phi(5)^n = alpha
    assert expected > 1e7
    assert draws_needed(2.5, 0.5, 0.001) == pytest.approx(expected, abs=2)


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_binomial_p_value_equals_scipy_binomtest(n: int, share: float) -> None:
    k = round(share * n)
    assert math.isclose(binomial_p_value(k, n), stats.binomtest(k, n, 0.5).pvalue, rel_tol=1e-9, abs_tol=1e-15)


def test_binomial_p_value_without_draws_is_one() -> None:
    assert binomial_p_value(0, 0) == 1.0


@pytest.mark.parametrize(
    ("k", "n", "alpha"), [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1e-101), (1, 2, 1.0)]
)
def test_clopper_pearson_lower_out_of_range_raises(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ConfigError):
        clopper_pearson_lower(k, n, alpha)


def test_top_two_ties_go_to_the_smaller_index() -> None:
    assert top_two(np.array([3, 7, 7])) == (1, 7, 7)
    assert top_two(np.array([5])) == (0, 5, 0)
    assert top_two(np.array([3, 7])) == (1, 7, 3)
    assert top_two(np.array([4, 4])) == (0, 4, 4)


@given(n=st.integers(1, 20_000), share=st.floats(0.5, 1), low=st.floats(0, 1), high=st.floats(0, 1))
def test_log_e_value_falls_as_the_null_rises_where_it_counts(n: int, share: float, low: float, high: float) -> None:
    """What lets a target depend on data: evidence against a larger p0 is evidence against a smaller one."""
    successes = math.ceil(share * n)
    one, two = (0.5 + 0.4999 * p for p in sorted((low, high)))
    larger = float(log_e_value(successes, n, two))
    if larger >= math.log(1 / 0.49):
        assert float(log_e_value(successes, n, one)) >= larger - 1e-9 * max(1.0, larger)


def test_radii_and_probabilities_of_float32_arguments_are_float64() -> None:
    narrow = np.array([0.6, 0.7, 0.99], np.float32)
    for function in (certified_radius, probability_of_radius):
        assert function(narrow, 0.25).dtype == np.float64
        assert function(narrow, 0.25).tolist() == [float(function(float(value), 0.25)) for value in narrow]
    assert GAUSSIAN.scale(narrow).dtype == Gaussian(1).scale(narrow).dtype == np.float64
    assert certified_radius(0.7, narrow).tolist() == [float(certified_radius(0.7, float(sigma))) for sigma in narrow]


@pytest.mark.parametrize("alpha", [0.3, 1e-5])
def test_lower_bounds_and_bound_and_radius_are_the_beta_quantile_for_every_number_of_successes(alpha: float) -> None:
    expected = [0.0, *np.asarray(stats.beta.ppf(alpha, np.arange(1, 31), 31 - np.arange(1, 31))).tolist()]
    bounds = lower_bounds(30, alpha)
    np.testing.assert_allclose(bounds, expected, rtol=1e-8)
    with pytest.raises(ValueError, match="read-only"):
        bounds[0] = 1.0
    for k, p in enumerate(expected):
        p_lower, radius = bound_and_radius(k, 30, alpha, 0.25)
        assert p_lower == bounds[k]
        assert radius == pytest.approx(0.25 * stats.norm.ppf(p) if p > 0.5 else 0.0, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 0.001])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_largest_radius_is_that_of_the_quantile_of_unanimous_draws(sigma: float, alpha: float) -> None:
    for num in (1, 2, 50, 1000):
        p = alpha ** (1 / num)  # P[Bin(num, p) = num] = alpha
        expected = sigma * stats.norm.ppf(p) if p > 0.5 else 0.0
        assert largest_radius(sigma, num, alpha) == pytest.approx(expected, rel=1e-9)
