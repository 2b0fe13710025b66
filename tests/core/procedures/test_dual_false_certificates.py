"""How often sequential Dual RS certifies falsely, simulated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from core.procedures.confidence import certified_radius, clopper_pearson_lower
from core.procedures.sequential import beyond, certify_sequential, dual_certify_sequential
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, ESTIMATOR, Answer, Draws, Rule, Sampling, Stop
from tests.core.procedures.test_dual_sequential import PairedVotes
from tests.helpers.lattice import counts
from tests.helpers.oracles import HalfSpace, axis, drive


@dataclass
class Simulated:
    """Dual half-spaces: the router chooses sigma 0 where a.x >= 0; the expert of sigma 0 says 1 where b.x >= s, the
    other one the opposite. Exact radius min(|a.x|, |b.x - s|) at any noise level.

    With a == b the votes of both heads on one copy depend on each other as much as they can.
    """

    router: HalfSpace
    expert: HalfSpace
    image: NDArray[np.float64]
    sigmas: tuple[float, float]
    rng: np.random.Generator

    def margin(self, half_space: HalfSpace) -> float:
        return float(half_space.normal.double().numpy() @ self.image) - half_space.threshold

    def __call__(self, draws: Draws) -> Answer:
        along_router = self.rng.standard_normal(draws.num) * draws.sigma
        same = bool((self.router.normal == self.expert.normal).all())
        along_expert = along_router if same else self.rng.standard_normal(draws.num) * draws.sigma
        second = int((self.margin(self.router) + along_router < 0).sum())
        ones = int((self.margin(self.expert) + along_expert >= 0).sum())
        if draws.sigma != self.sigmas[0]:
            ones = draws.num - ones
        votes = {ESTIMATOR: counts(draws.num - second, second), CLASSIFIER: counts(draws.num - ones, ones)}
        return {head: votes[head] for head in draws.heads}


def false_certificates(
    num: int, radii: Sequence[float], shared: bool, margins: tuple[float, float], seed: int
) -> tuple[int, float]:
    """How many of `num` certificates are false, and the share of alpha that each of them could err with.

    The radius is the smaller of two, so it exceeds the truth only if the stage with the smaller true radius errs,
    whatever the other one does.
    """
    sampling, rule = Sampling(5, 300, 0.1), Rule(30)
    sigmas, sigma_e = ((1.0, 0.5), 1.0) if shared else ((0.5, 0.25), 1.0)
    image = np.array(margins)
    normals = (axis(2, 0), axis(2, 0 if shared else 1))
    threshold = margins[0] - margins[1] if shared else 0.0
    source = Simulated(
        HalfSpace(normals[0], 0.0), HalfSpace(normals[1], threshold), image, sigmas, np.random.default_rng(seed)
    )
    wrong, level = 0, 0.0
    for _ in range(num):
        result = drive(dual_certify_sequential(sigmas, sigma_e, sampling, rule, radii), source)
        level = max(result.alpha_sigma, result.alpha_class)
        if not result.abstained:
            right = 1 if result.sigma == sigmas[0] else 0
            wrong += result.prediction != right or result.radius > min(margins)
    return wrong, level


def just_below(radius: float) -> float:
    return radius * (1 - 1e-9)


def peak(sigma: float, successes: int, alpha: float) -> float:
    """A true radius just below what so many of 300 votes certify, where a false certificate is most likely."""
    return just_below(float(certified_radius(clopper_pearson_lower(successes, 300, alpha), sigma)))


SIMULATED = [
    pytest.param((), False, (peak(1.0, 230, 0.05), 0.9), id="sequential, apart, estimator bounds"),
    pytest.param((), False, (1.5, peak(0.5, 250, 0.05)), id="sequential, apart, classifier bounds"),
    pytest.param((), True, (peak(1.0, 230, 0.05), 0.9), id="sequential, shared, estimator bounds"),
    pytest.param((), True, (0.9, peak(1.0, 230, 0.045)), id="sequential, shared, classifier bounds"),
    pytest.param((0.25, 0.5), False, (just_below(beyond([0.25])[0]), 0.7), id="grid, apart"),
    pytest.param((0.25, 0.5), True, (0.7, just_below(beyond([0.5])[0])), id="grid, shared"),
]


@pytest.mark.parametrize(("radii", "shared", "margins"), SIMULATED)
def test_dual_certify_sequential_false_certificates_of_2000_are_at_most_the_share_of_a_stage(
    radii: tuple[float, ...], shared: bool, margins: tuple[float, float]
) -> None:
    wrong, level = false_certificates(2000, radii, shared, margins, seed=8)
    assert level == 0.05
    assert stats.binom.sf(wrong - 1, 2000, level) > 1e-4, f"{wrong} of 2000 are false"
    assert wrong > 2000 * level / 3, f"only {wrong} of 2000 are false: this case can hardly fail"


@pytest.mark.slow
@pytest.mark.parametrize(("radii", "shared", "margins"), SIMULATED)
def test_dual_certify_sequential_false_certificates_of_20000_are_at_most_the_share_of_a_stage(
    radii: tuple[float, ...], shared: bool, margins: tuple[float, float]
) -> None:
    wrong, level = false_certificates(20_000, radii, shared, margins, seed=9)
    assert stats.binom.sf(wrong - 1, 20_000, level) > 1e-4, f"{wrong} of 20000 are false"


@pytest.mark.parametrize("p", [0.4, 0.52, 0.56, 0.7, 0.99])
def test_certify_sequential_equals_certify_unless_it_can_only_abstain(p: float) -> None:
    sampling, rng = Sampling(20, 1000, 0.01), np.random.default_rng(5)
    for _ in range(20):
        source = PairedVotes.of(rng, {CLASSIFIER: (p, 1, 3)}, (0.5,), sampling)
        fixed = drive(certify(0.5, sampling), source)
        result = drive(certify_sequential(0.5, sampling, Rule(50)), source)
        assert (result.prediction, result.radius) == (fixed.prediction, fixed.radius)
        assert result.num_draws <= fixed.num_draws
        if not fixed.abstained:
            assert result == fixed
        elif p == 0.4:
            assert (result.stop, result.alpha_early) == (Stop.FUTILE, 0.0)
