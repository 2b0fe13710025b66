import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import special, stats

from core.errors import ConfigError
from core.procedures.dual import dual_certify, dual_predict, join_stages
from core.procedures.smoothing import certificate, certify, predict
from core.records import ABSTAIN, CLASSIFIER, ESTIMATOR, AlphaSplit, Answer, Bound, Counts, Draws, Phase, Sampling
from tests.helpers.oracles import drive


def counts(*values: int) -> Counts:
    return np.array(values, np.int64)


def by_phase(selection: Counts, estimation: Counts) -> Callable[[Draws], Answer]:
    """Votes of the classifier, whatever the number of draws."""
    return lambda draws: {CLASSIFIER: selection if draws.phase == Phase.SELECTION else estimation}


def test_certify_chooses_on_selection_and_bounds_on_estimation() -> None:
    asked: list[Draws] = []

    def votes(draws: Draws) -> Answer:
        asked.append(draws)
        return {CLASSIFIER: counts(2, 8) if draws.phase == Phase.SELECTION else counts(600, 400)}

    result = drive(certify(0.5, Sampling(10, 1000, 0.01)), votes)
    # Class 1 won the selection, so it is class 1 that is bounded, and it does not reach 1/2.
    assert [(d.phase, d.num, d.sigma) for d in asked] == [(Phase.SELECTION, 10, 0.5), (Phase.ESTIMATION, 1000, 0.5)]
    assert (result.prediction, result.radius, result.top_class) == (ABSTAIN, 0.0, 1)
    assert math.isclose(result.p_lower, stats.beta.ppf(0.01, 400, 601), rel_tol=1e-9)


def test_certify_radius_equals_cohens_formula() -> None:
    result = drive(
        certify(0.25, Sampling(100, 10_000, 0.001)),
        lambda d: {CLASSIFIER: counts(0, 90, 10) if d.phase == Phase.SELECTION else counts(3, 9900, 97)},
    )
    p = stats.beta.ppf(0.001, 9900, 101)
    assert result.prediction == 1
    assert math.isclose(result.radius, 0.25 * stats.norm.ppf(p), rel_tol=1e-9)
    assert result.num_draws == 10_100
    assert certificate(result.counts_selection, result.counts_estimation, 0.25, Sampling(100, 10_000, 0.001)) == result


@pytest.mark.parametrize("p", [0.5, 0.55, 0.7])
def test_certify_false_certificate_probability_by_exact_sum_is_at_most_alpha(p: float) -> None:
    """Two classes, P[vote for 1] = p: certified falsely if class 0 is returned or the radius is above the true one."""
    n0, n, alpha, sigma = 7, 40, 0.1, 1.0
    true_radius = sigma * special.ndtri(p)
    wrong = 0.0
    for k0 in range(n0 + 1):
        for k in range(n + 1):
            result = drive(certify(sigma, Sampling(n0, n, alpha)), by_phase(counts(n0 - k0, k0), counts(n - k, k)))
            false = (result.prediction == 0 and p >= 0.5) or (result.prediction == 1 and result.radius > true_radius)
            if false:
                wrong += stats.binom.pmf(k0, n0, p) * stats.binom.pmf(k, n, p)
    assert wrong <= alpha


def test_certify_without_any_valid_vote_abstains() -> None:
    result = drive(certify(0.5, Sampling(10, 100, 0.1)), lambda d: {CLASSIFIER: counts(0, 0, 0)})
    assert (result.prediction, result.radius, result.p_lower) == (ABSTAIN, 0.0, 0.0)


@pytest.mark.parametrize(("votes", "expected"), [((50, 50), ABSTAIN), ((10, 90), 1), ((90, 10), 0)])
def test_predict_returns_the_class_only_when_the_test_tells_it_apart(votes: tuple[int, int], expected: int) -> None:
    result = drive(predict(0.5, 100, 0.001), lambda d: {CLASSIFIER: counts(*votes)})
    assert result.prediction == expected
    assert result.counts.tolist() == list(votes)


def test_certify_bound_of_exactly_one_half_abstains() -> None:
    alpha = 0.5 * (1 + 2.0**-44)  # one draw that agrees: the bound is alpha itself, less the step towards zero
    result = certificate(counts(0, 1), counts(0, 1), 0.5, Sampling(1, 1, alpha))
    assert (result.p_lower, result.prediction, result.radius) == (0.5, ABSTAIN, 0.0)
    assert certificate(counts(0, 1), counts(0, 1), 0.5, Sampling(1, 1, 0.5 + 2.0**-40)).prediction == 1


def test_predict_p_value_of_exactly_alpha_is_enough() -> None:
    def of_five(alpha: float) -> int:
        return drive(predict(0.5, 5, alpha), lambda d: {CLASSIFIER: counts(0, 5)}).prediction

    assert of_five(2 * 0.5**5) == 1  # both tails: all five for one class, or for the other
    assert of_five(math.nextafter(2 * 0.5**5, 0.0)) == ABSTAIN


def test_predict_asks_for_draws_of_its_own_phase_and_reports_what_it_used() -> None:
    asked: list[Draws] = []

    def votes(draws: Draws) -> Answer:
        asked.append(draws)
        return {"a head": counts(3, 60, 37)}

    result = drive(predict(0.5, 101, 0.01, "a head"), votes)
    assert asked == [Draws(0.5, 101, ("a head",), Phase.PREDICTION)]
    assert result.p_value == pytest.approx(stats.binomtest(60, 97, 0.5).pvalue)
    assert (result.sigma, result.num, result.alpha, result.prediction) == (0.5, 101, 0.01, ABSTAIN)


def test_predict_wrong_class_probability_by_exact_sum_is_at_most_alpha() -> None:
    n, alpha, p = 60, 0.1, 0.5 + 1e-9  # class 1 is the smoothed class, by a hair
    wrong = 0.0
    for k in range(n + 1):
        votes = counts(n - k, k)
        if drive(predict(1.0, n, alpha), by_phase(votes, votes)).prediction == 0:
            wrong += float(stats.binom.pmf(k, n, p))
    assert 0 < wrong <= alpha / 2 + 1e-9


def test_predict_one_draw_tells_nothing_apart() -> None:
    assert drive(predict(0.5, 1, 0.999), lambda d: {CLASSIFIER: counts(0, 1)}).prediction == ABSTAIN


@pytest.mark.parametrize("bad", [(0, 0.1), (10, 0.0), (10, 1.0)])
def test_predict_bad_arguments_raise(bad: tuple[int, float]) -> None:
    with pytest.raises(ConfigError):
        drive(predict(0.5, *bad), lambda d: {CLASSIFIER: counts(1)})


@pytest.mark.parametrize("bad", [(0, 10, 0.1), (10, 0, 0.1), (10, 10, 0.0), (10, 10, 1.5), (True, 10, 0.1)])
def test_sampling_bad_arguments_raise(bad: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(*bad)


def dual_votes(
    estimator: tuple[int, ...], classifier: tuple[int, ...], asked: list[Draws]
) -> Callable[[Draws], Answer]:
    def votes(draws: Draws) -> Answer:
        asked.append(draws)
        return {ESTIMATOR: counts(*estimator)} if draws.heads == (ESTIMATOR,) else {CLASSIFIER: counts(*classifier)}

    return votes


SIGMAS = (0.25, 0.5)


def test_dual_certify_takes_the_smaller_radius_at_the_chosen_sigma_with_half_of_alpha_each() -> None:
    asked: list[Draws] = []
    result = drive(dual_certify(SIGMAS, 1.0, Sampling(100, 100, 0.02)), dual_votes((20, 80), (0, 95, 5), asked))
    assert [(d.heads[0], d.sigma) for d in asked] == [(ESTIMATOR, 1.0)] * 2 + [(CLASSIFIER, 0.5)] * 2
    radius_sigma = 1.0 * stats.norm.ppf(stats.beta.ppf(0.01, 80, 21))
    radius_class = 0.5 * stats.norm.ppf(stats.beta.ppf(0.01, 95, 6))
    assert math.isclose(result.radius_sigma, radius_sigma, rel_tol=1e-9)
    assert math.isclose(result.radius_class, radius_class, rel_tol=1e-9)
    assert result.radius == min(result.radius_sigma, result.radius_class)
    assert (result.prediction, result.sigma, result.bounded_by) == (1, 0.5, Bound.SIGMA)
    assert (result.alpha, result.alpha_sigma, result.alpha_class) == (0.02, 0.01, 0.01)
    assert result.num_draws == 400


def test_dual_certify_estimator_undecided_abstains_without_asking_the_classifier() -> None:
    asked: list[Draws] = []
    result = drive(dual_certify(SIGMAS, 1.0, Sampling(100, 100, 0.02)), dual_votes((50, 50), (0, 95, 5), asked))
    assert (result.prediction, result.radius, result.sigma, result.class_stage) == (ABSTAIN, 0.0, None, None)
    assert result.bounded_by == Bound.NONE
    assert result.abstained
    assert result.num_draws == 200 == sum(d.num for d in asked)


def test_dual_certify_another_level_than_sigma_e_asks_the_classifier_for_no_bound_there() -> None:
    asked: list[Draws] = []
    given = {ESTIMATOR: counts(95, 5), CLASSIFIER: counts(0, 95, 5)}

    def votes(draws: Draws) -> Answer:
        asked.append(draws)
        return {head: given[head] for head in draws.heads}

    result = drive(dual_certify((0.25, 1.0), 1.0, Sampling(100, 100, 0.02)), votes)
    assert [(d.heads, d.sigma, d.phase) for d in asked] == [
        ((ESTIMATOR, CLASSIFIER), 1.0, Phase.SELECTION),
        ((ESTIMATOR,), 1.0, Phase.ESTIMATION),
        ((CLASSIFIER,), 0.25, Phase.SELECTION),
        ((CLASSIFIER,), 0.25, Phase.ESTIMATION),
    ]
    assert result.num_draws == 400 == sum(d.num for d in asked)


def test_dual_certify_classifier_with_the_smaller_radius_bounds() -> None:
    result = drive(dual_certify(SIGMAS, 1.0, Sampling(100, 100, 0.02)), dual_votes((1, 99), (0, 70, 30), []))
    assert 0.0 < result.radius == result.radius_class < result.radius_sigma
    assert (result.prediction, result.bounded_by, result.num_shared) == (1, Bound.CLASS, 0)


def test_join_stages_of_unequal_shares_of_alpha_keeps_both() -> None:
    level = certificate(counts(0, 9), counts(5, 95), 1.0, Sampling(9, 100, 0.005))
    label = certificate(counts(9, 0), counts(90, 10), 0.5, Sampling(9, 100, 0.015))
    result = join_stages(level, label, SIGMAS, 0.02)
    assert (result.alpha, result.alpha_sigma, result.alpha_class) == (0.02, 0.005, 0.015)
    assert (result.prediction, result.sigma, result.sigma_stage, result.class_stage) == (0, 0.5, level, label)
    alone = join_stages(level, None, SIGMAS, 0.02)
    assert (alone.alpha_sigma, alone.alpha_class, alone.radius_class) == (0.005, 0.005, 0.0)


def test_dual_certify_classifier_undecided_abstains() -> None:
    result = drive(dual_certify(SIGMAS, 1.0, Sampling(100, 100, 0.02)), dual_votes((80, 20), (50, 50, 0), []))
    assert (result.prediction, result.radius, result.sigma) == (ABSTAIN, 0.0, 0.25)
    assert result.radius_sigma > 0 == result.radius_class
    assert result.bounded_by == Bound.NONE


def test_dual_predict_spends_half_of_alpha_on_each_stage() -> None:
    asked: list[Draws] = []
    result = drive(dual_predict(SIGMAS, 1.0, 100, 0.02), dual_votes((10, 90), (0, 95, 5), asked))
    assert (result.prediction, result.sigma) == (1, 0.5)
    assert [(d.heads, d.sigma, d.num, d.phase) for d in asked] == [
        ((ESTIMATOR,), 1.0, 100, Phase.PREDICTION),
        ((CLASSIFIER,), 0.5, 100, Phase.PREDICTION),
    ]
    assert result.class_stage is not None
    assert result.sigma_stage.alpha == result.class_stage.alpha == 0.01
    undecided = drive(dual_predict(SIGMAS, 1.0, 100, 0.02), dual_votes((50, 50), (0, 95, 5), asked := []))
    assert (undecided.prediction, undecided.sigma, undecided.alpha, len(asked)) == (ABSTAIN, None, 0.02, 1)
    assert undecided.sigma_stage.counts.tolist() == [50, 50]
    assert undecided.class_stage is None


@pytest.mark.parametrize("split", ["halves", "full"])
@pytest.mark.parametrize("shared", [False, True], ids=["independent votes", "the same votes"])
@pytest.mark.parametrize(("p_sigma", "p_class"), [(0.75, 0.75), (0.75, 0.8), (0.9, 0.7)])
def test_dual_certify_false_claim_probability_by_exact_sum_is_at_most_alpha(
    split: AlphaSplit, shared: bool, p_sigma: float, p_class: float
) -> None:
    """Stages of two outcomes each, right ones with p_sigma and p_class; selection is taken to be right."""
    n, alpha, sigma_e = 60, 0.1, 0.5
    true_radius = sigma_e * special.ndtri(min(p_sigma, p_class))

    def radius(k_sigma: int, k_class: int) -> float:
        votes = {
            ESTIMATOR: (counts(0, 9), counts(n - k_sigma, k_sigma)),
            CLASSIFIER: (counts(0, 9), counts(n - k_class, k_class)),
        }
        procedure = dual_certify((0.25, sigma_e), sigma_e, Sampling(9, n, alpha), split)
        return drive(procedure, lambda d: {h: votes[h][d.phase == Phase.ESTIMATION] for h in d.heads}).radius

    pmf_sigma, pmf_class = (stats.binom.pmf(np.arange(n + 1), n, p) for p in (p_sigma, p_class))
    if shared:  # a copy that the worse stage gets right is one that the better stage gets right: monotone coupling
        low, high = sorted((p_sigma, p_class))
        wrong = 0.0
        for worse in range(n + 1):
            extra = stats.binom.pmf(np.arange(n - worse + 1), n - worse, (high - low) / (1 - low))
            for more, weight in enumerate(extra):
                pair = (worse, worse + more) if p_sigma <= p_class else (worse + more, worse)
                if radius(*pair) > true_radius:
                    wrong += float(stats.binom.pmf(worse, n, low) * weight)
    else:
        wrong = sum(
            float(pmf_sigma[i] * pmf_class[j]) for i in range(n + 1) for j in range(n + 1) if radius(i, j) > true_radius
        )
    assert wrong <= alpha
    if shared and split == "full" and p_class == 0.8:
        assert wrong > 0.5 * alpha  # nothing is left to give away: a test of alpha on each stage that could fail
