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
from core.procedures.confidence import certified_radius, clopper_pearson_upper
from core.procedures.dual import dual_certify
from core.procedures.sequential import dual_procedure, standard_procedure
from core.procedures.smoothing import certificate, certify, stage_bound
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
Certifies = Callable[[], Procedure[Certificate | DualCertificate]]


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
    assert false_claims(0.7, 0.2, forgotten) > 0.8


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


def test_disagreement_on_draws_by_which_the_reference_chose_the_class_fails_too_often() -> None:
    """Two classes at 1/2 each for both networks, which disagree as often either way; by exact sums."""
    m, alpha, fails = 32, 0.05, {"fixed": 0.0, "chosen": 0.0}
    uppers = clopper_pearson_upper(np.arange(m + 1), m, alpha)
    lost = float(uppers[0]) * (1 + 1e-9)
    for d1 in range(m + 1):
        for d2 in range(m + 1 - d1):
            both = m - d1 - d2
            weight = float(stats.multinomial.pmf((d1, d2, both), m, (lost, lost, 1 - 2 * lost)))
            ones = np.arange(both + 1)
            chosen = np.where(both - ones + d1 > ones + d2, d2, d1)  # the reference's most frequent class
            fails["fixed"] += weight * float(uppers[d1] < lost)
            fails["chosen"] += weight * float(stats.binom.pmf(ones, both, 0.5)[uppers[chosen] < lost].sum())
    assert fails["fixed"] <= alpha
    assert fails["chosen"] > 1.3 * alpha


class Pairs:
    """Votes of two networks: for each head P[f = 1] and P[f = 1, f' = 0]."""

    def __init__(self, heads: dict[str, tuple[float, float]], seed: int) -> None:
        self.heads, self.rng, self.asked = heads, np.random.default_rng(seed), list[Draws]()

    def __call__(self, draws: Draws) -> Answer:
        self.asked.append(draws)
        answer: dict[str, Counts] = {}
        for head in (head for head in draws.heads if not is_paired(head)):
            p, lost = self.heads[head]
            missed, ones = self.rng.multinomial(draws.num, (lost, p - lost, 1 - p))[:2]
            answer |= {head: counts(draws.num - missed - ones, missed + ones), paired(head): counts(0, missed, 0)}
        return {head: answer[head] for head in draws.heads}


STAGES = {ESTIMATOR: (0.02, 0.0), CLASSIFIER: (0.58, 0.081)}
"""The estimator picks sigma 0.25; the class's network is above 1/2, its reference below: every certificate is false."""
MANY = Sampling(20, 1000, ALPHA, num_reference=400)


def dual_that_forgets_the_class(sampling: Sampling) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY whose class stage is a certificate for the network that voted."""
    own = dual_certify((0.25, 0.5), 0.5, sampling)
    draws = next(own)
    while True:
        answer = {**(yield draws)}
        if draws.heads == (CLASSIFIER, paired(CLASSIFIER)):
            answer[paired(CLASSIFIER)] = counts(0, 0, 0)
        try:
            draws = own.send(answer)
        except StopIteration as end:
            result: DualCertificate = end.value
            return result


@pytest.mark.parametrize("num", [200, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "procedure"),
    [
        ("standard", lambda: certify(0.25, MANY)),
        ("dual", lambda: dual_certify((0.25, 0.5), 0.5, MANY)),
        ("planted: forgotten in the class's stage", lambda: dual_that_forgets_the_class(MANY)),
        ("planted: forgotten", lambda: certify(0.25, replace(MANY, num_reference=0))),
    ],
)
def test_false_certificates_for_the_reference_are_at_most_a_share_alpha(
    name: str, procedure: Certifies, num: int
) -> None:
    votes = Pairs(STAGES, seed=3)
    false = sum(drive(procedure(), votes).prediction != ABSTAIN for _ in range(num))
    print(f"{name}: {false:,} of {num:,} false at alpha {ALPHA:g}")
    assert (false > 0.5 * num) if "planted" in name else (false <= ALPHA * num)


def test_estimate_asks_the_reference_for_the_first_estimation_draws_alone() -> None:
    votes = Pairs(STAGES, seed=1)
    result = drive(dual_certify((0.25, 0.5), 0.5, SAMPLING), votes)
    asked = [(d.phase, d.start, d.num, any(map(is_paired, d.heads))) for d in votes.asked]
    stage = [(Phase.SELECTION, 0, 20, False), (Phase.ESTIMATION, 0, 20, True), (Phase.ESTIMATION, 20, 30, False)]
    assert asked == stage * 2
    assert result.class_stage is not None
    assert result.class_stage.counts_estimation.sum() == 50


def test_other_budgets_refuse_a_reference() -> None:
    randomized = replace(SAMPLING, num_reference=0, bound="randomized")
    for made in (
        standard_procedure("sequential", 0.5, SAMPLING, Rule(), ()),
        dual_procedure("grid", (0.25, 0.5), 0.5, randomized, Rule(), (0.1,)),
    ):
        with pytest.raises(ConfigError, match="for budget fixed and claim constant alone"):
            drive(made, lambda draws: {head: counts(0, draws.num) for head in draws.heads})
    with pytest.raises(ConfigError, match="needs the votes that it did not cast"):
        certificate(counts(0, 20), counts(0, 50), 0.5, SAMPLING)
    with pytest.raises(ConfigError, match=r"num_reference must lie in \[0, 50\], got 51"):
        replace(SAMPLING, num_reference=51)
