"""Certificates for a reference: how often they are false, by exact sums over networks whose disagreement is known."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from core.errors import ConfigError
from core.procedures.confidence import certified_radius, clopper_pearson_upper, lower_bound
from core.procedures.dual import dual_certify
from core.procedures.sequential import dual_procedure, standard_procedure
from core.procedures.smoothing import Estimation, certificate, certify, estimate, stage_bound
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    Answer,
    Certificate,
    Counts,
    Draws,
    DualCertificate,
    Phase,
    Procedure,
    Rule,
    Sampling,
    is_paired,
    paired,
)
from tests.helpers.lattice import counts
from tests.helpers.oracles import drive

ALPHA = 0.1
SAMPLING = Sampling(20, 50, ALPHA, num_reference=20)

Bound = Callable[[int, Sampling, int], float]


def real(successes: int, sampling: Sampling, missed: int, uniform: float | None = None) -> float:
    return stage_bound(successes, sampling, missed, uniform)[0]


def forgotten(successes: int, sampling: Sampling, missed: int) -> float:
    return stage_bound(successes, replace(sampling, num_reference=0))[0]


def false_claims(p: float, lost: float, bound: Bound = real, sampling: Sampling = SAMPLING) -> float:
    """P[bound > P[f' = c]] for P[f = c] = p, P[f = c, f' != c] = lost, and f' = c nowhere else: no slack in between."""
    n, m = sampling.num_estimation, sampling.num_reference
    total = 0.0
    for missed in range(m + 1):
        rest = np.convolve(
            stats.binom.pmf(np.arange(m - missed + 1), m - missed, (p - lost) / (1 - lost)),
            stats.binom.pmf(np.arange(n - m + 1), n - m, p),
        )
        false = [bound(missed + more, sampling, missed) > p - lost for more in range(len(rest))]
        total += float(stats.binom.pmf(missed, m, lost) * rest[false].sum())
    return total


@pytest.mark.parametrize("lost", [0.004, 0.05, 0.2])
def test_stage_bound_is_false_with_at_most_alpha(lost: float) -> None:
    for p, share in ((0.5 + lost, 0.5), (0.9, 0.2), (1.0, 0.5)):
        assert false_claims(p, lost, sampling=replace(SAMPLING, reference_share=share)) <= ALPHA
    randomized = replace(SAMPLING, bound="randomized")
    mean = np.mean([false_claims(0.9, lost, partial(real, uniform=u), randomized) for u in (0.1, 0.5, 0.9)])
    assert mean <= ALPHA


def test_false_claims_finds_a_disagreement_that_is_forgotten() -> None:
    assert false_claims(0.7, 0.2) < ALPHA < 0.8 < false_claims(0.7, 0.2, forgotten)


def test_stage_bound_without_disagreement_loses_what_the_reference_was_not_asked() -> None:
    for m in (10, 20, 50):
        sampling = replace(SAMPLING, num_reference=m)
        p_lower, upper = stage_bound(50, sampling)
        assert upper == pytest.approx(1 - 0.05 ** (1 / m), rel=1e-9)
        assert p_lower == pytest.approx(0.05 ** (1 / 50) - upper, rel=1e-9)
    assert stage_bound(50, SAMPLING, 20)[0] == 0.0
    assert stage_bound(40, replace(SAMPLING, num_reference=0)) == (float(lower_bound(40, 50, ALPHA)), 0.0)


def test_radii_of_the_documentation_are_what_the_bound_gives() -> None:
    text = (Path(__file__).parents[3] / "docs/guarantees.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| m = ([\d,]+) \|(.*)\|$", text, re.MULTILINE)
    assert len(lines) == 4
    for number, cells in lines:
        sampling = Sampling(100, 10_000, 0.001, num_reference=int(number.replace(",", "")))
        for p, cell in zip((0.7, 0.9, 0.99, 1.0), cells.split("|"), strict=True):
            for said, lost in zip(re.findall(r"\d*\.\d+", cell), (0.0, 0.001), strict=False):
                p_lower = stage_bound(round(p * 10_000), sampling, round(lost * sampling.num_reference))[0]
                assert float(certified_radius(p_lower, 1.0)) == pytest.approx(float(said), abs=6e-4)


# --- Which draws ------------------------------------------------------------------------------------------------------


def fails_of_disagreement(chosen_by: Callable[[tuple[int, int], tuple[int, int]], int]) -> float:
    """P[its upper bound is below the truth], where the class was chosen by the very draws that it is counted on.

    Two classes at 1/2 each for both networks, which disagree as often either way.
    """
    m, alpha = 32, 0.05
    uppers = clopper_pearson_upper(np.arange(m + 1), m, alpha)
    lost = float(uppers[0]) * (1 + 1e-9)
    fails_at = (uppers < lost).tolist()
    fails = 0.0
    for d1 in range(m + 1):
        for d2 in range(m + 1 - d1):
            together = m - d1 - d2
            weight = float(stats.multinomial.pmf((d1, d2, together), m, (lost, lost, 1 - 2 * lost)))
            for ones in range(together + 1):
                own, other = (ones + d1, m - ones - d1), (ones + d2, m - ones - d2)
                missed = (d1, d2)[chosen_by(own, other)]
                if fails_at[missed]:
                    fails += weight * float(stats.binom.pmf(ones, together, 0.5))
    return fails / alpha


def test_disagreement_on_draws_by_which_the_reference_chose_the_class_fails_too_often() -> None:
    assert fails_of_disagreement(lambda own, other: 0) <= 1.0
    assert fails_of_disagreement(lambda own, other: int(other[1] > other[0])) > 1.3


class Pairs:
    """Votes of two networks of known disagreement, and of what they were asked.

    `heads` has for each head P[f = 1], P[f = 1, f' = 0] and P[f = 0, f' = 1]; `paired_noise` False draws for f' anew.
    """

    def __init__(self, heads: dict[str, tuple[float, float, float]], seed: int, paired_noise: bool = True) -> None:
        self.heads, self.rng, self.paired_noise = heads, np.random.default_rng(seed), paired_noise
        self.asked: list[Draws] = []

    def __call__(self, draws: Draws) -> Answer:
        self.asked.append(draws)
        answer: dict[str, Counts] = {}
        for head in draws.heads:
            if is_paired(head):
                continue
            p, lost, won = self.heads[head]
            ones, first = self.rng.random(draws.num) < p, self.rng.random(draws.num)
            others = np.where(ones, first >= lost / p, first < won / (1 - p))
            if not self.paired_noise:
                others = self.rng.permutation(others)
            answer[head] = np.bincount(ones, minlength=2)
            answer[paired(head)] = np.array([(~ones & others).sum(), (ones & ~others).sum(), (ones == others).sum()])
        return {head: answer[head] for head in draws.heads}


Certifies = Callable[[], Procedure[Certificate | DualCertificate]]


def false_certificates(procedure: Certifies, num: int, votes: Pairs) -> int:
    """Of so many, those that claim anything, which no reference with P[f' = 1] <= 1/2 in some stage allows."""
    return sum(drive(procedure(), votes).prediction != ABSTAIN for _ in range(num))


def dual_that_forgets_the_class(sampling: Sampling) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY whose class stage is a certificate for the network that voted."""
    own = dual_certify((0.25, 0.5), 0.5, sampling)
    answer: Answer = {}
    while True:
        try:
            draws = own.send(answer) if answer else next(own)
        except StopIteration as end:
            result: DualCertificate = end.value
            return result
        answer = {**(yield draws)}
        if draws.heads == (CLASSIFIER, paired(CLASSIFIER)):
            answer[paired(CLASSIFIER)] = np.zeros(3, np.int64)


STAGES = {ESTIMATOR: (0.02, 0.0, 0.0), CLASSIFIER: (0.58, 0.081, 0.0)}
"""The estimator picks sigma 0.25; the class's network is above 1/2, its reference a little below."""


@pytest.mark.parametrize(
    ("procedure", "most", "least"),
    [
        (lambda: certify(0.25, Sampling(20, 1000, ALPHA, num_reference=400)), 0.1, 0.0),
        (lambda: dual_certify((0.25, 0.5), 0.5, Sampling(20, 1000, ALPHA, num_reference=400)), 0.1, 0.0),
        (lambda: dual_that_forgets_the_class(Sampling(20, 1000, ALPHA, num_reference=400)), 1.0, 0.5),
        (lambda: certify(0.25, Sampling(20, 1000, ALPHA)), 1.0, 0.5),
    ],
    ids=["standard", "dual", "planted: forgotten in the class's stage", "planted: forgotten"],
)
def test_certificates_for_the_reference_are_false_at_most_with_alpha(
    procedure: Certifies, most: float, least: float
) -> None:
    num = 200
    false = false_certificates(procedure, num, Pairs(STAGES, seed=3))
    assert stats.binom.sf(false - 1, num, most) > 1e-6
    assert false / num >= least


@pytest.mark.slow
def test_false_certificates_for_the_reference_over_20_000() -> None:
    for share in (0.5, 0.9):
        sampling = Sampling(20, 1000, ALPHA, num_reference=400, reference_share=share)
        for name, make in {
            "standard": lambda s=sampling: certify(0.25, s),
            "dual": lambda s=sampling: dual_certify((0.25, 0.5), 0.5, s),
            "forgotten in one stage": lambda s=sampling: dual_that_forgets_the_class(s),
        }.items():
            false = false_certificates(make, 20_000, Pairs(STAGES, seed=5))  # type: ignore[arg-type]
            print(f"reference, share {share:g}, {name}: {false:,} of 20,000 false at alpha {ALPHA:g}")
            assert (false <= 0.1 * 20_000) == (name != "forgotten in one stage")


def test_estimate_asks_the_reference_for_the_first_estimation_draws_alone() -> None:
    votes = Pairs(STAGES, seed=1)
    result = drive(dual_certify((0.25, 0.5), 0.5, SAMPLING), votes)
    asked = [(d.phase, d.start, d.num, any(map(is_paired, d.heads))) for d in votes.asked]
    stage = [(Phase.ESTIMATION, 0, 20, True), (Phase.ESTIMATION, 20, 30, False)]
    assert asked == [(Phase.SELECTION, 0, 20, False), *stage, (Phase.SELECTION, 0, 20, False), *stage]
    assert result.class_stage is not None
    assert result.class_stage.counts_estimation.sum() == 50


def test_unpaired_noise_costs_the_radius_of_networks_that_agree() -> None:
    heads = {CLASSIFIER: (0.8, 0.0, 0.0)}
    same, other = (drive(certify(1.0, SAMPLING), Pairs(heads, 2, paired_noise=each)) for each in (True, False))
    assert same.counts_missed is not None
    assert other.counts_missed is not None
    assert same.counts_missed.tolist() == [0, 0]
    assert other.counts_missed.sum() > 2
    assert other.p_lower < same.p_lower - 0.1


def test_certificate_of_stored_votes_is_the_same() -> None:
    votes = Pairs({CLASSIFIER: (0.9, 0.01, 0.05)}, 2)
    result = drive(certify(1.0, SAMPLING), votes)
    more = Estimation(result.counts_estimation, result.counts_missed)
    assert certificate(result.counts_selection, result.counts_estimation, 1.0, SAMPLING, more) == result
    assert result.num_reference == 20
    assert result.p_lower < float(lower_bound(int(result.counts_estimation[1]), 50, ALPHA))


def test_other_budgets_refuse_a_reference() -> None:
    for made in (
        standard_procedure("sequential", 0.5, SAMPLING, Rule(), ()),
        dual_procedure(
            "grid", (0.25, 0.5), 0.5, replace(SAMPLING, num_reference=0, bound="randomized"), Rule(), (0.1,)
        ),
    ):
        with pytest.raises(ConfigError, match="for budget fixed and claim constant alone"):
            drive(made, lambda draws: {head: counts(0, draws.num) for head in draws.heads})
    with pytest.raises(ConfigError, match=r"num_reference must lie in \[0, num_estimation = 50\]"):
        replace(SAMPLING, num_reference=51)
    assert next(estimate(0.5, SAMPLING, (CLASSIFIER,))).num == 20
