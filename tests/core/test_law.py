"""What each noise proves: against forty digits, the published formulas, and half-spaces; and laws that are none."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy import stats

from core.errors import ConfigError, ModelError
from core.law import GAUSSIAN, LAPLACE, SPLITTING, UNIFORM, Laplace, Law, Uniform, law_of
from core.procedures.confidence import (
    bound_and_radius,
    certified_radius,
    draws_needed,
    largest_radius,
    lower_bound,
    probability_of_radius,
    radius_of_two_bounds,
)
from core.records import Sampling
from tests.helpers.oracles import Scaled


def nearest_odd(x: mpmath.mpf) -> int:
    return 2 * int(mpmath.nint((x - 1) / 2)) + 1


# By the formulas of github.com/tonyduan/rs4a (noises.py: sigma = lambda / sqrt(3), certify_l1), written anew; lambda is
# the one that the noise has.
PUBLISHED: dict[Law, tuple[Callable[[mpmath.mpf], mpmath.mpf], Callable[[mpmath.mpf, mpmath.mpf], mpmath.mpf]]] = {
    UNIFORM: (lambda s: mpmath.mpf(nearest_odd(510 * s * mpmath.sqrt(3))) / 510, lambda p, lam: 2 * lam * (p - 0.5)),
    LAPLACE: (lambda s: s / mpmath.sqrt(2), lambda p, lam: -lam * mpmath.log(2 * (1 - p))),
    SPLITTING: (lambda s: mpmath.nint(510 * s * mpmath.sqrt(3)) / 510, lambda p, lam: 2 * lam * (p - 0.5)),
}


@pytest.mark.parametrize("law", PUBLISHED, ids=lambda law: law.title)
def test_radius_at_a_thousand_points_is_that_of_the_published_formula_and_never_above(law: Law) -> None:
    random = np.random.default_rng(1)
    lambda_of, formula = PUBLISHED[law]
    with mpmath.workdps(40):
        for _ in range(1000):
            # Also next to 1/2 and to 1, where digits are lost.
            p = min(1 - 2.0**-50, 0.5 + 0.5 * float(random.random() ** random.integers(1, 9)))
            p = 1 - (p - 0.5) if random.random() < 0.5 and p < 1 else p
            sigma = float(np.float32(random.uniform(0.02, 3.0)))
            lam = lambda_of(mpmath.mpf(sigma))
            exact = formula(mpmath.mpf(p), lam)
            radius = float(certified_radius(p, sigma, law))
            assert mpmath.mpf(radius) <= exact
            assert radius == pytest.approx(float(exact), rel=1e-12)
            assert float(law.scale(sigma)) == pytest.approx(float(lam), rel=1e-15)
            if radius < 0.999 * law.limit(sigma):
                shown = mpmath.mpf(float(probability_of_radius(radius, sigma, law)))
                assert formula(min(shown, 1 - mpmath.mpf(10) ** -30), lam) >= mpmath.mpf(radius)


@pytest.mark.parametrize("law", [UNIFORM, LAPLACE, GAUSSIAN], ids=lambda law: law.title)
def test_radius_is_too_large_with_probability_at_most_alpha_and_planted_laws_are_seen(law: Law) -> None:
    """The sum over all votes that certify more than the half-space's true distance."""

    def rate(claimed: Law) -> float:
        worst = 0.0
        for p in (0.55, 0.75, 0.9, 0.97):
            true = float(law.scale(0.5) * law.quantile(p))  # distance of the half-space of probability p
            over = [k for k in range(201) if bound_and_radius(k, 200, 0.05, 0.5, claimed)[1] > true]
            worst = max(worst, float(np.sum(stats.binom.pmf(over, 200, p))))
        return worst

    assert rate(law) <= 0.05

    assert rate(Scaled(law, 2.0)) > 0.5, "lambda for 2 lambda"
    assert rate(GAUSSIAN if law is LAPLACE else LAPLACE) > 0.05, "the law of another noise"


def test_two_bounds_give_the_published_margin_of_uniform_noise() -> None:
    a, b = (float(lower_bound(k, 400, 0.01)) for k in (350, 390))  # p_A, 1 - p_B
    expected = float(UNIFORM.scale(0.5)) * (a - (1 - b))
    assert radius_of_two_bounds(350, 390, 400, 0.01, 0.5, UNIFORM) == pytest.approx(expected, rel=1e-12)
    for law in (UNIFORM, LAPLACE):
        one = float(certified_radius(a, 0.5, law))
        assert radius_of_two_bounds(350, 350, 400, 0.01, 0.5, law) == pytest.approx(one, rel=1e-12)


def test_splitting_needs_no_alpha_and_all_copies() -> None:
    sampling = Sampling(100, 1000, 0.001, SPLITTING)
    assert sampling.alpha == 0.0
    assert sampling.at(0.25).num_estimation == round(510 * math.sqrt(3) * 0.25) == draws_needed(0.1, 0.25, 0, SPLITTING)
    assert float(lower_bound(166, 221, 0.0, SPLITTING)) == pytest.approx(166 / 221, rel=1e-12)
    assert largest_radius(0.25, 221, 0.0, SPLITTING) == pytest.approx(221 / 510, rel=1e-12)
    assert float(certified_radius(lower_bound(1, 2, 0.0, SPLITTING), 0.25, SPLITTING)) == 0.0
    with pytest.raises(ConfigError, match=r"no radius from 0\.4333 on can be certified at sigma = 0\.25"):
        draws_needed(0.4334, 0.25, 0.0, SPLITTING)


def test_draws_needed_under_l1_noise_is_the_fewest() -> None:
    for law in (UNIFORM, LAPLACE):
        n = draws_needed(0.4, 0.5, 0.001, law)
        assert largest_radius(0.5, n, 0.001, law) > 0.4 >= largest_radius(0.5, n - 1, 0.001, law)


SOURCE = """
from core.law import {base}, OwnNoise


class Mine({base}):
    {law}


def noise():
    return {returned}
"""


@pytest.mark.parametrize(
    ("base", "law", "returned", "message"),
    [
        ("Laplace", "pass", "Mine()", r"returned .*Mine.*, expected a core\.law\.OwnNoise"),
        ("Laplace", "norm = 'linf'", "OwnNoise(Mine(), None)", "norm is l1 or l2"),
        ("Splitting", "pass", "OwnNoise(Mine(), None)", "exhaustive is false"),
        ("Uniform", "quantile = lambda self, p: 2 * p", "OwnNoise(Mine(), None)", "quantile is 0 at 1/2"),
        ("Laplace", "cdf = lambda self, t: 0.5 + t / 9", "OwnNoise(Mine(), None)", "cdf is the inverse"),
        ("Laplace", "scale = lambda self, s: -s", "OwnNoise(Mine(), None)", "scale is positive"),
        ("Laplace", "x = 1 / 0", "None", "cannot import"),
    ],
)
def test_own_law_that_is_none_is_refused(
    base: str, law: str, returned: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_law_{abs(hash((base, law, returned)))}"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(base=base, law=law, returned=returned))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((ConfigError, ModelError), match=message):
        law_of(f"{name}:noise")
    sys.modules.pop(name, None)
    with pytest.raises(ConfigError, match="noise: is 'cauchy', expected one of gaussian, exact, uniform"):
        law_of("cauchy")
    assert (Laplace(), Uniform()) == (law_of("laplace"), law_of("uniform"))
