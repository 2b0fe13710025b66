"""Two stages of sequential certification: paired with fixed budgets, and simulated false certificates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import ConfigError
from core.law import GAUSSIAN
from core.procedures.confidence import certified_radius, clopper_pearson_lower
from core.procedures.dual import dual_certify
from core.procedures.ladder import final_alpha
from core.procedures.sequential import (
    beyond,
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
from tests.helpers.oracles import drive

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
    for head, alpha in zip(
        stage_order(selection, sigma, GAUSSIAN), (PAIR_SAMPLING.alpha / 2, second_alpha), strict=True
    ):
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
    assert (result.class_stage.prediction, result.class_stage.radius, result.p_lower) == (ABSTAIN, 0.0, 0.0)
    assert result.counts_estimation.tolist() == [0] * 10
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
    assert stage_order(votes, {CLASSIFIER: 0.5, ESTIMATOR: 0.5}, GAUSSIAN) == (ESTIMATOR, CLASSIFIER)
    assert stage_order(votes, {CLASSIFIER: 0.25, ESTIMATOR: 0.5}, GAUSSIAN) == (CLASSIFIER, ESTIMATOR)
    nothing = {CLASSIFIER: counts(0, 0), ESTIMATOR: counts(9, 1)}
    assert stage_order(nothing, {CLASSIFIER: 0.5, ESTIMATOR: 0.5}, GAUSSIAN) == (CLASSIFIER, ESTIMATOR)


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
            certify_sequential(0.5, sampling, rule, GRID),
            dual_certify_sequential(SIGMAS, 1.0, sampling, rule, GRID),
        ),
    ):
        assert drive(standard_procedure(budget, 0.5, sampling, rule, radii), source) == drive(one, source)  # type: ignore[arg-type]
        assert drive(dual_procedure(budget, SIGMAS, 1.0, sampling, rule, radii), source) == drive(two, source)  # type: ignore[arg-type]
