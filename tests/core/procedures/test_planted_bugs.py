"""Checks that find the classic mistakes of certification, each shown to pass on the real code and to fail on a bug.

A check is a function of the implementation under test and returns the number that must not exceed its limit; the
real one and the planted one go through the same code.
"""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy import special, stats

import core.procedures.ladder
from core.procedures.confidence import certified_radius, clopper_pearson_lower, log_e_value
from core.procedures.smoothing import certificate, certify
from core.records import ABSTAIN, CLASSIFIER, Answer, Certificate, Counts, Draws, Phase, Procedure, Rule, Sampling
from tests.helpers.lattice import JUST_BELOW, Bools, Floats, Setting, counts, crossing, looks, outcomes
from tests.helpers.oracles import drive

ALPHA = 0.001

Bounds = Callable[[Counts, int, float], Floats]
"""(successes, draws, alpha) to lower bounds."""

Radii = Callable[[float, float], float]
"""(p_lower, sigma) to a radius."""

Claims = Callable[[Counts, int, float, float], Bools]
"""(successes, draws, p0, alpha) to whether p > p0 is claimed."""


# --- The bound at the wrong level -------------------------------------------------------------------------------------


def worst_failure_of_bound(bound: Bounds, num: int = 300) -> float:
    """The largest probability, over true p, that the bound exceeds p: it peaks just below a value of the bound."""
    bounds = bound(np.arange(num + 1), num, ALPHA)
    suspects = bounds[(bounds > 0) & (bounds <= 1)] * JUST_BELOW
    return max(float(stats.binom.pmf(np.flatnonzero(bounds > p), num, p).sum()) for p in suspects.tolist())


def test_worst_failure_of_bound_finds_a_bound_at_twice_alpha() -> None:
    real = worst_failure_of_bound(clopper_pearson_lower)
    assert real <= ALPHA, f"Clopper-Pearson fails with {real / ALPHA:.4f} alpha"
    planted = worst_failure_of_bound(lambda k, n, alpha: clopper_pearson_lower(k, n, 2 * alpha))
    assert planted > 1.99 * ALPHA, f"the planted bound fails with {planted / ALPHA:.4f} alpha"


def test_worst_failure_of_bound_finds_a_normal_approximation() -> None:
    def wald(successes: Counts, num: int, alpha: float) -> Floats:
        p = successes / num
        return np.asarray(p + special.ndtri(alpha) * np.sqrt(p * (1 - p) / num), np.float64)

    planted = worst_failure_of_bound(wald)
    assert planted > 10 * ALPHA, f"the planted bound fails with {planted / ALPHA:.1f} alpha"


# --- The class and its bound from the same draws ----------------------------------------------------------------------

PROCEDURES_ALPHA = 0.01


def false_certificates_at_one_half(procedure: Callable[[float, Sampling], Procedure[Certificate]]) -> float:
    """Probability that anything is certified of two classes with p = 1/2 each, where no class has a true radius."""
    sampling, wrong = Sampling(7, 107, PROCEDURES_ALPHA), 0.0
    for chosen in range(sampling.num_selection + 1):
        for k in range(sampling.num_estimation + 1):
            ones = {Phase.SELECTION: chosen, Phase.ESTIMATION: k}

            def votes(draws: Draws, ones: dict[Phase, int] = ones) -> Answer:
                return {CLASSIFIER: counts(draws.num - ones[draws.phase], ones[draws.phase])}

            if drive(procedure(1.0, sampling), votes).prediction != ABSTAIN:
                wrong += float(
                    stats.binom.pmf(chosen, sampling.num_selection, 0.5)
                    * stats.binom.pmf(k, sampling.num_estimation, 0.5)
                )
    return wrong


def certify_on_the_same_draws(sigma: float, sampling: Sampling) -> Procedure[Certificate]:
    """CERTIFY that forgets the selection draws and takes the most frequent class of the estimation draws."""
    yield Draws(sigma, sampling.num_selection, (CLASSIFIER,), Phase.SELECTION)
    estimation = (yield Draws(sigma, sampling.num_estimation, (CLASSIFIER,), Phase.ESTIMATION))[CLASSIFIER]
    return certificate(estimation, estimation, sigma, sampling)


def test_false_certificates_at_one_half_finds_a_class_chosen_by_the_draws_of_its_bound() -> None:
    real = false_certificates_at_one_half(certify)
    assert real <= PROCEDURES_ALPHA, f"CERTIFY errs with {real / PROCEDURES_ALPHA:.3f} alpha"
    planted = false_certificates_at_one_half(certify_on_the_same_draws)
    assert planted > 1.9 * PROCEDURES_ALPHA, f"the planted one errs with {planted / PROCEDURES_ALPHA:.3f} alpha"
    assert math.isclose(planted, 2 * real, rel_tol=1e-9)  # either class may be the one that is lucky


# --- Looking at the votes more than once ------------------------------------------------------------------------------

EVERY, MOST = 100, 10_000


def false_claim_over_looks(claims: Claims, p0: float, every: int = EVERY, most: int = MOST) -> float:
    """Probability that p > p0 is claimed at one look or another although p = p0 (a hair below)."""
    return crossing(p0 * JUST_BELOW, looks(most, every), lambda k, n: claims(k, n, p0, ALPHA))


def e_process(successes: Counts, num: int, p0: float, alpha: float) -> Bools:
    return np.asarray(log_e_value(successes, num, p0) >= math.log(1 / alpha))


def e_process_at_twice_alpha(successes: Counts, num: int, p0: float, alpha: float) -> Bools:
    return np.asarray(log_e_value(successes, num, p0) >= math.log(1 / (2 * alpha)))


def peeking(successes: Counts, num: int, p0: float, alpha: float) -> Bools:
    return clopper_pearson_lower(successes, num, alpha) > p0


@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.9772])
def test_false_claim_over_looks_finds_a_bound_that_is_looked_at_again_and_again(p0: float) -> None:
    real = false_claim_over_looks(e_process, p0)
    assert real <= ALPHA, f"the e-process errs with {real / ALPHA:.3f} alpha"
    planted = false_claim_over_looks(peeking, p0)
    assert planted > 8 * ALPHA, f"peeking errs with {planted / ALPHA:.1f} alpha"
    once = false_claim_over_looks(peeking, p0, every=MOST)
    assert once <= ALPHA, f"one look errs with {once / ALPHA:.3f} alpha"


@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.9332])
def test_false_claim_over_looks_finds_an_e_process_whose_threshold_is_for_twice_alpha(p0: float) -> None:
    real = false_claim_over_looks(e_process, p0, every=1, most=1000)
    assert real <= ALPHA, f"the e-process errs with {real / ALPHA:.3f} alpha"
    planted = false_claim_over_looks(e_process_at_twice_alpha, p0, every=1, most=1000)
    assert planted > 1.2 * ALPHA, f"the planted threshold errs with {planted / ALPHA:.3f} alpha"


def excess_of_early_claims() -> float:
    """What `climb`, looking at every draw, spends on early claims of a target that is not true, per what it may."""
    setting = Setting(1.0, (1.0,), Sampling(10, 250, 0.1), Rule(1, early_share=0.4))
    p, known = float(special.ndtr(1.0)) * JUST_BELOW, outcomes(setting)
    return known.expected(p, lambda num: known.reached[num].astype(np.float64)) / 0.04


def test_excess_of_early_claims_finds_a_climb_whose_threshold_is_for_twice_alpha(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = excess_of_early_claims()
    assert real <= 1, f"climb spends {real:.3f} of its early share"
    monkeypatch.setattr(core.procedures.ladder, "log_e_value", lambda *args: log_e_value(*args) + math.log(2))
    planted = excess_of_early_claims()
    assert planted > 1.2, f"the planted climb spends {planted:.3f} of its early share"


def excess_of_climb() -> float:
    """The largest probability, over true p, of a radius above the true one, per alpha."""
    setting = Setting(0.5, (0.8,), Sampling(10, 400, 0.05), Rule(10, early_share=0.3))
    return outcomes(setting).worst_false_claim()[0] / setting.sampling.alpha


def whole_alpha_again(alpha: float, alpha_early: float) -> float:
    return alpha


def twice_what_is_left(alpha: float, alpha_early: float) -> float:
    return 2 * (alpha - alpha_early)


@pytest.mark.parametrize("planted_share", [whole_alpha_again, twice_what_is_left])
def test_excess_of_climb_finds_a_last_look_that_spends_alpha_again(
    monkeypatch: pytest.MonkeyPatch, planted_share: Callable[[float, float], float]
) -> None:
    real = excess_of_climb()
    assert real <= 1, f"climb errs with {real:.3f} alpha"
    monkeypatch.setattr(core.procedures.ladder, "final_alpha", planted_share)
    planted = excess_of_climb()
    assert planted > 1, f"the planted climb errs with {planted:.3f} alpha"


# --- Rounding ---------------------------------------------------------------------------------------------------------


def highest_overshoot(radius: Radii) -> float:
    """The largest relative excess of the radius over sigma * Phi^-1(p), the latter at 40 digits."""
    with mpmath.workdps(40):
        excess = [
            mpmath.mpf(radius(p, sigma)) / (mpmath.mpf(sigma) * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1))
            - 1
            for sigma in (0.12, 0.25, 0.5, 1.0)
            for p in (0.5001, 0.61, 0.75, 0.8413, 0.93, 0.977, 0.9993, 0.9999999)
        ]
        return float(max(excess))


def rounded_to_three_digits(p: float, sigma: float) -> float:
    return round(sigma * float(special.ndtri(p)), 3)


def rounded_to_nearest(p: float, sigma: float) -> float:
    return sigma * float(special.ndtri(p))


def rounded_up(p: float, sigma: float) -> float:
    return math.nextafter(sigma * float(special.ndtri(p)), math.inf)


@pytest.mark.parametrize("planted_radius", [rounded_to_three_digits, rounded_to_nearest, rounded_up])
def test_highest_overshoot_finds_a_radius_that_is_not_rounded_towards_zero(planted_radius: Radii) -> None:
    real = highest_overshoot(lambda p, sigma: float(certified_radius(p, sigma)))
    assert real < 0, f"the radius exceeds the exact one by {real:.2e}"
    assert real > -1e-12, f"the radius gives {real:.2e} away"
    planted = highest_overshoot(planted_radius)
    assert planted > 0, f"the planted radius stays {planted:.2e} below the exact one"
