"""Multiscale against exact sums, closed forms and a slow second implementation; planted errors are found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from core.errors import ConfigError
from core.law import GAUSSIAN
from core.procedures import multiscale
from core.procedures.multiscale import MultiscaleCertificate, level_alphas, multiscale_certify
from core.procedures.smoothing import certificate, certify
from core.records import ABSTAIN, CLASSIFIER, Answer, Counts, Draws, Phase, Sampling
from tests.helpers.lattice import JUST_BELOW, counts
from tests.helpers.oracles import drive

SMALL, LARGE = 0.25, 1.0
SIGMAS = (SMALL, LARGE)

Votes = Mapping[tuple[float, Phase], Counts]


def run_on(votes: Votes, sampling: Sampling, shares: Sequence[float] = ()) -> MultiscaleCertificate:
    def answer(draws: Draws) -> Answer:
        return {CLASSIFIER: votes[draws.sigma, draws.phase]}

    return drive(multiscale_certify(sorted({sigma for sigma, _ in votes}), sampling, shares), answer)


def votes_at(large: Counts, small: Counts, chosen: tuple[int, int] | None = None) -> Votes:
    """Estimation votes of both levels; the selection votes are all for `chosen` (at the large one, at the small one),
    or for the most frequent class."""
    tops = chosen or (int(large.argmax()), int(small.argmax()))
    selection = [np.eye(len(large), dtype=np.int64)[top] * 9 for top in tops]
    return {
        (LARGE, Phase.SELECTION): selection[0],
        (LARGE, Phase.ESTIMATION): large,
        (SMALL, Phase.SELECTION): selection[1],
        (SMALL, Phase.ESTIMATION): small,
    }


def lower(successes: int, num: int, alpha: float) -> float:
    return float(stats.beta.ppf(alpha, successes, num - successes + 1)) if successes else 0.0


# --- What the votes give ----------------------------------------------------------------------------------------------


def test_multiscale_large_sigma_decides_alone_at_its_share_of_alpha() -> None:
    votes = votes_at(counts(2, 95, 3), counts(0, 100, 0))
    result = run_on(votes, Sampling(9, 100, 0.02))
    assert (result.prediction, result.sigma, result.sigma_bound, len(result.levels)) == (1, LARGE, LARGE, 1)
    assert math.isclose(result.radius, LARGE * stats.norm.ppf(lower(95, 100, 0.01)), rel_tol=1e-9)
    assert (result.radius_level, result.radius_above, result.num_draws) == (result.radius, math.inf, 109)
    assert (result.alpha, result.levels[0].alpha) == (0.02, 0.01)


def test_multiscale_small_sigma_decides_within_what_the_level_above_leaves() -> None:
    votes = votes_at(counts(30, 40, 30), counts(0, 100, 0))
    result = run_on(votes, Sampling(9, 100, 0.02))
    above = LARGE * stats.norm.ppf(lower(70, 100, 0.01))  # both other classes have 30 of 100 votes
    level = SMALL * stats.norm.ppf(lower(100, 100, 0.01))
    assert (result.prediction, result.sigma, len(result.levels), result.num_draws) == (1, SMALL, 2, 218)
    assert math.isclose(result.radius_above, above, rel_tol=1e-9)
    assert math.isclose(result.radius_level, level, rel_tol=1e-9)
    assert (result.radius, result.sigma_bound) == (result.radius_above, LARGE)
    assert above < level
    wide = run_on(votes_at(counts(5, 40, 5), counts(0, 100, 0)), Sampling(9, 100, 0.02))
    assert wide.radius_above == 0.0, "50 draws without a vote may be of any class"


@pytest.mark.parametrize(("small", "prediction"), [((98, 1, 1), 0), ((1, 98, 1), ABSTAIN)])
def test_multiscale_class_in_doubt_above_is_the_only_one_that_can_be_certified(
    small: tuple[int, int, int], prediction: int
) -> None:
    """Above, class 0 has 54 of 100 votes: it may or may not decide there."""
    result = run_on(votes_at(counts(54, 23, 23), counts(*small)), Sampling(9, 100, 0.02))
    assert result.prediction == prediction
    assert len(result.levels) == 2
    assert result.radius_level > 0.0
    assert (result.radius > 0.0) == (prediction == 0) == (result.sigma is not None)


def test_multiscale_two_classes_in_doubt_above_end_it_without_another_draw() -> None:
    result = run_on(votes_at(counts(52, 48, 0), counts(100, 0, 0)), Sampling(9, 100, 0.02))
    assert (result.prediction, result.radius, result.sigma, result.num_draws) == (ABSTAIN, 0.0, None, 109)


@pytest.mark.parametrize(
    ("shares", "asked"),
    [((0.8, 0.2), 2), ((0.2, 0.8), 1), ((0.8, 0.1, 0.1), 3), ((0.1, 0.8, 0.1), 2), ((0.2, 0.2, 0.6), 1)],
)
def test_multiscale_goes_on_where_the_best_share_below_leaves_one_class_in_doubt(
    shares: tuple[float, ...], asked: int
) -> None:
    """40, 40 and 20 of 100 votes above: at least 60 of 100 for others, which is as rare as P[Bin(100, 1/2) >= 60]."""
    assert 0.01 < stats.binom.sf(59, 100, 0.5) < 0.04
    levels = [0.1, 0.2, 0.4][: len(shares)]
    votes: dict[tuple[float, Phase], Counts] = {}
    for sigma in levels:
        decides = sigma == levels[0]
        votes[sigma, Phase.SELECTION] = counts(0, 9, 0)
        votes[sigma, Phase.ESTIMATION] = counts(0, 100, 0) if decides else counts(40, 40, 20)
    result = run_on(votes, Sampling(9, 100, 0.05), shares)
    assert len(result.levels) == asked
    assert result.abstained == (asked == 1 or shares[0] < 0.5)


def test_is_hopeless_bound_of_exactly_one_half_is_in_doubt() -> None:
    alpha = 0.5 * (1 + 2.0**-44)  # the bound of one draw is alpha itself, less the step towards zero
    level = certificate(counts(1, 0, 0), counts(0, 0, 1), LARGE, Sampling(1, 1, alpha))
    assert multiscale._is_hopeless([level], alpha, GAUSSIAN)
    assert not multiscale._is_hopeless([level], 0.51, GAUSSIAN)


def test_multiscale_no_level_decides_abstains() -> None:
    result = run_on(votes_at(counts(34, 33, 33), counts(40, 30, 30)), Sampling(9, 100, 0.02))
    assert (result.prediction, result.radius, result.radius_above, len(result.levels)) == (ABSTAIN, 0.0, 0.0, 2)
    assert (result.sigma, result.sigma_bound) == (None, None)


def test_multiscale_level_without_votes_certifies_nothing() -> None:
    result = run_on(votes_at(counts(0, 0, 0), counts(0, 100, 0)), Sampling(9, 100, 0.02))
    assert (result.prediction, len(result.levels)) == (ABSTAIN, 1)


def test_multiscale_one_level_is_standard_smoothing() -> None:
    votes = {(0.5, Phase.SELECTION): counts(1, 9), (0.5, Phase.ESTIMATION): counts(30, 170)}
    sampling = Sampling(10, 200, 0.001)
    alone = drive(certify(0.5, sampling), lambda draws: {CLASSIFIER: votes[0.5, draws.phase]})
    result = run_on(votes, sampling)
    assert result.levels == (alone,)
    assert (result.prediction, result.radius) == (alone.prediction, alone.radius)
    assert alone.radius > 0


def second_implementation(
    sigmas: Sequence[float], votes: Votes, num: int, alphas: Sequence[float]
) -> tuple[int, float, int]:
    """Prediction, radius and levels that were asked, class by class with SciPy's distributions."""
    estimation = {sigma: votes[sigma, Phase.ESTIMATION].tolist() for sigma in sigmas}

    def highest(sigma: float, y: int, alpha: float) -> float:
        """Upper bound of the probability of class y; draws without a vote may be its."""
        return 1.0 - lower(sum(estimation[sigma]) - estimation[sigma][y], num, alpha)

    for place in reversed(range(len(sigmas))):
        selection, alpha = votes[sigmas[place], Phase.SELECTION].tolist(), alphas[place]
        top = selection.index(max(selection))
        others = [y for y in range(len(selection)) if y != top]
        asked, p = len(sigmas) - place, lower(estimation[sigmas[place]][top], num, alpha)
        if p > 0.5:
            radii = [sigmas[place] * float(stats.norm.ppf(p))]
            for sigma in sigmas[place + 1 :]:
                radii += [-sigma * float(stats.norm.ppf(highest(sigma, y, alpha))) for y in others]
            return (top, min(radii), asked) if min(radii) > 0 else (ABSTAIN, 0.0, asked)
        if place:
            loosest = max(alphas[:place])
            doubtful = {y for s in sigmas[place:] for y in range(len(selection)) if highest(s, y, loosest) >= 0.5}
            if len(doubtful) > 1:
                break
    return ABSTAIN, 0.0, asked


def test_multiscale_random_votes_equal_the_second_implementation() -> None:
    random, sigmas, num = np.random.default_rng(0), (0.25, 0.5, 1.0), 200
    seen: set[tuple[bool, int]] = set()
    for number in range(300):
        votes: dict[tuple[float, Phase], Counts] = {}
        for place, sigma in enumerate(sigmas):
            share = random.dirichlet(np.array([3.0, 1.0, 1.0, 1.0]) * (3 - place))
            if number % 3 == 0:
                share = share * 0.97  # some draws without a vote
            for phase, draws in ((Phase.SELECTION, 20), (Phase.ESTIMATION, num)):
                votes[sigma, phase] = random.multinomial(draws, [*share, max(0.0, 1 - share.sum())])[:4]
        shares = () if number % 2 else (0.5, 0.3, 0.2)
        result = run_on(votes, Sampling(20, num, 0.05), shares)
        alphas = [0.05 * share for share in shares or (1 / 3,) * 3]
        prediction, radius, asked = second_implementation(sigmas, votes, num, alphas)
        assert (result.prediction, len(result.levels)) == (prediction, asked)
        assert result.radius == pytest.approx(radius, rel=1e-7)
        seen.add((result.abstained, asked))
    assert seen == {(abstained, asked) for abstained in (False, True) for asked in (1, 2, 3)}


@pytest.mark.parametrize("alpha", [0.001, 0.1, 1e-7])
@pytest.mark.parametrize("shares", [(), (0.7, 0.2, 0.1), (0.1, 0.1, 0.1)])
def test_level_alphas_add_up_to_at_most_alpha(alpha: float, shares: tuple[float, ...]) -> None:
    alphas = level_alphas(alpha, 3, shares)
    assert sum(map(Fraction, alphas)) <= Fraction(alpha)
    assert alphas == pytest.approx([alpha * share for share in shares or (1 / 3,) * 3], rel=1e-12)
    for num in range(1, 20):
        assert sum(map(Fraction, level_alphas(alpha, num))) <= Fraction(alpha)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.5, 0.1), (1.0, 0.0, 0.0), (1.5, -0.25, -0.25)])
def test_level_alphas_bad_shares_raise(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="shares of alpha"):
        level_alphas(0.1, 3, shares)


# --- The probability of a false claim, by exact sums ------------------------------------------------------------------

NUM = 16
"""Draws of each level: few, so that every outcome can be summed over. For p = 1/2, 11 or more agree with probability
0.105, and one look at alpha = 0.11 certifies them."""


@dataclass(frozen=True)
class Truth:
    """Probabilities of three classes at both levels, and the classes that the selection draws chose."""

    large: tuple[float, float, float]
    small: tuple[float, float, float]
    chosen: tuple[int, int]

    def radius(self, certificate: MultiscaleCertificate) -> float:
        """What these probabilities certify where the level decides that did."""
        if len(certificate.levels) == 1:
            return LARGE * float(special.ndtri(self.large[self.chosen[0]]))
        others = max(p for y, p in enumerate(self.large) if y != self.chosen[1])
        return min(SMALL * float(special.ndtri(self.small[self.chosen[1]])), -LARGE * float(special.ndtri(others)))


JUST_BELOW_HALF = 0.5 * JUST_BELOW
Q = lower(13, NUM, 0.11) * JUST_BELOW
HARD = {
    "another class above at 1/2": Truth((JUST_BELOW_HALF, 0.5, 0), (0, 1, 0), (0, 1)),
    "another class above at 1/2, three classes": Truth((JUST_BELOW_HALF, 0.3, 0.2), (0, 1, 0), (0, 1)),
    "both levels at 1/2": Truth((JUST_BELOW_HALF, 0.3, 0.2), (0, JUST_BELOW_HALF, 0), (0, 1)),
    "the own class above at 1/2": Truth((JUST_BELOW_HALF, 0.3, 0.2), (lower(15, NUM, 0.11) * JUST_BELOW, 0, 0), (0, 0)),
    "two others above": Truth((0.1, 0.45, 0.45), (1, 0, 0), (1, 0)),
    "an upper bound just missed": Truth((Q - 0.1, 1 - Q, 0.1), (1, 0, 0), (0, 0)),
}


def false_claims(truth: Truth, alpha: float, shares: Sequence[float] = ()) -> float:
    """Probability that the certified radius exceeds what the true probabilities certify."""
    own, wrong = truth.chosen[1], 0.0
    outcomes = [(k, m, NUM - k - m) for k in range(NUM + 1) for m in range(NUM + 1 - k)]
    p_large = stats.multinomial.pmf(outcomes, NUM, np.array(truth.large) / sum(truth.large))
    p_small = stats.binom.pmf(np.arange(NUM + 1), NUM, truth.small[own])
    for large, weight in zip(outcomes, p_large.tolist(), strict=True):
        for successes in np.flatnonzero(p_small).tolist() if weight else ():
            small = counts(0, 0, 0)
            small[own], small[(own + 1) % 3] = successes, NUM - successes
            result = run_on(votes_at(counts(*large), small, truth.chosen), Sampling(9, NUM, alpha), shares)
            if result.radius > max(0.0, truth.radius(result)):
                wrong += weight * float(p_small[successes])
    return wrong


@pytest.mark.parametrize("shares", [(), (0.1, 0.9)], ids=["equal shares", "more where the large one decides"])
@pytest.mark.parametrize("name", HARD)
def test_multiscale_false_claims_by_exact_sum_are_at_most_alpha(name: str, shares: tuple[float, ...]) -> None:
    wrong = false_claims(HARD[name], 0.22, shares)
    assert wrong <= 0.22
    if name == "another class above at 1/2" and not shares:
        assert wrong > 0.9 * 0.22  # hardly anything is left to give away: a test that could fail


def test_false_claims_finds_alpha_spent_on_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, alpha = HARD["another class above at 1/2"], 0.12
    assert false_claims(truth, alpha) <= alpha
    monkeypatch.setattr(multiscale, "level_alphas", lambda alpha, num, shares=(): (alpha,) * num)
    assert false_claims(truth, alpha) > 1.7 * alpha


def test_false_claims_finds_a_level_above_that_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiscale, "_radius_of_others", lambda level, last, law: math.inf)
    assert false_claims(HARD["another class above at 1/2, three classes"], 0.22) > 0.6


def test_false_claims_finds_bounds_above_that_spend_the_share_of_their_own_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The obvious way to divide alpha: each level's bounds at that level's share. It fails for unequal shares."""
    truth, shares, alpha = HARD["another class above at 1/2"], (0.05, 0.95), 0.12
    monkeypatch.setattr(multiscale, "_is_hopeless", lambda levels, alpha, law: False)  # it only saves draws
    assert false_claims(truth, alpha, shares) <= alpha
    real = multiscale._radius_of_others
    monkeypatch.setattr(
        multiscale, "_radius_of_others", lambda level, last, *rest: real(level, replace(last, alpha=level.alpha), *rest)
    )
    assert false_claims(truth, alpha, shares) > 1.7 * alpha
