import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from core.confidence import certified_radius, clopper_pearson_lower, log_e_value, probability_of_radius
from core.dual import dual_certify
from core.errors import ConfigError
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    Answer,
    Bound,
    Certificate,
    Draws,
    DualCertificate,
    Phase,
    Rule,
    Sampling,
    Stop,
)
from core.sequential import (
    beyond,
    certify_grid,
    certify_sequential,
    climb,
    conclude,
    dual_certify_sequential,
    dual_procedure,
    final_alpha,
    second_targets,
    stage_order,
    standard_procedure,
)
from core.smoothing import certify
from tests.lattice import (
    JUST_BELOW,
    Decisions,
    Floats,
    Outcomes,
    Setting,
    counts,
    crossing,
    decisions,
    first_step,
    looks,
    outcomes,
    walk,
)
from tests.oracles import HalfSpace, axis, drive

SLACK = 1e-6
"""What `core.sequential` adds to the log threshold; here it also bounds the error of `log_e_value`."""


# --- The e-process ----------------------------------------------------------------------------------------------------


def exact_log_e_value(successes: int, num: int, p0: float) -> float:
    """The mixture of likelihood ratios by quadrature at 40 digits; shares no formula with `log_e_value`.

    With p = sin(t)^2 the Beta(1/2, 1/2) distribution, truncated to (p0, 1], is the uniform one of t.
    """
    with mpmath.workdps(40):
        q = mpmath.mpf(p0)
        low, high = mpmath.asin(mpmath.sqrt(q)), mpmath.pi / 2
        peak, width = mpmath.asin(mpmath.sqrt(mpmath.mpf(successes) / num)), 1 / mpmath.sqrt(4 * num)
        cuts = [low, *(t for j in (-24, -8, -2, 0, 2, 8, 24) if low < (t := peak + j * width) < high), high]

        def ratio(t: mpmath.mpf) -> mpmath.mpf:
            return (mpmath.sin(t) ** 2 / q) ** successes * (mpmath.cos(t) ** 2 / (1 - q)) ** (num - successes)

        return float(mpmath.log(mpmath.quad(ratio, cuts) / (high - low)))


@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.977, 0.9999])
@pytest.mark.parametrize(("successes", "num"), [(0, 1), (1, 1), (2, 5), (5, 5), (30, 40), (40, 40), (99, 100)])
def test_log_e_value_equals_quadrature_at_forty_digits(successes: int, num: int, p0: float) -> None:
    assert math.isclose(float(log_e_value(successes, num, p0)), exact_log_e_value(successes, num, p0), abs_tol=1e-12)


@pytest.mark.parametrize("p0", [0.5 + 1e-9, 0.9, 0.98])
@pytest.mark.parametrize("num", [1000, 100_000, 1_000_000])
def test_log_e_value_near_its_threshold_errs_by_less_than_the_slack(num: int, p0: float) -> None:
    successes = int(smallest_crossing(p0, np.array([num]), 1e-4)[0])
    assert successes < num
    error = abs(float(log_e_value(successes, num, p0)) - exact_log_e_value(successes, num, p0))
    assert error < SLACK / 10, f"off by {error:.2e}"


@pytest.mark.parametrize("p0", [0.5, 0.75, 0.9, 0.99, 0.9999])
def test_log_e_value_starts_at_one_and_is_a_martingale_at_p0_and_a_supermartingale_below(p0: float) -> None:
    assert float(log_e_value(0, 0, p0)) == 0.0
    for num in (0, 1, 2, 10, 99, 500):
        s = np.arange(num + 1)
        now = np.exp(log_e_value(s, num, p0))
        failed, succeeded = np.exp(log_e_value(s, num + 1, p0)), np.exp(log_e_value(s + 1, num + 1, p0))
        assert np.all(now[s <= num * p0] <= 1.0)
        # Far below p0 the tail of the Beta distribution loses its digits, and then all of it, to underflow.
        exact = special.betaincc(0.5 + s, 1.5 + num - s, p0) > 1e-290
        assert exact[s >= num * p0].all()
        np.testing.assert_allclose((p0 * succeeded + (1 - p0) * failed)[exact], now[exact], rtol=1e-9)
        for p in (0.0, 0.3, 0.5 * p0, 0.99 * p0):
            assert np.all((p * succeeded + (1 - p) * failed)[exact] < now[exact])


@given(num=st.integers(1, 5000), share=st.floats(0, 1), p0=st.floats(0.01, 0.9999))
def test_log_e_value_rises_with_the_successes(num: int, share: float, p0: float) -> None:
    successes = int(share * (num - 1))
    low, high = log_e_value(np.array([successes, successes + 1]), num, p0)
    assert low < high or (low == high == -math.inf)


@pytest.mark.parametrize("alpha", [0.4, 0.01, 0.00005])
def test_log_e_value_that_crosses_at_p0_crosses_at_every_smaller_p0(alpha: float) -> None:
    """So a target may depend on the votes, as it does where both stages read the same copies: what crosses at a target
    that is not true crosses at the true probability too, which has its failure probability set aside."""
    nums = np.unique(np.geomspace(1, 20_000, 60).astype(np.int64))
    p0s = np.concatenate([np.linspace(0.5, 0.999, 250), 1 - np.geomspace(1e-3, 1e-9, 50)[1:]])
    needed = np.array([smallest_crossing(float(p0), nums, alpha) for p0 in p0s])
    assert np.all(np.diff(needed, axis=0) >= 0)
    assert np.all((needed[0] < needed[-1])[nums > 100])


def smallest_crossing(p0: float, nums: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """For each number of draws the fewest successes that show p > p0; one more than the draws where none do."""
    low, high = np.full_like(nums, -1), nums + 1
    while np.any(high - low > 1):
        middle = (low + high) // 2
        crosses = log_e_value(middle, nums, p0) >= math.log(1 / alpha) + SLACK
        low, high = np.where(crosses, low, middle), np.where(crosses, middle, high)
    return high


@cache
def crossing_probability(p0: float, alpha: float, most: int, every: int, p: float) -> float:
    at = looks(most, every)
    needed = dict(zip(at, smallest_crossing(p0, np.array(at), alpha), strict=True))
    return crossing(p, at, lambda successes, num: successes >= needed[num])


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.00005])
@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.9332, 0.9772, 0.99])
def test_log_e_value_crossing_probability_by_dynamic_programming_is_at_most_alpha(
    p0: float, alpha: float, every: int
) -> None:
    found = crossing_probability(p0, alpha, 2000, every, p0)
    assert found <= alpha, f"crosses with {found / alpha:.3f} alpha"
    assert crossing_probability(p0, alpha, 2000, every, 0.99 * p0) < found


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.00005])
def test_log_e_value_crossing_probability_at_every_draw_is_above_half_of_alpha_somewhere(alpha: float) -> None:
    found = max(crossing_probability(p0, alpha, 2000, 1, p0) for p0 in (0.5, 0.8413, 0.9332))
    assert found > 0.75 * alpha, f"crosses with {found / alpha:.3f} alpha"  # a bug of 2 alpha would exceed alpha


@given(radius=st.floats(1e-9, 6), sigma=st.floats(0.05, 2))
@settings(deadline=None)
def test_probability_of_radius_against_forty_digits_is_never_below(radius: float, sigma: float) -> None:
    with mpmath.workdps(40):
        exact = mpmath.ncdf(mpmath.mpf(radius) / mpmath.mpf(sigma))
        p = mpmath.mpf(float(probability_of_radius(radius, sigma)))
        assert exact < p < exact * (1 + mpmath.mpf(10) ** -12)


# --- One stage: exact probabilities of a false claim ------------------------------------------------------------------

QUARTERS = beyond((0.0, 0.25, 0.5, 0.75, 1.0))
SETTINGS = {
    "no target": Setting(0.5, (), Sampling(10, 400, 0.1), Rule(20)),
    "low target": Setting(0.5, (0.3,), Sampling(10, 400, 0.1), Rule(20)),
    "high target": Setting(0.5, (0.8,), Sampling(10, 400, 0.05), Rule(20)),
    "few looks": Setting(0.5, (0.5,), Sampling(10, 1000, 0.1), Rule(100)),
    "odd looks": Setting(1.0, (0.5,), Sampling(10, 410, 0.1), Rule(60)),
    "large share": Setting(0.5, (0.5,), Sampling(10, 400, 0.1), Rule(20, early_share=0.4)),
    "grid": Setting(0.5, QUARTERS, Sampling(10, 400, 0.1), Rule(20, futility_z=2.33), grid=True),
    "patient grid": Setting(0.5, QUARTERS, Sampling(10, 400, 0.1), Rule(20, futility_z=math.inf), grid=True),
    "hasty grid": Setting(0.5, QUARTERS, Sampling(10, 400, 0.1), Rule(20, futility_z=1.0), grid=True),
    "fine grid": Setting(
        0.5, beyond([i / 10 for i in range(11)]), Sampling(10, 1000, 0.05), Rule(100, futility_z=math.inf), grid=True
    ),
}
GRIDS = [name for name, setting in SETTINGS.items() if setting.grid]


@cache
def decided(name: str) -> Decisions:
    return decisions(SETTINGS[name])


@cache
def known(name: str) -> Outcomes:
    return outcomes(SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_climb_false_claim_probability_by_dynamic_programming_is_at_most_alpha(name: str) -> None:
    alpha = SETTINGS[name].sampling.alpha
    worst, p = known(name).worst_false_claim()
    assert worst <= alpha, f"false with {worst / alpha:.4f} alpha at p = {p}"
    assert worst > 0.45 * alpha, f"false with {worst / alpha:.4f} alpha at most: this setting can hardly fail"


@pytest.mark.parametrize(
    ("name", "share"), [("no target", 0.999), ("low target", 0.9), ("high target", 0.9), ("patient grid", 0.85)]
)
def test_climb_false_claim_probability_by_dynamic_programming_is_close_to_alpha(name: str, share: float) -> None:
    alpha = SETTINGS[name].sampling.alpha
    worst, _ = known(name).worst_false_claim()
    assert worst > share * alpha, f"false with {worst / alpha:.4f} alpha at most"  # 2 alpha would not stay below alpha


@pytest.mark.parametrize("name", ["no target", "low target", "high target", "grid", "hasty grid"])
@pytest.mark.parametrize("factor", [0.02, 3.0])
def test_conclude_at_another_alpha_false_claim_probability_is_at_most_that_alpha(name: str, factor: float) -> None:
    alpha = factor * SETTINGS[name].sampling.alpha
    worst, p = known(name).concluded_at(alpha).worst_false_claim()
    assert worst <= alpha, f"false with {worst / alpha:.4f} of this alpha at p = {p}"
    assert worst > 0


def test_conclude_at_the_same_alpha_gives_the_same_radii() -> None:
    for name, setting in SETTINGS.items():
        again = known(name).concluded_at(setting.sampling.alpha).radius
        for num, radius in known(name).radius.items():
            np.testing.assert_array_equal(again[num], radius)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.targets])
def test_climb_early_claim_of_the_last_target_has_at_most_the_early_share(name: str) -> None:
    setting = SETTINGS[name]
    p = float(special.ndtr(setting.targets[-1] / setting.sigma)) * JUST_BELOW
    early = known(name).expected(p, lambda num: known(name).reached[num].astype(np.float64))
    assert 0 < early <= setting.sampling.alpha * setting.rule.early_share


def random_path(rng: np.random.Generator, setting: Setting) -> NDArray[np.bool_]:
    """A success or not for each draw, at a probability close to what is decided, drifting half-way."""
    near = rng.choice([0.5, *special.ndtr(np.array(setting.targets) / setting.sigma)])
    most = setting.sampling.num_estimation
    p = np.clip(near + rng.normal(0, 0.05, 2), 0.3, 0.999)
    path: NDArray[np.bool_] = rng.random(most) < np.repeat(p, [most // 2, most - most // 2])
    return path


def on_path(setting: Setting, path: NDArray[np.bool_], rule: Rule | None = None) -> Certificate:
    """The real `climb`, from its first look to its last, on given votes."""

    def votes(draws: Draws) -> Answer:
        successes = int(path[draws.start : draws.start + draws.num].sum())
        return {CLASSIFIER: counts(draws.num - successes, successes)}

    selection = counts(0, setting.sampling.num_selection)
    rule = rule or setting.rule
    procedure = climb(setting.sigma, setting.targets, selection, setting.sampling, rule, CLASSIFIER, grid=setting.grid)
    return drive(procedure, votes)


@pytest.mark.parametrize("name", SETTINGS)
def test_climb_on_random_paths_decides_as_the_lattice(name: str) -> None:
    setting, rng = SETTINGS[name], np.random.default_rng(1)
    stops = set()
    for _ in range(60):
        path = random_path(rng, setting)
        result = on_path(setting, path)
        for num, row in decided(name).items():
            expected = row[int(path[:num].sum())]
            if expected is not None:
                break
        assert result == expected
        stops.add(result.stop)
        assert result == conclude(
            setting.sigma,
            setting.targets,
            result.counts_selection,
            result.counts_estimation,
            result.num_estimation,
            setting.sampling,
            setting.rule.early_share,
            result.stop,
            grid=setting.grid,
        )
    assert len(stops) > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_climb_spends_at_most_alpha(name: str) -> None:
    setting = SETTINGS[name]
    result = on_path(setting, np.ones(setting.sampling.num_estimation, np.bool_))
    early = setting.rule.early_share if setting.targets else 0.0
    assert result.alpha_early == setting.sampling.alpha * early
    assert result.alpha_early + final_alpha(setting.sampling.alpha, result.alpha_early) <= result.alpha
    assert result.alpha == setting.sampling.alpha


@given(alpha=st.floats(1e-12, 0.999), share=st.floats(1e-6, 0.999))
def test_final_alpha_and_the_early_share_never_exceed_alpha(alpha: float, share: float) -> None:
    left = final_alpha(alpha, alpha * share)
    with mpmath.workdps(60):
        assert mpmath.mpf(alpha * share) + mpmath.mpf(left) <= mpmath.mpf(alpha)
    assert left > (1 - share) * alpha * (1 - 1e-9)
    assert final_alpha(alpha, 0.0) == alpha


def shown_by_hand(setting: Setting, path: NDArray[np.bool_], num: int) -> list[bool]:
    """Which targets the first `num` votes show, each by itself: by the e-process, or by the bound at the last draw."""
    successes, alpha = int(path[:num].sum()), setting.sampling.alpha
    early = alpha * setting.rule.early_share
    p0s = [float(special.ndtr(target / setting.sigma)) for target in setting.targets]
    shown = [bool(log_e_value(successes, num, p0) >= math.log(1 / early)) for p0 in p0s]
    if num == setting.sampling.num_estimation:
        bound = float(clopper_pearson_lower(successes, num, alpha - early))
        shown = [early_claim or bound >= p0 for early_claim, p0 in zip(shown, p0s, strict=True)]
    return shown


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("z", [0.5, 2.33, math.inf])
def test_climb_grid_radius_is_a_target_and_everything_below_is_shown_by_the_last_votes(name: str, z: float) -> None:
    setting, rng = SETTINGS[name], np.random.default_rng(2)
    rule = Rule(setting.rule.look_every, setting.rule.early_share, z)
    for _ in range(60):
        path = random_path(rng, setting)
        result = on_path(setting, path, rule)
        level = (0.0, *setting.targets).index(result.radius)
        shown = shown_by_hand(setting, path, result.num_estimation)
        assert all(shown[:level])
        assert (result.prediction == ABSTAIN) == (level == 0)
        assert result.target == (result.radius if level else None)
        if result.stop == Stop.FULL:
            assert not all(shown[: level + 1])  # and it is the highest


@pytest.mark.parametrize("name", GRIDS)
def test_climb_grid_without_predictive_futility_is_never_below_the_fixed_look(name: str) -> None:
    setting, rng = SETTINGS[name], np.random.default_rng(3)
    most, alpha = setting.sampling.num_estimation, setting.sampling.alpha
    rule = Rule(setting.rule.look_every, setting.rule.early_share, math.inf)
    stops = set()
    for _ in range(100):
        path = random_path(rng, setting)
        result = on_path(setting, path, rule)
        bound = clopper_pearson_lower(int(path.sum()), most, 0.9 * alpha)
        fixed = float(certified_radius(bound, setting.sigma))
        assert result.radius >= max([0.0, *(target for target in setting.targets if target <= fixed)])
        if result.stop == Stop.FULL:
            shown = shown_by_hand(setting, path, most)
            assert result.radius == (0.0, *setting.targets)[[*shown, False].index(False)]
        stops.add(result.stop)
    assert stops >= {Stop.FULL, Stop.FUTILE}


@pytest.mark.parametrize("name", ["no target", "low target", "few looks", "patient grid", "fine grid"])
def test_climb_is_futile_exactly_where_nothing_more_can_be_certified(name: str) -> None:
    """Over every state that can occur: what all of the draws certify if all that are left agree."""
    setting = SETTINGS[name]
    most = setting.sampling.num_estimation
    last, futile, went_on = decided(name)[most], 0, 0
    for num, row in decided(name).items():
        for successes in range(num + 1) if num < most else ():
            at_best = last[successes + most - num] or first_step(setting, setting.rule, successes + most - num, most)
            assert at_best is not None
            here = row[successes]
            if here is not None and here.stop == Stop.FUTILE:
                futile += 1
                assert at_best.radius <= here.radius
            elif here is None and not setting.grid:  # went on (or cannot occur)
                went_on += at_best.radius > 0.0
                assert at_best.radius > 0.0 or first_step(setting, setting.rule, successes, num) is not None
    assert futile > 10
    assert went_on > 10 or setting.grid


@pytest.mark.parametrize("p", [0.55, 0.7, 0.85, 0.93, 0.98])
def test_climb_grid_giving_up_sooner_costs_radius_on_average_and_saves_draws(p: float) -> None:
    means = []
    for name in ("hasty grid", "grid", "patient grid"):
        radii = known(name).radius
        means.append((known(name).expected(p, radii.__getitem__), known(name).mean_draws(p)))
    radius, draws = zip(*means, strict=True)
    assert radius[0] <= radius[1] <= radius[2]
    assert draws[0] < draws[1] <= draws[2]
    assert radius[1] > 0.9 * radius[2]


@pytest.mark.parametrize("name", ["low target", "high target", "few looks", "large share"])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.8, 0.95, 1.0])
def test_climb_one_target_certifies_what_the_last_look_does_up_to_the_target(name: str, p: float) -> None:
    setting, rng = SETTINGS[name], np.random.default_rng(4)
    sampling, target = setting.sampling, setting.targets[0]
    for _ in range(20):
        path = rng.random(sampling.num_estimation) < p
        result = on_path(setting, path)
        left = final_alpha(sampling.alpha, sampling.alpha * setting.rule.early_share)
        bound = clopper_pearson_lower(int(path.sum()), sampling.num_estimation, left)
        fixed = min(target, float(certified_radius(bound, setting.sigma)))
        assert result.radius == (target if result.stop == Stop.REACHED else fixed)
        assert result.radius >= fixed or result.stop == Stop.REACHED
        assert result.target == target
        assert (result.radius == 0.0) == (result.prediction == ABSTAIN)


def test_climb_looks_at_the_votes_every_so_many_draws_and_at_the_last() -> None:
    asked: list[Draws] = []

    def votes(draws: Draws) -> Answer:
        asked.append(draws)
        return {CLASSIFIER: counts(draws.num // 5, draws.num - draws.num // 5)}

    drive(climb(0.5, (0.6,), counts(1, 9), Sampling(10, 250, 0.01), Rule(100), CLASSIFIER), votes)
    assert [(d.start, d.num) for d in asked] == [(0, 100), (100, 100), (200, 50)]
    assert {(d.sigma, d.heads, d.phase) for d in asked} == {(0.5, (CLASSIFIER,), Phase.ESTIMATION)}


def test_climb_target_whose_probability_rounds_to_one_is_never_shown() -> None:
    setting = Setting(0.01, (0.5,), Sampling(10, 1000, 0.1), Rule(100))
    result = on_path(setting, np.ones(1000, np.bool_))
    assert (result.stop, result.num_estimation) == (Stop.FULL, 1000)
    assert 0 < result.radius < 0.5


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


# --- Two stages -------------------------------------------------------------------------------------------------------

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


# --- The lattice itself -----------------------------------------------------------------------------------------------


def test_walk_without_stops_is_the_binomial_distribution() -> None:
    (num, mass), *rest = reversed(list(walk(0.3, looks(50, 7), lambda n: np.zeros(n + 1, np.bool_))))
    assert num == 50
    np.testing.assert_allclose(mass, stats.binom.pmf(np.arange(51), 50, 0.3), atol=1e-14)
    assert all(earlier.sum() == 0 for _, earlier in rest)


def test_crossing_of_the_first_success_is_geometric() -> None:
    assert math.isclose(crossing(0.01, looks(100, 1), lambda s, n: s >= 1), 1 - 0.99**100, rel_tol=1e-12)


def test_suspects_peak_is_not_missed_by_a_fine_grid() -> None:
    worst, _ = known("low target").worst_false_claim()
    grid: Floats = np.linspace(0.5, 0.999, 400)
    assert max(known("low target").false_claim(float(p)) for p in grid) <= worst
    assert 50 < len(known("low target").suspects()) < 400
