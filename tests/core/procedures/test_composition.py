"""Routed classifiers from radii: against brute force, and how often they are false where bounds are drawn."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from core import LipschitzCertificate, RoutedCertificate, RouterCertificate, Unasked, route, smoothed_router
from core.errors import ConfigError
from core.law import GAUSSIAN, LAPLACE, Law
from core.procedures import composition
from core.procedures.agreement import Agreement, agreement_from_votes
from core.procedures.composition import Answer, Radius, compose
from core.procedures.confidence import bound_and_radius, clopper_pearson_lower
from core.procedures.sequential import conclude
from core.procedures.smoothing import Estimation, certificate
from core.records import ABSTAIN, Certificate, Sampling, Stop
from tests.helpers.lattice import JUST_BELOW, counts
from tests.helpers.routed import Given

NUM = 12
TAIL = float(stats.binom.sf(9, NUM, 0.5))
ALPHA = TAIL * (1 + 1e-9)
"""Of 12 draws at p = 1/2, 10 or more agree with hardly less than this probability: a false bound above 1/2."""


def smoothed(ones: int, *, alpha: float = ALPHA, sigma: float = 0.5, c: int = 1, law: Law = GAUSSIAN) -> Certificate:
    """An expert of two classes whose selection draws name `c`."""
    return certificate(np.eye(2, dtype=np.int64)[c], counts(NUM - ones, ones), sigma, Sampling(1, NUM, alpha, law))


def sure(prediction: int, radius: float) -> LipschitzCertificate:
    return LipschitzCertificate(prediction, radius, (), 1.0)


# What is composed


def test_compose_is_the_smallest_of_the_larger_ones_and_the_first_that_has_it() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        size = int(random.integers(1, 6))
        e, r = random.integers(0, 4, (2, size)) / 4
        a, b = random.random((2, size)) / 2
        found = compose(
            [Radius(x, "l1", y) for x, y in zip(e, a, strict=True)],
            [Radius(x, "l1", y) for x, y in zip(r, b, strict=True)],
        )
        # Independently: the largest of all radii at which no expert can be both picked and wrong.
        radius = max(t for t in (0.0, 0.25, 0.5, 0.75) if all(t <= x or t <= y for x, y in zip(e, r, strict=True)))
        assert (found.radius, found.norm) == (radius, "l1")
        assert max(e[found.binding], r[found.binding]) == radius
        assert all(max(e[j], r[j]) > radius for j in range(found.binding))
        sums = [Fraction(x) + Fraction(y) for x, y in zip(a, b, strict=True)]
        assert max(sums) <= Fraction(found.alpha) <= max(sums) * (1 + Fraction(2) ** -51)


@pytest.mark.parametrize(
    ("excluded", "answered", "message"),
    [
        ([Radius(0.0, "l2")], [Radius(1.0, "l1")], "l1, l2"),
        ([Radius(0.0, "l2")], [], "one of each"),
        ([], [], "one of each"),
        ([Radius(0.0, "l2")], [Radius(-1.0, "l2")], "at least 0"),
        ([Radius(math.nan, "l2")], [Radius(1.0, "l2")], "at least 0"),
        ([Radius(0.0, "l2", 1.0)], [Radius(1.0, "l2")], "alpha"),
    ],
)
def test_compose_of_what_does_not_fit_is_refused(
    excluded: Sequence[Radius], answered: Sequence[Radius], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(excluded, answered)


def test_route_takes_the_class_of_the_chosen_expert_and_no_other() -> None:
    router = RouterCertificate(1, (0.2, 0.0, 0.1), "l2")
    agreed = route(router, [sure(0, 9.0), sure(1, 0.6), smoothed(12)])
    assert (agreed.prediction, agreed.radius, agreed.binding) == (1, 0.2, 0)
    assert agreed.answered == (0.0, 0.6, smoothed(12).radius)
    assert (agreed.alpha, agreed.num_draws) == (ALPHA, NUM + 1)
    other = route(router, [sure(1, 0.3), sure(1, 0.6), smoothed(12, c=0)])
    assert (other.radius, other.binding, other.answered[2]) == (0.1, 2, 0.0)
    own = route(router, [sure(1, 9.0), sure(ABSTAIN, 0.0), sure(ABSTAIN, 0.0)])
    assert (own.prediction, own.radius, own.binding, own.abstained) == (ABSTAIN, 0.0, None, True)
    none = route(RouterCertificate(1, (0.0, 0.0), "l2"), [sure(0, 9.0), sure(1, 0.6)])
    assert (none.prediction, none.radius, none.binding, none.abstained) == (ABSTAIN, 0.0, None, True)


def test_route_without_any_noise_never_fails_and_draws_nothing() -> None:
    found = route(RouterCertificate(0, (0.0, math.inf), "l2"), [sure(1, 0.5), Unasked(0.0)])
    assert (found.radius, found.alpha, found.num_draws) == (0.5, 0.0, 0)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([sure(1, 0.5), smoothed(12, law=LAPLACE)], "l1, l2"),
        ([sure(1, 0.5)], "one of each"),
        ([Unasked(0.1), sure(1, 0.5)], "was not asked"),
        ([], "picks expert 0 of 2"),
    ],
)
def test_route_of_experts_that_do_not_fit_is_refused(experts: list[Answer], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        route(RouterCertificate(0, (0.0, 0.2), "l2"), experts)


# The smoothed router


@pytest.mark.parametrize("router", ["median", "plurality"])
def test_smoothed_router_and_route_give_the_agreement_certificate_of_the_same_votes(router: str) -> None:
    """The pipeline's way and this one, on random votes of three levels."""
    random, sigmas, sigma_e, num, alpha = np.random.default_rng(1), (0.25, 0.5, 1.0), 0.75, 100, 0.01
    different = 0
    for _ in range(60):
        shares = random.dirichlet([0.3, 0.3, 0.3])
        votes, chosen = random.multinomial(num, shares), int(shares.argmax())
        ones = tuple(int(k) for k in random.binomial(num, [0.97, 0.9, 0.8]))
        stored = Given(votes, ones, chosen, 1, sigmas, sigma_e).stored(num)
        terms = Agreement(sigmas, sigma_e, Sampling(1, num, 2 * alpha), router)  # type: ignore[arg-type]
        expected = agreement_from_votes(terms, stored)
        half = Sampling(1, num, alpha)
        experts = [
            certificate(np.array([0, 1]), counts(num - k, k), s, half) for k, s in zip(ones, sigmas, strict=True)
        ]
        reach = smoothed_router(certificate(stored.router_selection, votes, sigma_e, half), router)  # type: ignore[arg-type]
        found = route(reach, experts)
        assert (found.prediction, found.radius, found.choice) == (expected.prediction, expected.radius, expected.level)
        assert found.alpha == expected.alpha
        different += found.radius not in (0.0, expected.radius_constant)
    assert different > 6, "else the two claims could not be told apart"


def test_smoothed_router_is_in_the_norm_of_its_noise() -> None:
    votes = Sampling(1, NUM, ALPHA, LAPLACE)
    found = smoothed_router(certificate(counts(1, 0), counts(12, 0), 0.5, votes))
    assert found.norm == "l1"
    assert found.excluded == (0.0, bound_and_radius(12, NUM, ALPHA, 0.5, LAPLACE)[1])


def test_smoothed_router_that_stopped_early_is_refused() -> None:
    early = conclude(0.5, (0.1,), counts(1, 0), counts(12, 0), 12, Sampling(1, 20, ALPHA), 0.1, Stop.REACHED)
    with pytest.raises(ConfigError, match="all of its draws"):
        smoothed_router(early)
    with pytest.raises(ConfigError, match="router must be one of"):
        smoothed_router(smoothed(12), "mean")  # type: ignore[arg-type]


def test_smoothed_router_of_a_certificate_for_a_reference_is_refused() -> None:
    """All votes keep off expert 1, while the reference follows none of them."""
    found = Estimation(counts(12, 0), missed=counts(12, 0))
    other = certificate(counts(1, 0), counts(12, 0), 0.5, Sampling(1, NUM, ALPHA, num_reference=NUM), found)
    assert other.abstained
    with pytest.raises(ConfigError, match="for the network that votes"):
        smoothed_router(other)


# How often it is false: exact sums over the votes


HALF = 0.5 * JUST_BELOW
Found = Callable[[int, int], RoutedCertificate]


def both_smoothed(on_own_side: int, ones: int) -> RoutedCertificate:
    """A smoothed router between a deterministic expert, that answers 1 everywhere, and a smoothed one."""
    votes = certificate(counts(1, 0), counts(on_own_side, NUM - on_own_side), 0.5, Sampling(1, NUM, ALPHA))
    return route(smoothed_router(votes), [sure(1, 9.0), smoothed(ones)])


def router_deterministic(on_own_side: int, ones: int) -> RoutedCertificate:
    return route(RouterCertificate(0, (0.0, 0.0), "l2"), [sure(1, 9.0), smoothed(ones)])


def expert_deterministic(on_own_side: int, ones: int) -> RoutedCertificate:
    """The other expert answers 0 throughout, so that the router alone has to keep it off."""
    votes = certificate(counts(1, 0), counts(on_own_side, NUM - on_own_side), 0.5, Sampling(1, NUM, ALPHA))
    return route(smoothed_router(votes), [smoothed(12), sure(0, 9.0)])


def rate(found: Found, truth: float, p: float = HALF) -> float:
    """Probability that more than `truth` is certified, both stages' votes being binomial with probability p."""
    pmf = stats.binom.pmf(np.arange(NUM + 1), NUM, p)
    return math.fsum(
        float(pmf[e] * pmf[r]) for e in range(NUM + 1) for r in range(NUM + 1) if found(e, r).radius > truth
    )


BOUND = float(clopper_pearson_lower(11, NUM, ALPHA)) * JUST_BELOW
SHOWN = bound_and_radius(11, NUM, ALPHA, 0.5)[1]


@pytest.mark.parametrize(
    ("found", "alpha"), [(both_smoothed, 2 * ALPHA), (router_deterministic, ALPHA), (expert_deterministic, ALPHA)]
)
@pytest.mark.parametrize(("p", "truth"), [(HALF, 0.0), (BOUND, SHOWN * (1 - 1e-6))])
def test_route_false_claims_by_exact_sum_are_at_most_its_alpha(
    found: Found, alpha: float, p: float, truth: float
) -> None:
    assert found(12, 12).alpha == alpha
    assert 0.97 * alpha < rate(found, truth, p) <= alpha


def test_rate_finds_alpha_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "_sum_up", max)
    assert rate(both_smoothed, 0.0) > 1.9 * both_smoothed(12, 12).alpha
