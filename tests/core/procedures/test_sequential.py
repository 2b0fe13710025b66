"""One stage of sequential certification: exact probabilities of a false claim, on the lattice of votes."""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from core.procedures.confidence import certified_radius, clopper_pearson_lower, log_e_value
from core.procedures.ladder import final_alpha
from core.procedures.sequential import beyond, climb, conclude
from core.records import ABSTAIN, CLASSIFIER, Answer, Certificate, Draws, Phase, Rule, Sampling, Stop
from tests.helpers.lattice import (
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
from tests.helpers.oracles import drive

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
        assert result.p_lower == pytest.approx(special.ndtr(result.radius / setting.sigma) if level else 0.0, rel=1e-12)
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


@pytest.mark.parametrize("z", [1.0, 2.33])
@pytest.mark.parametrize("num", [20, 100, 300])
def test_climb_grid_gives_up_where_the_beta_binomial_of_the_votes_to_come_lies_z_deviations_below(
    num: int, z: float
) -> None:
    """Against the exact moments under Jeffreys' posterior, which the normal approximation meets to within 2%."""
    setting, most = SETTINGS["grid"], 400
    alpha = setting.sampling.alpha
    bounds = stats.beta.ppf(0.9 * alpha, np.arange(1, most + 1), most - np.arange(1, most + 1) + 1)
    seen = {True: 0, False: 0}
    for k in range(num + 1):
        early = [
            float(log_e_value(k, num, special.ndtr(target / 0.5))) >= math.log(10 / alpha) for target in setting.targets
        ]
        if all(early):
            continue
        target = setting.targets[early.index(False)]
        missing = 1 + int(np.searchsorted(bounds, stats.norm.cdf(target / 0.5))) - k
        to_come = stats.betabinom(most - num, k + 0.5, num - k + 0.5)
        distance = (missing - to_come.mean()) / to_come.std()
        if missing <= most - num and abs(distance - z) > 0.02 * z + 0.01:
            result = first_step(setting, Rule(20, futility_z=z), k, num)
            assert (result is not None and result.stop == Stop.UNLIKELY) == (distance > z)
            seen[distance > z] += 1
    assert min(seen.values()) > 2


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


@pytest.mark.parametrize(("margin", "shown"), [(-1e-9, False), (0.9e-6, False), (1.1e-6, True)])
def test_conclude_early_claim_needs_the_evidence_and_the_error_of_its_evaluation(margin: float, shown: bool) -> None:
    """`log_e_value` is right to within 1e-7 (test_e_process.py): less than 1e-6 above ln(1 / alpha) proves nothing."""
    target, sampling, votes = 0.4, Sampling(10, 1000, 0.5), counts(3, 57)
    p0 = float(special.ndtr(target / 0.5))
    early_share = math.exp(margin - float(log_e_value(57, 60, p0))) / sampling.alpha
    result = conclude(0.5, (target,), counts(0, 10), votes, 60, sampling, early_share, Stop.REACHED)
    assert (result.radius == target) == shown
    assert target - 1e-5 < result.radius <= target


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
