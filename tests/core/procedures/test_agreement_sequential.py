"""The agreement certificate with budgets that stop early: paired with the fixed one, recomputed, and by exact sums."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from core.agreement_records import AgreementCertificate, Router
from core.procedures.agreement import Agreement, agreement_certify, agreement_from_votes
from core.procedures.confidence import certified_radius, clopper_pearson_lower, probability_of_radius
from core.procedures.ladder import final_alpha
from core.procedures.sequential import Budget, beyond
from core.records import CLASSIFIER, ESTIMATOR, Answer, Draws, Phase, Rule, Sampling, Stop
from tests.helpers.lattice import JUST_BELOW, counts
from tests.helpers.oracles import drive
from tests.helpers.routed import Routed, Stream, is_false

SIGMAS, GRID = (0.25, 0.5, 1.0), (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
SAMPLING = Sampling(100, 4000, 0.001)
BUDGETS: tuple[Budget, ...] = ("fixed", "sequential", "grid")


def terms_of(
    budget: Budget, sampling: Sampling = SAMPLING, router: Router = "median", sigma_e: float = 1.0
) -> Agreement:
    radii = GRID if budget == "grid" else ()
    return Agreement(SIGMAS, sigma_e, sampling, router, budget, Rule(), radii)


@cache
def triples(
    router: Router = "median",
) -> list[tuple[dict[Budget, AgreementCertificate], Stream, dict[Budget, list[Draws]]]]:
    """Inputs of realistic probabilities with the certificates of all budgets on the same draws."""
    random, made = np.random.default_rng(0), []
    for number in range(90):
        shares = random.dirichlet(random.permutation([12.0, 1.0, 0.3]))
        p = 1 - random.beta(0.5, 4, 3)
        sigma_e = 1.0 if number % 3 else 1.5
        routed = Routed(SIGMAS, sigma_e, tuple((shares * (0.98 if number % 4 else 1)).tolist()), tuple(p.tolist()))
        stream = Stream.of(routed, SAMPLING, random)
        results: dict[Budget, AgreementCertificate] = {}
        asked: dict[Budget, list[Draws]] = {}
        for budget in BUDGETS:
            stream.asked = asked[budget] = []
            results[budget] = drive(agreement_certify(terms_of(budget, router=router, sigma_e=sigma_e)), stream)
        made.append((results, stream, asked))
    return made


BOTH = pytest.mark.parametrize("router", ["median", "plurality"])


def least(result: AgreementCertificate, stream: Stream) -> float:
    """T of all draws at what is left of alpha for the last look."""
    half, num = SAMPLING.alpha / 2, SAMPLING.num_estimation
    late = final_alpha(half, half * Rule().early_share)

    def radius(successes: int, sigma: float, alpha: float) -> float:
        return float(certified_radius(clopper_pearson_lower(successes, num, alpha), sigma))

    q = np.bincount(stream.draws[ESTIMATOR, result.sigma_e, Phase.ESTIMATION], minlength=4)
    terms = []
    for j, sigma in enumerate(SIGMAS):
        ones = int((stream.draws[CLASSIFIER, sigma, Phase.ESTIMATION] == result.votes.class_selection.argmax()).sum())
        kept_off = int(q[:j].sum() if result.level < j else q[j + 1 : 3].sum())
        reach = 0.0 if j == result.level else radius(kept_off, result.sigma_e, late)
        terms.append(max(reach, radius(ones, sigma, late)))
    return min(terms)


def test_agreement_sequential_radius_lies_between_the_last_looks_and_the_chosen_level() -> None:
    longer, lost, same = 0, 0, 0
    for results, stream, _ in triples():
        fixed, sequential = results["fixed"], results["sequential"]
        assert (sequential.level, sequential.votes.class_selection.tolist()) == (
            fixed.level,
            fixed.votes.class_selection.tolist(),
        )
        own = fixed.levels[fixed.level].radius_class
        assert sequential.radius <= own
        same += sequential.levels[fixed.level].radius_class == own
        lost += sequential.radius < least(sequential, stream)  # the router was likely to reach less, and did not
        if sequential.radius > fixed.radius:
            longer += 1
            stages = [sequential.votes.router, *filter(None, sequential.votes.classes)]
            assert any(stage.stop == Stop.REACHED for stage in stages)
    assert longer < 20
    assert lost <= 2
    assert same > 45


@BOTH
def test_agreement_sequential_radius_is_almost_the_fixed_one_with_fewer_draws(router: Router) -> None:
    pairs = [(results["sequential"], results["fixed"]) for results, _, _ in triples(router)]
    ratios = [one.radius / other.radius for one, other in pairs if other.radius > 0.05]
    assert len(ratios) > 50
    assert min(ratios) > 0.97
    assert 0.998 < np.mean(ratios) < 1.002
    spent = sum(one.num_draws for one, _ in pairs) / sum(other.num_draws for _, other in pairs)
    assert spent < (0.85 if router == "median" else 1.0)


@BOTH
def test_agreement_grid_exceeds_the_radii_that_the_fixed_one_exceeds_with_fewer_draws(router: Router) -> None:
    pairs = [(results["grid"], results["fixed"]) for results, _, _ in triples(router)]
    assert {one.radius for one, _ in pairs} <= {0.0, *beyond(GRID)}
    assert len({one.radius for one, _ in pairs}) > 3
    same = [(one.radius > r) == (other.radius > r) for one, other in pairs for r in GRID]
    assert np.mean(same) > 0.985
    spent = sum(one.num_draws for one, _ in pairs) / sum(other.num_draws for _, other in pairs)
    assert spent < (0.5 if router == "median" else 0.85)


@BOTH
@pytest.mark.parametrize("budget", BUDGETS)
def test_agreement_from_votes_gives_the_certificate_again(router: Router, budget: Budget) -> None:
    for results, _, _ in triples(router):
        result = results[budget]
        terms = terms_of(budget, router=router, sigma_e=result.sigma_e)
        assert agreement_from_votes(terms, result.votes) == result
        assert result.radius >= result.radius_constant


@BOTH
@pytest.mark.parametrize("budget", BUDGETS)
def test_agreement_certify_asks_for_every_draw_once_and_counts_them(router: Router, budget: Budget) -> None:
    another, shared = 0, 0
    for results, _, asked in triples(router):
        result, spent = results[budget], 0
        seen: Counter[tuple[str, float, Phase]] = Counter()
        for draws in asked[budget]:
            for head in draws.heads:
                assert draws.start == seen[head, draws.sigma, draws.phase]
                seen[head, draws.sigma, draws.phase] += draws.num
            spent += draws.num
        assert spent == result.num_draws
        another += sum(stage is not None for stage in result.votes.classes) > 1
        shared += result.num_shared > 0
    assert another > 10
    assert shared > 5


def test_agreement_sequential_stops_where_every_level_is_out_of_reach() -> None:
    routed = Routed(SIGMAS, 1.5, (0.001, 0.998, 0.001), (0.9, 0.9, 0.9))
    stream = Stream.of(routed, SAMPLING, np.random.default_rng(0))
    result = drive(agreement_certify(terms_of("sequential", sigma_e=1.5)), stream)
    assert (result.votes.router.stop, result.binding) == (Stop.REACHED, 1)
    assert result.votes.router.num < 1000
    assert [level.radius_excluded for level in result.levels] == [result.radius, 0.0, result.radius]


def test_agreement_sequential_other_level_stops_where_it_cannot_add_to_its_reach() -> None:
    """Level 2 is excluded up to 0.5 or so, and its class, at 0.62, would have to show more than that."""
    routed = Routed(SIGMAS, 1.5, (0.0, 0.67, 0.33), (0.9, 0.93, 0.62))
    stream = Stream.of(routed, SAMPLING, np.random.default_rng(2))  # its selection draws leave level 2 for the end
    result = drive(agreement_certify(terms_of("sequential", sigma_e=1.5)), stream)
    other = result.votes.classes[2]
    assert other is not None
    assert (other.stop, result.binding, result.radius) == (Stop.FUTILE, 2, result.levels[2].radius_excluded)
    assert other.num < SAMPLING.num_estimation


@pytest.mark.parametrize("sigma_e", [1.5, 0.5])
def test_agreement_sequential_router_in_doubt_between_levels_of_one_class_costs_little(sigma_e: float) -> None:
    """All draws of the level with the smaller radius; the other one and the router have only to show that."""
    routed = Routed(SIGMAS, sigma_e, (0.5, 0.5, 0.0), (1.0, 0.99, 0.99))
    stream = Stream.of(routed, SAMPLING, np.random.default_rng(0))
    result = drive(agreement_certify(terms_of("sequential", sigma_e=sigma_e)), stream)
    fixed = drive(agreement_certify(terms_of("fixed", sigma_e=sigma_e)), stream)
    stages = result.votes.classes
    assert (result.level, result.binding, fixed.binding) == (1, 0, 0)
    assert result.radius == pytest.approx(fixed.radius, rel=0.01)
    assert stages[0] is not None
    assert stages[1] is not None
    assert (stages[0].stop, stages[1].stop, stages[2]) == (Stop.FULL, Stop.REACHED, None)
    assert result.votes.router.stop == Stop.REACHED
    both = min(result.votes.router.num, stages[1].num)
    assert result.num_shared == (SAMPLING.num_selection + both if sigma_e == 0.5 else 0)
    assert result.num_draws < SAMPLING.num_estimation + 2 * SAMPLING.num_selection + 1000 < 0.65 * fixed.num_draws


def test_agreement_sequential_router_that_may_pick_any_level_is_not_asked_where_the_class_is_the_same() -> None:
    routed = Routed(SIGMAS, 0.6, (0.3, 0.4, 0.3), (1.0, 0.99, 0.99))
    stream = Stream.of(routed, SAMPLING, np.random.default_rng(0))
    result = drive(agreement_certify(terms_of("sequential", sigma_e=0.6)), stream)
    fixed = drive(agreement_certify(terms_of("fixed", sigma_e=0.6)), stream)
    assert result.radius == pytest.approx(fixed.radius, rel=0.01)
    assert (result.votes.router.stop, result.radius_constant) == (Stop.SKIPPED, 0.0)
    assert agreement_from_votes(terms_of("sequential", sigma_e=0.6), result.votes) == result


def test_agreement_sequential_class_that_is_another_at_a_near_level_asks_the_router_before_the_chosen_level() -> None:
    """Level 0, likely to be picked, has another class: the router's reach is all there is; level 1 has to show that."""
    routed = Routed(SIGMAS, 1.0, (0.4, 0.6, 0.0), (0.1, 0.92, 0.999))
    stream = Stream.of(routed, SAMPLING, np.random.default_rng(1))
    result = drive(agreement_certify(terms_of("sequential", sigma_e=1.0)), stream)
    assert (result.level, result.binding, result.votes.router.num) == (1, 0, SAMPLING.num_estimation)
    assert result.radius == result.levels[0].radius_excluded == result.radius_constant
    own = result.votes.classes[1]
    assert own is not None
    assert (own.stop, own.num) == (Stop.REACHED, 100)


def test_agreement_certify_class_that_abstains_early_leaves_the_router_unasked() -> None:
    routed = Routed(SIGMAS, 1.0, (0.0, 0.1, 0.9), (0.9, 0.9, 0.3))
    stream = Stream.of(routed, replace(SAMPLING, num_selection=1), np.random.default_rng(2))
    for budget in ("sequential", "grid"):
        terms = terms_of(budget, replace(SAMPLING, num_selection=1))
        result = drive(agreement_certify(terms), stream)
        if result.votes.class_selection.argmax() == 1:
            assert result.abstained
        assert result.abstained == (result.votes.router.stop == Stop.SKIPPED)


# --- The probability of a false claim, by exact sums ------------------------------------------------------------------

LOOK, MOST = 7, 14
EXACT = Sampling(4, MOST, 0.4)


def false_claims(routed: Routed, budget: Budget, radii: tuple[float, ...], beside: int) -> tuple[float, int]:
    """Over every outcome of both looks of the router (two levels) and of the class at level 1; level 0 is certain.

    `beside`: the router's selection votes for level 1; with as many as for level 0 it is asked before level 0.
    """
    rule = Rule(LOOK, early_share=0.45, futility_z=math.inf)
    terms = Agreement(routed.sigmas, routed.sigma_e, EXACT, "median", budget, rule, radii)
    wrong, early = 0.0, 0
    weights = [stats.binom.pmf(np.arange(LOOK + 1), LOOK, p) for p in (routed.shares[0], routed.p[1])]
    steps = range(LOOK + 1)
    for router in product(steps, steps):
        for ones in product(steps, steps):

            def answer(draws: Draws, router: tuple[int, ...] = router, ones: tuple[int, ...] = ones) -> Answer:
                if draws.phase == Phase.SELECTION:
                    return {ESTIMATOR: counts(4, beside), CLASSIFIER: counts(0, 4)}
                below = router[draws.start // LOOK]
                k = ones[draws.start // LOOK] if draws.sigma == routed.sigmas[1] else draws.num
                return {ESTIMATOR: counts(below, draws.num - below), CLASSIFIER: counts(draws.num - k, k)}

            result = drive(agreement_certify(terms), answer)
            if is_false(result, routed):
                wrong += math.prod(w[k] for w, path in zip(weights, (router, ones), strict=True) for k in path)
                early += any(s is not None and s.num < MOST for s in (result.votes.router, result.votes.classes[1]))
    return wrong, early


@pytest.mark.parametrize(
    ("radii", "smallest", "p", "beside"),
    [
        ((), 0.05, 0.5, 0),  # the chosen level allows a radius of 0.06, which seven draws out of seven show
        ((), 0.05, 0.54, 0),
        ((), 0.4, float(clopper_pearson_lower(11, MOST, final_alpha(0.2, 0.09))), 0),
        ((), 0.4, float(clopper_pearson_lower(11, MOST, final_alpha(0.2, 0.09))), 4),
        ((0.0,), 0.05, 0.5, 0),
        ((0.0, 0.05), 0.1, float(probability_of_radius(beyond([0.05])[0], 0.5)), 0),
    ],
)
def test_agreement_early_stopping_false_claims_by_exact_sum_are_at_most_alpha(
    radii: tuple[float, ...], smallest: float, p: float, beside: int
) -> None:
    p *= JUST_BELOW
    truth = Routed((smallest, 0.5), 0.5, (p, 1 - p), (1, p))
    wrong, early = false_claims(truth, "grid" if radii else "sequential", radii, beside)
    assert 0.25 * EXACT.alpha < wrong <= EXACT.alpha
    assert early > 0


@given(
    seed=st.integers(0, 10_000),
    concentration=st.floats(0.2, 20),
    low=st.floats(0.4, 0.99),
    budget=st.sampled_from(BUDGETS),
    router=st.sampled_from(["median", "plurality"]),
)
def test_agreement_any_budget_radius_is_never_below_the_published_one(
    seed: int, concentration: float, low: float, budget: Budget, router: Router
) -> None:
    random, sampling = np.random.default_rng(seed), Sampling(20, 300, 0.02)
    shares = random.dirichlet([concentration, 1.0, 1.0]) * random.choice([1.0, 0.95])
    routed = Routed(SIGMAS, 1.0, tuple(shares.tolist()), tuple(random.uniform(low, 1, 3).tolist()))
    terms = Agreement(SIGMAS, 1.0, sampling, router, budget, Rule(50), GRID if budget == "grid" else ())
    result = drive(agreement_certify(terms), Stream.of(routed, sampling, random))
    assert result.radius >= result.radius_constant
    assert agreement_from_votes(terms, result.votes) == result
