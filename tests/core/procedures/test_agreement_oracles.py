"""PREDICT for the routed classifier by exact sums; the agreement certificate on closed forms, through the engine."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from core import DualSmoothedClassifier
from core.agreement_records import Router
from core.errors import ConfigError
from core.procedures.agreement import Agreement, agreement_certify, agreement_predict
from core.procedures.sequential import Budget
from core.records import ABSTAIN, CLASSIFIER, ESTIMATOR, Answer, Counts, Draws, Rule, Sampling
from tests.helpers.lattice import Floats, counts
from tests.helpers.oracles import HalfSpace, Negated, axis, drive
from tests.helpers.routed import Routed, SlabRouter, is_false, outcomes_of

SIGMAS = (0.25, 0.5, 1.0)
ROUTERS: tuple[Router, ...] = ("median", "plurality")

# --- PREDICT ----------------------------------------------------------------------------------------------------------


def predicted(
    shares: tuple[float, ...], p: tuple[float, ...], num: int, alpha: float, rule: Router
) -> dict[int, float]:
    """The distribution of what PREDICT returns, as an exact sum."""
    result: dict[int, float] = {}
    for weight, router, ones in outcomes_of(Routed(SIGMAS[: len(p)], 1.0, shares, p), num):

        def answer(draws: Draws, router: Counts = router, ones: tuple[int, ...] = ones) -> Answer:
            if draws.heads == (ESTIMATOR,):
                return {ESTIMATOR: router}
            k = ones[SIGMAS.index(draws.sigma)]
            return {CLASSIFIER: counts(num - k, k)}

        returned = drive(agreement_predict(SIGMAS[: len(p)], 1.0, num, alpha, rule), answer).prediction
        result[returned] = result.get(returned, 0.0) + weight
    return result


HALF = 0.5 - 1e-9


@pytest.mark.parametrize(
    ("rule", "shares", "p", "at_least"),
    [
        # The level in the middle is picked by a hair, and answers 1 by a hair; those beside it answer 0.
        ("median", (HALF, 1 - 2 * HALF, HALF), (0, 1 - HALF, 0), 0.7),
        ("median", (HALF, 1 - HALF), (0, 1), 0.2),
        ("median", (0, HALF), (0, 1), 0.0),  # half of the draws vote for no level, which is beyond all of them
        ("plurality", (HALF, 1 - HALF), (0, 1), 0.2),
    ],
)
def test_agreement_predict_wrong_class_probability_by_exact_sum_is_at_most_alpha(
    rule: Router, shares: tuple[float, ...], p: tuple[float, ...], at_least: float
) -> None:
    num = 12
    alpha = 4 * float(stats.binom.sf(9, num, 0.5)) * (1 + 1e-6)
    wrong = predicted(shares, p, num, alpha, rule).get(0, 0.0)
    assert at_least * alpha <= wrong <= alpha


@pytest.mark.parametrize("rule", ROUTERS)
def test_agreement_predict_level_in_doubt_returns_the_class_that_all_of_them_answer(rule: Router) -> None:
    asked: list[Draws] = []

    def answer(draws: Draws, ones: Mapping[float, int], router: Counts) -> Answer:
        asked.append(draws)
        if draws.heads == (ESTIMATOR,):
            return {ESTIMATOR: router}
        return {CLASSIFIER: counts(100 - ones[draws.sigma], ones[draws.sigma])}

    def result(ones: tuple[int, ...], *router: int) -> tuple[int, tuple[int, ...]]:
        asked.clear()
        votes = dict(zip(SIGMAS, ones, strict=True))
        p = drive(agreement_predict(SIGMAS, 1.0, 100, 0.001, rule), lambda draws: answer(draws, votes, counts(*router)))
        return p.prediction, p.candidates

    doubt = (0, 1, 2) if rule == "plurality" else (0, 1)
    assert result((98, 99, 97), 52, 46, 2) == (1, doubt)
    assert result((98, 1, 97), 52, 46, 2) == (ABSTAIN, doubt)
    assert [d.sigma for d in asked[1:]] == [0.25, 0.5], "the first that does not agree ends it"
    assert result((98, 50, 97), 52, 46, 2) == (ABSTAIN, doubt)
    assert result((2, 1, 97), 1, 3, 96) == (1, (2,))


# --- Closed forms, through the engine ---------------------------------------------------------------------------------


def images_at(z: Floats) -> Tensor:
    return torch.from_numpy(0.5 + z).float().reshape(-1, 1, 1, 2)


@pytest.mark.parametrize("rule", ROUTERS)
@pytest.mark.parametrize("sigma_e", [0.5, 0.75])
def test_dual_smoothed_classifier_agreement_on_closed_forms(rule: Router, sigma_e: float) -> None:
    """Three levels by slabs across the first pixel, experts by half-spaces across the second; one of them at odds."""
    num, alpha, cuts, sigmas = 40, 0.02, (-0.25, 0.25), (0.125, 0.25, 0.5)
    planes = {0.125: (1, -0.3, 1), 0.25: (1, -0.3, 1), 0.5: (1, 0.35, 0)}
    experts = {
        sigma: HalfSpace(axis(2, place), 0.5 + at) if beyond else Negated(HalfSpace(axis(2, place), 0.5 + at))
        for sigma, (place, at, beyond) in planes.items()
    }
    model = DualSmoothedClassifier(SlabRouter(cuts), experts, sigmas, sigma_e, 2)
    z = np.random.default_rng(3).uniform((-0.5, -0.1), (0.5, 0.5), (num, 2))
    images = images_at(z)
    shares = SlabRouter(cuts).shares(z[:, 0], sigma_e)
    ids = [str(place) for place in range(num)]
    results = model.certify_many(
        images, claim="agreement", router=rule, num_estimation=1000, alpha=alpha, example_ids=ids
    )
    published = model.certify_many(images, num_estimation=1000, alpha=alpha, example_ids=ids)
    exact, gained, false = [], 0, 0
    for place, (result, other) in enumerate(zip(results, published, strict=True)):
        p = tuple(special.ndtr((z[place, 1] - at) / s * (1 if one else -1)) for s, (_, at, one) in planes.items())
        truth = Routed(sigmas, sigma_e, tuple(shares[place].tolist()), p)
        false += is_false(result, truth)  # at most 0.8 of 40 are expected to be, at alpha
        exact.append(truth.radius(result.level, result.prediction, rule) if not result.abstained else 0.0)
        if result.level == other.sigma_stage.top_class and rule == "median":
            assert result.radius >= result.radius_constant == other.radius
            gained += result.radius > other.radius
    assert false <= stats.binom.isf(1e-4, num, alpha)
    radii = np.array([result.radius for result in results])
    assert radii.sum() > 0.7 * sum(exact)
    assert sum(exact) > 0.2 * num
    assert gained > 10 or rule == "plurality"
    assert {result.binding for result in results} >= {0, 1, 2}


def test_dual_smoothed_classifier_agreement_needs_halves_ascending_sigmas_and_known_names() -> None:
    plane, image = HalfSpace(axis(2, 1), 0.5), images_at(np.zeros((1, 2)))[0]
    model = DualSmoothedClassifier(SlabRouter((0.0,)), plane, (0.25, 0.5), 0.5, 2)
    with pytest.raises(ConfigError, match="halves"):
        model.certify(image, claim="agreement", alpha_split="full")
    with pytest.raises(ConfigError, match="claim must be one of"):
        model.certify(image, claim="certain")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="router must be one of"):
        model.certify(image, claim="agreement", router="mean")  # type: ignore[call-overload]
    descending = DualSmoothedClassifier(SlabRouter((0.0,)), plane, (0.5, 0.25), 0.5, 2)
    with pytest.raises(ConfigError, match="ascending sigmas"):
        descending.certify(image, claim="agreement")
    result = descending.certify(image + 0.3, claim="agreement", router="plurality", num_estimation=200)
    assert result.prediction == 1
    with pytest.raises(ConfigError, match="ascending"):
        model.certify(image, claim="agreement", budget="grid")


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "num"), [("fixed", 20_000), ("sequential", 5000), ("grid", 5000)])
def test_agreement_many_certificates_are_false_with_at_most_alpha(budget: Budget, num: int) -> None:
    """Slabs and half-spaces at random, with draws simulated from their probabilities, selection included."""
    random, alpha = np.random.default_rng(4), 0.1
    false, standing = 0, 0
    radii = (0.0, 0.1, 0.2, 0.3, 0.5) if budget == "grid" else ()
    terms = Agreement(SIGMAS, 1.0, Sampling(20, 400, alpha), "median", budget, Rule(40, 0.3), radii)
    for _ in range(num):
        cuts = np.sort(random.normal(0, 0.7, 2))
        shares = SlabRouter(tuple(cuts.tolist())).shares(np.zeros(1), 1.0)[0]
        p = special.ndtr(random.uniform(-0.1, 0.6, 3) / np.array(SIGMAS))
        truth = Routed(SIGMAS, 1.0, tuple(shares.tolist()), tuple(p.tolist()))

        def answer(draws: Draws, shares: Floats = shares, p: Floats = p) -> Answer:
            ones = int(random.binomial(draws.num, p[SIGMAS.index(draws.sigma)]))
            votes = {ESTIMATOR: random.multinomial(draws.num, shares), CLASSIFIER: counts(draws.num - ones, ones)}
            return {head: votes[head] for head in draws.heads}

        result = drive(agreement_certify(terms), answer)
        standing += not result.abstained
        false += is_false(result, truth)
    print(f"{false} of {num} certificates are false ({100 * false / num:.2f}%), {standing} stand")
    assert standing > num / 2
    assert 0 < false <= alpha * num
