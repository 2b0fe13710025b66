"""The probability that an agreement certificate is false, by exact sums at its worst; planted errors exceed it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from core.agreement_records import AgreementCertificate
from core.procedures import agreement
from core.procedures.agreement import Agreement, agreement_from_votes
from core.procedures.agreement_terms import others_of
from core.procedures.composition import compose
from core.procedures.confidence import clopper_pearson_lower
from core.records import CLASSIFIER, ESTIMATOR, Counts, Sampling
from tests.helpers.lattice import JUST_BELOW
from tests.helpers.routed import Certify, Given, Routed, certified, false_claims, is_false

NUM = 12
TAIL = float(stats.binom.sf(9, NUM, 0.5))
ALPHA = 2 * TAIL * (1 + 1e-9)
"""Of 12 draws at p = 1/2, 10 or more agree with probability 0.0193: hardly less than half of this alpha."""

HALF = 0.5 * JUST_BELOW
BOUND = float(clopper_pearson_lower(11, NUM, ALPHA / 2)) * JUST_BELOW
"""What 11 of 12 draws show, a hair less: they then show too much, with probability alpha / 2."""

SIGMAS = {2: (0.25, 0.5), 3: (0.5, 0.75, 1.0), 5: (0.5, 0.6, 0.7, 0.8, 1.0)}
"""Close enough that 12 draws at any level can show what BOUND gives at the largest."""


def routed(shares: tuple[float, ...], *p: float, sigma_e: float = 0.5) -> Routed:
    """Where the last level has R = E, sigma_e is that level."""
    return Routed(SIGMAS[len(p)], sigma_e, shares, p)


HARD: dict[str, tuple[Routed, int]] = {
    "2 levels, both bounds at 1/2": (routed((HALF, 1 - HALF), 1, HALF), 0),
    "2 levels, E = R > 0": (routed((BOUND, 1 - BOUND), 1, BOUND), 0),
    "2 levels, the other one chosen": (routed((1 - BOUND, BOUND), BOUND, 1, sigma_e=0.25), 1),
    "2 levels, draws without a vote": (routed((BOUND, 0), 1, BOUND), 0),
    "3 levels, the last one binds": (routed((0.2, BOUND - 0.2, 1 - BOUND), 1, 1, BOUND, sigma_e=1.0), 1),
    "3 levels, the middle one binds, never picked": (routed((HALF, 0, 1 - HALF), 1, HALF, 1), 0),
    "3 levels, two bind": (routed((BOUND, 0, 1 - BOUND), 1, BOUND, BOUND), 0),
    "5 levels, the last one binds": (routed((0, 0.2, BOUND - 0.2, 0, 1 - BOUND), 1, 1, 1, 1, BOUND, sigma_e=1.0), 2),
    "5 levels, the first one binds": (routed((1 - BOUND, 0, 0, BOUND, 0), BOUND, 1, 1, 1, 1, sigma_e=0.5), 3),
    "5 levels, one on either side binds": (routed((1 - BOUND, 0, 0.3, 0, BOUND - 0.3), BOUND, 1, 1, 1, 0), 2),
}


@pytest.mark.parametrize("name", HARD)
def test_agreement_false_claims_by_exact_sum_are_at_most_alpha(name: str) -> None:
    truth, chosen = HARD[name]
    wrong = false_claims(truth, chosen, 1, NUM, ALPHA)
    assert wrong <= ALPHA
    if "two" not in name and "either" not in name:
        assert wrong > 0.97 * ALPHA, "hardly anything is left to give away: a test that could fail"


def test_agreement_false_claims_where_the_two_errors_exclude_each_other_are_at_most_alpha() -> None:
    """Both heads read the same copies at sigma_e, and the class is right just where the router is not."""
    truth = routed((HALF, 1 - HALF), 1, HALF)
    terms = Agreement(truth.sigmas, truth.sigma_e, Sampling(1, NUM, ALPHA))
    wrong = sum(
        weight
        for k, weight in enumerate(stats.binom.pmf(np.arange(NUM + 1), NUM, 0.5).tolist())
        if is_false(
            certified(terms, Given(np.array([k, NUM - k]), (NUM, NUM - k), 0, 1, truth.sigmas, truth.sigma_e)), truth
        )
    )
    assert 0.999 * ALPHA < wrong <= ALPHA


def test_agreement_false_claims_where_the_chosen_level_binds_spend_the_class_share_alone() -> None:
    for shares, p, chosen in (((1.0, 0.0), (HALF, 1), 0), ((HALF, 1 - HALF), (1, HALF), 1)):
        wrong = false_claims(routed(shares, *p), chosen, 1, NUM, ALPHA)
        assert 0.9 * ALPHA / 2 < wrong <= ALPHA / 2


QUARTER = float(clopper_pearson_lower(11, NUM, ALPHA / 4)) * JUST_BELOW
OWN = float(clopper_pearson_lower(6, NUM, ALPHA / 4)) * JUST_BELOW
PLURAL: dict[str, tuple[Routed, int]] = {
    "2 levels": (routed((QUARTER, 1 - QUARTER), 1, BOUND), 0),
    "3 levels, neither has half": (routed((OWN, OWN, 1 - 2 * OWN), 1, HALF, 1), 0),
    "3 levels, the other one rare": (routed((OWN, 1 - QUARTER, QUARTER - OWN), 1, HALF, 1), 0),
    "3 levels, draws without a vote": (routed((OWN, 1 - QUARTER, 0), 1, HALF, 1), 0),
    "5 levels": (routed((0, OWN, OWN, 0, 1 - 2 * OWN), 1, 1, HALF, 1, 1), 1),
}


@pytest.mark.parametrize("name", PLURAL)
def test_agreement_plurality_false_claims_by_exact_sum_are_at_most_alpha(name: str) -> None:
    truth, chosen = PLURAL[name]
    assert 0.0 < false_claims(truth, chosen, 1, NUM, ALPHA, "plurality") <= ALPHA


# --- Planted errors ---------------------------------------------------------------------------------------------------

Against = Callable[[Counts, int, int], int]


def either_side(votes: Counts, chosen: int, place: int) -> int:
    """The side that the estimation draws favour."""
    return max(int(votes[:place].sum()), int(votes[place + 1 :].sum()))


def not_for_what_is_beyond(votes: Counts, chosen: int, place: int) -> int:
    """A draw without a vote is taken to keep the router off."""
    return NUM - int(votes[place:].sum() if chosen < place else votes[: place + 1].sum())


def up_to_and_with_it(votes: Counts, chosen: int, place: int) -> int:
    """Q_j in place of Q_{j-1}."""
    return int(votes[: place + 1].sum() if chosen < place else votes[place:].sum())


@pytest.mark.parametrize(
    ("against", "truth", "at_least"),
    [
        (either_side, routed((HALF, 0, 1 - HALF), 1, HALF, 1), 1.4),
        (not_for_what_is_beyond, routed((0.2, 0), 1, 0), 20),
        (up_to_and_with_it, routed((HALF, 1 - HALF), 1, 0), 20),
    ],
)
def test_false_claims_finds_an_exclusion_by_the_wrong_votes(
    against: Against, truth: Routed, at_least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert false_claims(truth, 0, 1, NUM, ALPHA) <= ALPHA
    monkeypatch.setattr(agreement, "against", against)
    assert false_claims(truth, 0, 1, NUM, ALPHA) > at_least * ALPHA


def level_of_the_estimation_draws(terms: Agreement, given: Given) -> AgreementCertificate:
    votes = given.stored(NUM)
    own = votes.classes[agreement.choose_level(given.router, "median")]
    assert own is not None
    return agreement_from_votes(terms, replace(votes, router_selection=given.router, class_selection=own.counts))


def class_of_the_estimation_draws(terms: Agreement, given: Given) -> AgreementCertificate:
    votes = given.stored(NUM)
    own = votes.classes[given.chosen]
    assert own is not None
    return agreement_from_votes(terms, replace(votes, class_selection=own.counts))


@pytest.mark.parametrize(
    ("planted", "truth"),
    [
        # At either level the other one may be picked, and answers otherwise.
        (level_of_the_estimation_draws, Routed((0.25, 0.5), 0.5, (0.5, 0.5), (1, 0))),
        (class_of_the_estimation_draws, Routed((0.25, 0.5), 0.5, (1, 0), (0.5, 0.5))),
    ],
)
def test_false_claims_finds_what_is_chosen_by_the_draws_of_its_bound(planted: Certify, truth: Routed) -> None:
    """Only one bound can err here, at alpha / 2; chosen by its own draws it errs on either side."""
    for c in (0, 1):
        assert false_claims(truth, 1 - c if truth.shares[1] else 0, c, NUM, ALPHA) <= ALPHA / 2
    wrong = false_claims(truth, 0, 1, NUM, ALPHA, certify=planted)
    assert wrong > 1.9 * ALPHA / 2


def test_false_claims_finds_a_level_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = routed((HALF, 0, 1 - HALF), 1, 1, 0)
    assert false_claims(truth, 0, 1, NUM, ALPHA) <= ALPHA
    real = others_of
    monkeypatch.setattr(agreement, "others_of", lambda chosen, num_levels: real(chosen, num_levels)[:-1])
    assert false_claims(truth, 0, 1, NUM, ALPHA) > 20 * ALPHA


def test_false_claims_finds_reach_and_class_of_different_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = routed((HALF, 1 - HALF, 0), 1, 0, 1)
    assert false_claims(truth, 0, 1, NUM, ALPHA) <= ALPHA
    monkeypatch.setattr(agreement, "compose", lambda reach, radii: compose(reach, [radii[0], *radii[:-1]]))
    assert false_claims(truth, 0, 1, NUM, ALPHA) > 20 * ALPHA


def test_false_claims_finds_alpha_spent_on_either(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, chosen = HARD["5 levels, the last one binds"]
    bound = float(clopper_pearson_lower(11, NUM, ALPHA)) * JUST_BELOW
    truth = replace(truth, shares=(0, 0.2, bound - 0.2, 0, 1 - bound), p=(1, 1, 1, 1, bound))
    assert false_claims(truth, chosen, 1, NUM, ALPHA) <= ALPHA
    both = property(lambda terms: {ESTIMATOR: terms.sampling, CLASSIFIER: terms.sampling})
    monkeypatch.setattr(agreement.Agreement, "stages", both)
    assert false_claims(truth, chosen, 1, NUM, ALPHA) > 1.9 * ALPHA


def test_false_claims_finds_the_class_of_another_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level certifies whatever it answers itself."""
    truth = routed((HALF, 1 - HALF), 1, 0)
    assert false_claims(truth, 0, 1, NUM, ALPHA) <= ALPHA
    monkeypatch.setattr(agreement, "_agreeing", lambda votes, c: int(votes.max()))
    assert false_claims(truth, 0, 1, NUM, ALPHA) > 20 * ALPHA
