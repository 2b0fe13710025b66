"""The randomised Clopper-Pearson bound against exact sums and 50-digit arithmetic."""

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from core.errors import ConfigError
from core.machine.noise_key import auxiliary
from core.procedures.confidence import certified_radius, clopper_pearson_lower, largest_radius
from core.procedures.randomized import randomized_lower, uniform_of
from core.procedures.smoothing import furthest
from core.records import Phase, Sampling

Bound = Callable[[int, int, float, float], float]


def failure(p: float, num: int, alpha: float, bound: Bound = randomized_lower) -> float:
    """P[bound > p], summed over the successes, and for each over U: the bound falls in U, so it is above p up to a U."""
    total = 0.0
    for k in range(num + 1):
        low, high = 0.0, 1.0
        if bound(k, num, alpha, 1.0) > p:
            low = 1.0
        elif bound(k, num, alpha, 1e-300) > p:
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if bound(k, num, alpha, middle) > p else (low, middle)
        total += low * float(stats.binom.pmf(k, num, p))
    return total


@pytest.mark.parametrize(("num", "alpha"), [(7, 0.1), (60, 0.001), (60, 0.1)])
def test_randomized_lower_fails_with_alpha_exactly(num: int, alpha: float) -> None:
    for p in (0.3, 0.5, 0.8123, 0.9 * 2 ** (-1 / num)):
        assert failure(p, num, alpha) == pytest.approx(alpha, rel=1e-6)
        plain = float(stats.binom.sf(np.searchsorted(clopper_pearson_lower(range(num + 1), num, alpha), p) - 1, num, p))
        assert plain < 0.9 * alpha  # Clopper-Pearson leaves some of it
    assert failure(0.999 + 0.001 * 2 ** (-1 / num), num, alpha) == 0.0  # above the cap nothing is claimed


def test_failure_finds_an_auxiliary_number_that_may_be_chosen_again() -> None:
    def chosen_again(k: int, num: int, alpha: float, uniform: float) -> float:
        return randomized_lower(k, num, alpha, 1 - (1 - uniform) ** 0.5)  # the smaller one of two

    assert failure(0.8, 60, 0.1, chosen_again) > 1.2 * 0.1


@pytest.mark.parametrize("num", [1, 10, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.1])
@pytest.mark.parametrize("share", [0.6, 0.99, 1.0])
def test_randomized_lower_is_never_above_the_exact_bound_and_close_to_it(num: int, alpha: float, share: float) -> None:
    k = round(share * num)
    with mpmath.workdps(50):

        def tail(least: int, p: float) -> mpmath.mpf:
            return mpmath.betainc(least, num - least + 1, 0, mpmath.mpf(p), regularized=True) if least <= num else 0

        for uniform in (1.0, 0.37, 1e-9):
            found = randomized_lower(k, num, alpha, uniform)
            level = [uniform * tail(k, p) + (1 - mpmath.mpf(uniform)) * tail(k + 1, p) for p in (found, found + 3e-9)]
            assert level[0] <= alpha
            assert level[1] > alpha or found + 3e-9 > 2 ** (-1 / num)


def test_randomized_lower_lies_between_the_bounds_of_a_success_more_and_fewer() -> None:
    for k in (3, 70, 98, 99):
        bounds = [randomized_lower(k, 100, 0.001, u) for u in np.linspace(1.0, 1e-12, 50).tolist()]
        assert bounds == sorted(bounds)
        assert bounds[0] == pytest.approx(float(clopper_pearson_lower(k, 100, 0.001)), rel=1e-8)
        most = min(float(clopper_pearson_lower(k + 1, 100, 0.001)), 2**-0.01)
        assert bounds[-1] == pytest.approx(most, rel=1e-8)


@pytest.mark.parametrize(("num", "plain", "mean"), [(100, 1.500, 1.585), (10_000, 3.199, 3.249)])
def test_randomized_lower_largest_radius(num: int, plain: float, mean: float) -> None:
    assert largest_radius(1.0, num, 0.001) == pytest.approx(plain, abs=1e-3)
    grid = (np.arange(1000) + 0.5) / 1000
    radii = [float(certified_radius(randomized_lower(num, num, 0.001, u), 1.0)) for u in grid.tolist()]
    assert np.mean(radii) == pytest.approx(mean, abs=1e-3)
    cap = float(special.ndtri(2 ** (-1 / num)))
    assert max(radii) < furthest(1.0, Sampling(10, num, 0.001, bound="randomized")) == pytest.approx(cap, rel=1e-9)


@pytest.mark.parametrize(("alpha", "uniform"), [(0.5, 0.5), (0.1, 0.0), (0.1, None), (0.1, 1.1)])
def test_randomized_lower_bad_input_raises(alpha: float, uniform: float | None) -> None:
    with pytest.raises(ConfigError, match="randomised bound needs"):
        randomized_lower(5, 10, alpha, uniform)


def numbers(**changes: object) -> NDArray[np.float64]:
    """U of many examples, one of the key's parts changed."""
    key = {"seed": 3, "phase": Phase.ESTIMATION, "sigma": 0.5} | changes
    return np.array([uniform_of(auxiliary(example_id=f"example {n}", **key)) for n in range(20_000)])  # type: ignore[arg-type]


def test_auxiliary_is_uniform_repeats_and_is_independent_between_keys() -> None:
    base = numbers()
    assert (base == numbers()).all()
    assert stats.kstest(base, "uniform").pvalue > 1e-4
    others: list[dict[str, object]] = [{"seed": 4}, {"sigma": 0.25}, {"phase": Phase.SELECTION}]
    for other in (np.roll(base, 1), *(numbers(**change) for change in others)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / 20_000**0.5
    assert (uniform_of(0), uniform_of(2**53 - 1)) == (2.0**-53, 1.0)
