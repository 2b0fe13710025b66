"""The randomised Clopper-Pearson bound against exact sums and 50-digit arithmetic."""

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from core.machine.noise_key import auxiliary
from core.procedures.confidence import certified_radius, clopper_pearson_lower, largest_radius
from core.procedures.randomized import randomized_lower, uniform_of
from core.procedures.smoothing import certify, furthest
from core.records import ABSTAIN, AUXILIARY, CLASSIFIER, Answer, Draws, Phase, Sampling
from tests.core.procedures.test_confidence import exact_tail, looseness
from tests.helpers.oracles import drive

Bound = Callable[[int, int, float, float], float]


def failure(p: float, num: int, alpha: float, bound: Bound = randomized_lower) -> float:
    """P[bound > p], a sum over the successes, and over U for those for which the bound passes p as U falls."""

    def above(k: int, uniform: float) -> bool:
        return bound(k, num, alpha, uniform) > p

    k = next((k for k in range(num + 1) if above(k, 1e-300)), num + 1)
    total = float(stats.binom.sf(k - 1, num, p))
    if k <= num and not above(k, 1.0):
        low, high = 0.0, 1.0
        for _ in range(35):
            middle = (low + high) / 2
            low, high = (middle, high) if above(k, middle) else (low, middle)
        total -= (1.0 - low) * float(stats.binom.pmf(k, num, p))
        assert k == num or above(k + 1, 1.0)
    return total


@pytest.mark.parametrize(("num", "alpha"), [(7, 0.1), (60, 0.001), (60, 0.1)])
def test_randomized_lower_fails_with_alpha_exactly(num: int, alpha: float) -> None:
    for p in (0.5, 0.8123, 0.9999 * 2 ** (-1 / num)):
        assert failure(p, num, alpha) == pytest.approx(alpha, rel=1e-6)
        plain = float(stats.binom.sf(np.searchsorted(clopper_pearson_lower(range(num + 1), num, alpha), p) - 1, num, p))
        assert plain < 0.9 * alpha  # Clopper-Pearson leaves some of it
    assert failure(0.999 + 0.001 * 2 ** (-1 / num), num, alpha) == 0.0  # above the cap nothing is claimed


def test_failure_finds_an_auxiliary_number_that_may_be_chosen_again() -> None:
    def chosen_again(k: int, num: int, alpha: float, uniform: float) -> float:
        return randomized_lower(k, num, alpha, max(1e-300, 1 - (1 - uniform) ** 0.5))  # the smaller one of two

    assert max(failure(p, 60, 0.1, chosen_again) for p in (0.78, 0.79, 0.8, 0.81)) > 1.08 * 0.1


@pytest.mark.parametrize(("num", "share"), [(1, 1.0), (100, 0.3), (100, 0.9), (10_000, 0.999), (10_000, 1.0)])
@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.1])
def test_randomized_lower_is_never_above_the_exact_bound_and_close_to_it(num: int, alpha: float, share: float) -> None:
    k = round(share * num)

    def tail(least: int, p: mpmath.mpf) -> mpmath.mpf:
        return exact_tail(num, least, p) if least <= num else mpmath.mpf(0)

    with mpmath.workdps(40):
        for uniform in (1.0, 0.37, 1e-9):
            found = mpmath.mpf(randomized_lower(k, num, alpha, uniform))
            below, above = (
                uniform * tail(k, p) + (1 - mpmath.mpf(uniform)) * tail(k + 1, p)
                for p in (found, found * (1 + looseness(found)))
            )
            assert below <= alpha
            assert above > alpha or found * (1 + looseness(found)) > 2 ** (-1 / num)


@pytest.mark.parametrize(("num", "plain", "mean"), [(100, 1.500, 1.585), (10_000, 3.199, 3.249)])
def test_randomized_lower_largest_radius(num: int, plain: float, mean: float) -> None:
    assert largest_radius(1.0, num, 0.001) == pytest.approx(plain, abs=1e-3)
    grid = (np.arange(1000) + 0.5) / 1000
    radii = [float(certified_radius(randomized_lower(num, num, 0.001, u), 1.0)) for u in grid.tolist()]
    assert np.mean(radii) == pytest.approx(mean, abs=1e-3)
    cap = float(special.ndtri(2 ** (-1 / num)))
    assert max(radii) <= furthest(1.0, Sampling(10, num, 0.001, bound="randomized")) == pytest.approx(cap, rel=1e-9)


def numbers(**changes: object) -> NDArray[np.float64]:
    """U of many examples, one of the key's parts changed."""
    key = {"seed": 3, "phase": Phase.ESTIMATION, "sigma": 0.5} | changes
    return np.array([uniform_of(auxiliary(example_id=f"example {n}", **key)) for n in range(5000)])  # type: ignore[arg-type]


def test_auxiliary_is_uniform_repeats_and_is_independent_between_keys() -> None:
    base = numbers()
    assert (base == numbers()).all()
    assert stats.kstest(base, "uniform").pvalue > 1e-4
    others: list[dict[str, object]] = [{"seed": 4}, {"sigma": 0.25}, {"phase": Phase.SELECTION}]
    for other in (np.roll(base, 1), *(numbers(**change) for change in others)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / 5000**0.5
    assert (uniform_of(0), uniform_of(2**53 - 1)) == (2.0**-53, 1.0)


@pytest.mark.slow
def test_false_certificates_of_the_randomized_bound_over_20_000_are_a_share_alpha() -> None:
    """Two classes of probability 1/2, where any certificate is false; the plain bound leaves some of alpha."""
    rng, false = np.random.default_rng(0), {}
    for bound in ("clopper_pearson", "randomized"):
        sampling, claims = Sampling(11, 60, 0.1, bound=bound), 0
        for n in range(20_000):

            def votes(draws: Draws, name: str = f"example {n}") -> Answer:
                ones = rng.binomial(draws.num, 0.5)
                number = auxiliary(0, name, draws.phase, draws.sigma)
                return {CLASSIFIER: np.array([draws.num - ones, ones]), AUXILIARY: np.array([number])}

            claims += drive(certify(0.5, sampling), votes).prediction != ABSTAIN
        false[bound] = claims
        print(f"{bound}: {claims:,} of 20,000 false at alpha 0.1")
    assert abs(false["randomized"] - 2000) < 4.5 * (20_000 * 0.09) ** 0.5
    expected = float(stats.binom.sf(np.searchsorted(clopper_pearson_lower(range(61), 60, 0.1), 0.5) - 1, 60, 0.5))
    assert abs(false["clopper_pearson"] - 20_000 * expected) < 4.5 * (20_000 * 0.09) ** 0.5
