"""Two stages of sequential certification: paired with fixed budgets, and simulated false certificates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from core.errors import ConfigError
from core.procedures.confidence import certified_radius, clopper_pearson_lower
from core.procedures.dual import dual_certify
from core.procedures.ladder import final_alpha
from core.procedures.sequential import (
    beyond,
    certify_grid,
    certify_sequential,
    dual_certify_sequential,
    dual_procedure,
    second_targets,
    stage_order,
    standard_procedure,
)
from core.procedures.smoothing import certify
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    Answer,
    Bound,
    Draws,
    DualCertificate,
    Phase,
    Rule,
    Sampling,
    Stop,
)
from tests.helpers.lattice import (
    counts,
)
from tests.helpers.oracles import HalfSpace, axis, drive

SIGMAS = (0.25, 0.5, 1.0)
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


@dataclass
class PairedVotes:
    """A fixed sequence of votes per (head, sigma, phase), so that several procedures see the same draws."""

    votes: Mapping[tuple[str, float, Phase], NDArray[np.int64]]
    classes: Mapping[str, int]
    asked: list[Draws] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rng: np.random.Generator,
        heads: Mapping[str, tuple[float, int, int]],
        sigmas: Sequence[float],
        sampling: Sampling,
    ) -> "PairedVotes":
        """`heads`: the probability of the most likely class, that class, and how many there are."""
        votes = {}
        for head, (p, top, classes) in heads.items():
            for sigma in sigmas:
                for phase, num in (
                    (Phase.SELECTION, sampling.num_selection),
                    (Phase.ESTIMATION, sampling.num_estimation),
                ):
                    others = (top + rng.integers(1, classes, num)) % classes
                    votes[head, sigma, phase] = np.where(rng.random(num) < p, top, others)
        return cls(votes, {head: classes for head, (_, _, classes) in heads.items()})

    def first(self, head: str, sigma: float, phase: Phase, num: int, start: int = 0) -> NDArray[np.int64]:
        """Counts of the draws from `start` to `start + num`."""
        votes = self.votes[head, sigma, phase][start : start + num]
        assert len(votes) == num
        return np.bincount(votes, minlength=self.classes[head]).astype(np.int64)

    def __call__(self, draws: Draws) -> Answer:
        self.asked.append(draws)
        return {head: self.first(head, draws.sigma, draws.phase, draws.num, draws.start) for head in draws.heads}


@dataclass
class Pair:
    """One input's certificates by the three budgets on the same votes."""

    source: PairedVotes
    fixed: DualCertificate
    sequential: DualCertificate
    grid: DualCertificate
    asked: dict[str, list[Draws]]
    realistic: bool = True

    @property
    def shared(self) -> bool:
        return self.sequential.sigma_stage.top_class == SIGMAS.index(1.0)


PAIR_SAMPLING = Sampling(100, 10_000, 0.001)


def pair_of(seed: int, p_estimator: float, p_classifier: float, level: int, sampling: Sampling, rule: Rule) -> Pair:
    heads = {ESTIMATOR: (p_estimator, level, 3), CLASSIFIER: (p_classifier, seed % 10, 10)}
    source = PairedVotes.of(np.random.default_rng(seed), heads, SIGMAS, sampling)
    asked: dict[str, list[Draws]] = {}
    results = {}
    for name, procedure in (
        ("fixed", dual_certify(SIGMAS, 1.0, sampling)),
        ("sequential", dual_certify_sequential(SIGMAS, 1.0, sampling, rule)),
        ("grid", dual_certify_sequential(SIGMAS, 1.0, sampling, rule, GRID)),
    ):
        source.asked = asked[name] = []
        results[name] = drive(procedure, source)
    return Pair(source, results["fixed"], results["sequential"], results["grid"], asked)


@cache
def pairs(shared: bool) -> list[Pair]:
    """Inputs of realistic probabilities, and some around the point where the procedures start to abstain."""
    rng = np.random.default_rng(6)
    realistic = np.concatenate([rng.beta(3, 0.35, (75, 2)), rng.beta(2, 0.6, (75, 2))])
    undecided = rng.uniform(0.505, 0.55, (50, 2))
    made = []
    for seed, (p_e, p_c) in enumerate(np.concatenate([realistic, undecided]).tolist()):
        pair = pair_of(seed, p_e, p_c, 2 if shared else seed % 2, PAIR_SAMPLING, Rule())
        pair.realistic = seed < len(realistic)
        made.append(pair)
    return [pair for pair in made if pair.shared == shared]  # the selection draws may have chosen another level


BOTH = pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])


def full_radii(pair: Pair, second_alpha: float) -> tuple[float, float]:
    """What all draws certify: the first stage's radius at its whole alpha, the second one's at `second_alpha`."""
    stages = {ESTIMATOR: pair.sequential.sigma_stage, CLASSIFIER: pair.sequential.class_stage}
    radii = []
    selection = {head: stage.counts_selection for head, stage in stages.items() if stage}
    sigma = {head: stage.sigma for head, stage in stages.items() if stage}
    for head, alpha in zip(stage_order(selection, sigma), (PAIR_SAMPLING.alpha / 2, second_alpha), strict=True):
        votes = pair.source.first(head, sigma[head], Phase.ESTIMATION, PAIR_SAMPLING.num_estimation)
        top = int(selection[head].argmax())
        bound = clopper_pearson_lower(int(votes[top]), PAIR_SAMPLING.num_estimation, alpha)
        radii.append(float(certified_radius(bound, sigma[head])))
    return radii[0], radii[1]


@BOTH
def test_dual_certify_sequential_radius_lies_between_the_fixed_looks_at_its_share_and_the_first_stage(
    shared: bool,
) -> None:
    for pair in pairs(shared):
        half = PAIR_SAMPLING.alpha / 2
        first, second = full_radii(pair, final_alpha(half, half * Rule().early_share))
        radius = pair.sequential.radius
        assert min(first, second) <= radius <= first
        if radius > pair.fixed.radius:  # only an early claim may do that: what all of the draws show can be less
            stages = (pair.sequential.sigma_stage, pair.sequential.class_stage)
            assert any(stage is not None and stage.stop == Stop.REACHED for stage in stages)


@BOTH
def test_dual_certify_sequential_radius_is_almost_the_fixed_one(shared: bool) -> None:
    ratios = np.array(
        [pair.sequential.radius / pair.fixed.radius for pair in pairs(shared) if pair.fixed.radius > 0.05]
    )
    assert len(ratios) > 100
    assert ratios.min() >= 0.995
    assert 0.9995 < ratios.mean() < 1.0005
    # Smaller radii lose a larger share, some of them all: 0.9 alpha in place of alpha always costs something.
    lost = [pair.fixed.radius - pair.sequential.radius for pair in pairs(shared)]
    assert 1e-5 < max(lost) < 5e-3


@BOTH
def test_dual_certify_sequential_predictions_and_sigmas_equal_the_fixed_ones(shared: bool) -> None:
    certified = 0
    for pair in pairs(shared):
        for result in (pair.sequential, pair.grid):
            if not result.abstained and not pair.fixed.abstained:
                certified += 1
                assert (result.prediction, result.sigma) == (pair.fixed.prediction, pair.fixed.sigma)
    assert certified > 200


@BOTH
def test_dual_certify_sequential_draws_are_asked_for_once_and_no_more_than_both_stages_in_full(shared: bool) -> None:
    most = (PAIR_SAMPLING.num_selection + PAIR_SAMPLING.num_estimation) * (1 if shared else 2)
    for pair in pairs(shared):
        for name, result in (("fixed", pair.fixed), ("sequential", pair.sequential), ("grid", pair.grid)):
            asked: dict[tuple[float, Phase], int] = {}
            for draws in pair.asked[name]:
                assert draws.start == asked.get((draws.sigma, draws.phase), 0)
                asked[draws.sigma, draws.phase] = draws.start + draws.num
            assert sum(asked.values()) == result.num_draws <= most
        if not pair.fixed.sigma_stage.abstained:
            assert pair.fixed.num_draws == most


@BOTH
def test_dual_certify_sequential_votes_are_the_first_draws_of_each_stage(shared: bool) -> None:
    for pair in pairs(shared):
        for result in (pair.sequential, pair.grid):
            assert result.class_stage is not None
            for head, stage in ((ESTIMATOR, result.sigma_stage), (CLASSIFIER, result.class_stage)):
                expected = pair.source.first(head, stage.sigma, Phase.ESTIMATION, stage.num_estimation)
                assert stage.counts_estimation.tolist() == expected.tolist()


def test_dual_certify_sequential_apart_takes_little_more_than_half_of_the_draws() -> None:
    realistic = [pair for pair in pairs(False) if pair.realistic]
    ratio = np.mean([pair.sequential.num_draws / pair.fixed.num_draws for pair in realistic])
    assert ratio <= 0.6


@BOTH
def test_dual_certify_sequential_grid_level_is_almost_always_the_fixed_one_with_a_third_of_the_draws(
    shared: bool,
) -> None:
    realistic = [pair for pair in pairs(shared) if pair.realistic]
    same = [(pair.grid.radius > r) == (pair.fixed.radius > r) for pair in realistic for r in GRID]
    draws = sum(pair.grid.num_draws for pair in realistic) / sum(pair.fixed.num_draws for pair in realistic)
    assert np.mean(same) >= 0.99
    assert draws <= (0.5 if shared else 0.3)


def test_dual_certify_shared_equals_the_two_stages_apart() -> None:
    sampling = Sampling(100, 1000, 0.01)
    for seed in range(20):
        p_e, p_c = np.random.default_rng(seed).uniform(0.6, 1, 2)
        pair = pair_of(seed, p_e, p_c, 2, sampling, Rule())
        half = Sampling(100, 1000, 0.005)
        assert pair.fixed.sigma_stage == drive(certify(1.0, half, ESTIMATOR), pair.source)
        assert pair.fixed.class_stage == drive(certify(1.0, half, CLASSIFIER), pair.source)
        assert (pair.fixed.num_shared, pair.fixed.num_draws) == (1100, 1100)
        assert [d.heads for d in pair.asked["fixed"]] == [(ESTIMATOR, CLASSIFIER)] * 2


def test_dual_certify_sequential_first_stage_abstains_second_is_skipped() -> None:
    pair = pair_of(0, 0.5, 0.99, 0, Sampling(100, 1000, 0.01), Rule())
    result = pair.sequential
    assert (result.prediction, result.sigma, result.bounded_by, result.radius) == (ABSTAIN, None, Bound.NONE, 0.0)
    assert result.class_stage is not None
    assert (result.class_stage.stop, result.class_stage.num_estimation) == (Stop.SKIPPED, 0)
    pair = pair_of(0, 0.99, 0.4, 0, Sampling(100, 1000, 0.01), Rule())
    assert pair.sequential.sigma_stage.stop == Stop.SKIPPED
    assert (pair.sequential.prediction, pair.sequential.sigma) == (ABSTAIN, None)


def test_dual_certify_sequential_splits_alpha_over_the_stages_and_the_looks() -> None:
    pair = pair_of(1, 0.99, 0.9, 0, Sampling(100, 1000, 0.01), Rule())
    result = pair.sequential
    assert result.class_stage is not None
    assert (result.alpha, result.alpha_sigma, result.alpha_class) == (0.01, 0.005, 0.005)
    # The classifier looks tighter (sigma 0.25): all of its alpha in one look; the estimator only shows its radius.
    assert (result.class_stage.alpha_early, result.class_stage.stop) == (0.0, Stop.FULL)
    assert (result.sigma_stage.alpha_early, result.sigma_stage.stop) == (0.0005, Stop.REACHED)
    assert result.radius == result.radius_sigma == result.radius_class == result.sigma_stage.target
    assert result.bounded_by == Bound.CLASS


def test_dual_certify_sequential_equal_radii_are_bounded_by_the_stage_that_went_first() -> None:
    def both(draws: Draws) -> Answer:
        right = {ESTIMATOR: draws.num * 4 // 5, CLASSIFIER: draws.num}  # the estimator is the tighter one
        return {head: counts(draws.num - right[head], right[head]) for head in draws.heads}

    result = drive(dual_certify_sequential((0.25, 1.0), 1.0, Sampling(100, 1000, 0.01), Rule()), both)
    assert result.radius == result.radius_sigma == result.radius_class > 0.0
    assert result.bounded_by == Bound.SIGMA


def test_stage_order_tie_starts_with_the_estimator() -> None:
    votes = {CLASSIFIER: counts(1, 9), ESTIMATOR: counts(9, 1)}
    assert stage_order(votes, {CLASSIFIER: 0.5, ESTIMATOR: 0.5}) == (ESTIMATOR, CLASSIFIER)
    assert stage_order(votes, {CLASSIFIER: 0.25, ESTIMATOR: 0.5}) == (CLASSIFIER, ESTIMATOR)
    nothing = {CLASSIFIER: counts(0, 0), ESTIMATOR: counts(9, 1)}
    assert stage_order(nothing, {CLASSIFIER: 0.5, ESTIMATOR: 0.5}) == (CLASSIFIER, ESTIMATOR)


def test_second_targets_is_the_grid_up_to_the_first_radius_or_the_radius() -> None:
    assert second_targets((), 0.3) == (0.3,)
    assert second_targets((0.0, 0.25, 0.5), beyond([0.25])[0]) == beyond((0.0, 0.25))


@pytest.mark.parametrize("radii", [(), (0.5, 0.25), (0.25, 0.25), (-0.25, 0.5)])
def test_procedures_grid_that_is_not_ascending_raises(radii: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending"):
        standard_procedure("grid", 0.5, PAIR_SAMPLING, Rule(), radii)
    with pytest.raises(ConfigError, match="ascending"):
        dual_procedure("grid", SIGMAS, 1.0, PAIR_SAMPLING, Rule(), radii)


def test_procedures_run_the_budget_that_is_named() -> None:
    sampling, rng = Sampling(20, 500, 0.01), np.random.default_rng(7)
    source = PairedVotes.of(rng, {ESTIMATOR: (0.95, 0, 3), CLASSIFIER: (0.9, 1, 3)}, SIGMAS, sampling)
    rule = Rule(50)
    for budget, radii, one, two in (
        ("fixed", (), certify(0.5, sampling), dual_certify(SIGMAS, 1.0, sampling)),
        (
            "sequential",
            (),
            certify_sequential(0.5, sampling, rule),
            dual_certify_sequential(SIGMAS, 1.0, sampling, rule),
        ),
        (
            "grid",
            GRID,
            certify_grid(0.5, GRID, sampling, rule),
            dual_certify_sequential(SIGMAS, 1.0, sampling, rule, GRID),
        ),
    ):
        assert drive(standard_procedure(budget, 0.5, sampling, rule, radii), source) == drive(one, source)  # type: ignore[arg-type]
        assert drive(dual_procedure(budget, SIGMAS, 1.0, sampling, rule, radii), source) == drive(two, source)  # type: ignore[arg-type]


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
