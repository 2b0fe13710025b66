import itertools

import numpy as np
import pytest
from scipy import stats

from core.agreement_records import Router
from core.errors import DataError
from core.evaluation.choice import Sample, choose, expected, pooled, subsets
from core.evaluation.metrics import reached
from core.evaluation.routing import Price, route
from core.procedures.confidence import certified_radius, clopper_pearson_lower, largest_radius

SIGMAS, RADII = np.array([0.25, 0.5, 1.0]), np.array([0.1, 0.2])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 5), (2, 7, 16)])
def test_pooled_is_an_orthonormal_map(shape: tuple[int, int, int]) -> None:
    basis = []
    for index in range(int(np.prod(shape))):
        image = np.zeros(shape, np.uint8)
        image.flat[index] = 255
        basis.append(pooled(image, side=4 if shape[0] == 2 else 8))
    matrix = np.stack(basis, axis=1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)
    assert len(matrix) == shape[0] * min(shape[1], 8 if shape[0] != 2 else 4) * min(shape[2], 8 if shape[0] != 2 else 4)


def test_expected_of_known_probabilities_is_the_exact_share_and_plugging_in_is_not() -> None:
    rng = np.random.default_rng(0)
    sigma, radii, num, alpha, draws = 0.5, np.array([0.0, 0.5, 1.0, 1.3]), 10_000, 0.0005, 100
    votes = rng.binomial(draws, rng.beta(6.0, 0.5, 4000))
    found = expected(votes, draws, sigma, radii, num=num, alpha=alpha).mean(axis=0)
    # P[a certificate of 10,000 draws exceeds r] for p ~ Beta(6, 1/2): the least count that does, exactly.
    counts = np.arange(num + 1)
    radius = certified_radius(clopper_pearson_lower(counts, num, alpha), sigma)
    exact = [float(stats.betabinom(num, 6.0, 0.5).sf(counts[radius > r].min() - 1)) for r in radii]
    assert found == pytest.approx(exact, abs=0.02)
    share = np.rint(votes / draws * num).astype(int)
    plugged = reached(radius[share][:, None], radii)[:, 0].mean(axis=0)
    assert np.abs(plugged - exact).max() > 0.05


def test_expected_is_between_0_and_1_falls_with_the_radius_and_rises_with_the_votes() -> None:
    votes = np.arange(101)
    found = expected(votes, 100, 0.25, np.array([0.0, 0.2, 0.4, 9.0]), num=1000, alpha=0.001)
    assert np.all((found >= 0.0) & (found <= 1.0))
    assert np.all(np.diff(found, axis=1) <= 1e-12)
    assert np.all(np.diff(found, axis=0) >= -1e-9)
    assert np.all(found[:, 3] == 0.0)  # beyond the reach of 1,000 draws


def test_route_two_levels_is_the_distance_to_the_half_space_and_capped_by_the_draws() -> None:
    weights, offset = np.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), np.array([0.1, 0.0, -9.0])
    points = np.array([[0.5, 0.1], [0.0, 0.3], [5.0, 0.0]])
    norms = np.linalg.norm(weights[:, :, None] - weights[:, None, :], axis=0)
    picked, radius = route(points @ weights + offset, norms, (0, 1), SIGMAS, Price(10_000, 0.0005))
    assert picked.tolist() == [0, 1, 0]
    for point, value in zip(points, radius.max(axis=1), strict=True):
        distance = abs(point @ np.array([3.0, -4.0]) + 0.1) / 5.0
        p = stats.norm.cdf(distance / 0.5)
        assert value == certified_radius(clopper_pearson_lower(round(p * 10_000), 10_000, 0.0005), 0.5)
        assert value <= distance
    assert radius[2].tolist() == [0.0, largest_radius(0.5, 10_000, 0.0005)]


def test_route_three_levels_claims_no_more_than_the_smoothed_router_gives() -> None:
    rng = np.random.default_rng(1)
    weights, offset = rng.normal(size=(4, 3)), rng.normal(size=3) * 0.1
    norms = np.linalg.norm(weights[:, :, None] - weights[:, None, :], axis=0)
    points = rng.normal(size=(40, 4)) * 2.0
    picked, radius = route(points @ weights + offset, norms, (0, 1, 2), SIGMAS, Price(10_000, 0.0005))
    noise = rng.normal(size=(4000, 4))  # sigma_e = 1
    answers = np.stack([((point + noise) @ weights + offset).argmax(axis=1) for point in points])
    bound = (answers == picked[:, None]).mean(axis=1) + 4 * np.sqrt(0.25 / 4000)
    radius = radius.max(axis=1)
    claimed = stats.norm.cdf(radius)
    assert np.all(claimed[radius > 0] <= bound[radius > 0])
    assert (radius > 0.3).sum() > 10  # it claims something


def test_route_single_level_and_a_constant_router() -> None:
    scores = np.tile([0.1, 0.9, 0.5], (4, 1))
    assert route(scores, np.zeros((3, 3)), (2,), SIGMAS, Price(100, 0.01))[1].tolist() == [[0.0]] * 4
    picked, radius = route(scores, np.zeros((3, 3)), (0, 2), SIGMAS, Price(100, 0.01))
    assert picked.tolist() == [2] * 4
    assert radius.tolist() == [[largest_radius(1.0, 100, 0.01), 0.0]] * 4


@pytest.mark.parametrize("router", ["median", "plurality"])
def test_route_agreement_excludes_no_further_than_the_smoothed_router_does(router: Router) -> None:
    rng = np.random.default_rng(5)
    weights, offset = rng.normal(size=(4, 3)), rng.normal(size=3) * 0.1
    norms = np.linalg.norm(weights[:, :, None] - weights[:, None, :], axis=0)
    points = rng.normal(size=(60, 4)) * 2.0
    asked = (points @ weights + offset, norms, (0, 1, 2), SIGMAS)
    picked, radius = route(*asked, Price(10_000, 0.0005, "agreement", router))
    constant = route(*asked, Price(10_000, 0.0005))[1]
    noise = rng.normal(size=(4000, 4))  # sigma_e = 1
    q = np.stack([np.bincount(((p + noise) @ weights + offset).argmax(axis=1), minlength=3) for p in points]) / 4000
    error = 4 * np.sqrt(0.25 / 4000)
    for row in range(len(points)):
        for place in {0, 1, 2} - {picked[row]}:
            claimed = radius[row, place]
            if router == "median":
                side = q[row, :place].sum() if place > picked[row] else q[row, place + 1 :].sum()
                assert stats.norm.cdf(claimed) <= side + error or claimed == 0.0
                assert claimed >= constant[row, place]
            else:
                most = [
                    stats.norm.ppf(min(share + error, 1 - 1e-9)) for share in (q[row, picked[row]], 1 - q[row, place])
                ]
                assert claimed <= sum(most) / 2 or claimed == 0.0
        assert radius[row, picked[row]] == 0.0
    assert (radius > constant + 0.1).sum() > 10, "a far level is excluded further than the nearest"


def _sample(rng: np.random.Generator, num: int, telling: bool) -> Sample:
    """Two kinds of examples: level 0 certifies the one beyond radius 0.2, level 2 the other, level 1 half of each."""
    kind = rng.integers(2, size=num)
    features = rng.normal(size=(num, 5)) * 0.05
    features[:, 0] += np.where(kind == 1, 3.0, -3.0) if telling else 0.0
    radius = np.stack(
        [np.where(kind == 0, 0.3, 0.0), rng.integers(2, size=num) * 0.3, np.where(kind == 1, 0.3, 0.0)], 1
    )
    return Sample(features, reached(radius, np.array([0.1, 0.2])))


def test_choose_finds_the_pair_that_a_router_can_use_and_predicts_new_examples() -> None:
    rng = np.random.default_rng(2)
    sample, new = _sample(rng, 300, True), _sample(rng, 400, True)
    choice = choose(sample, SIGMAS, RADII, 2, price=Price(10_000, 0.0005), evaluation=new)
    best = choice.candidates[0]
    assert (best.levels, best.score) == ((0, 2), 1.0)
    assert choice.evaluation is not None
    assert (choice.evaluation[0].levels, choice.evaluation[0].score) == ((0, 2), 1.0)
    assert [c.levels for c in choice.candidates[:1]] == [e.levels for e in choice.evaluation[:1]]
    for each in choice.candidates:  # against plain loops
        columns = sample.certified[:, list(each.levels)]
        assert each.oracle.tolist() == [np.mean([max(row) for row in columns[:, :, r]]) for r in range(2)]
        means = [columns[:, place].mean(axis=0) for place in range(len(each.levels))]
        assert each.single.tolist() == max(means, key=lambda mean: mean.mean()).tolist()
        assert each.score <= each.oracle.mean() + 1e-12
    assert choice.wins[0] == 1.0
    assert choice.optimism == 0.0


def test_choose_features_that_tell_nothing_give_a_router_no_more_than_the_best_single_level() -> None:
    rng = np.random.default_rng(3)
    choice = choose(_sample(rng, 400, False), SIGMAS, RADII, 3, price=Price(10_000, 0.0005))
    for each in choice.candidates:
        assert each.score <= each.single.mean() + 2 * each.standard_error
    assert choice.behind[0] == 0.0
    assert np.all(choice.behind >= 0.0)


def test_choose_optimism_of_the_best_of_many_equals_is_seen() -> None:
    rng = np.random.default_rng(4)
    num, levels = 200, 12  # all levels are worth the same: certified with probability 1/2
    sample = Sample(rng.normal(size=(num, 2)), rng.integers(2, size=(num, levels, 1)).astype(float))
    choice = choose(sample, np.linspace(0.1, 1.0, levels), np.array([0.1]), 1, price=Price(1000, 0.001))
    # The best of 12 means of 100 fair coins is 1.63 standard errors (of .05) above the half it is compared with.
    assert choice.optimism == pytest.approx(1.63 * 0.05, abs=0.05)
    assert choice.optimism > 0.04
    assert choice.wins.sum() == pytest.approx(1.0)


def test_subsets_are_all_of_at_most_the_size() -> None:
    assert subsets(4, 2) == [(0,), (1,), (2,), (3,), *itertools.combinations(range(4), 2)]


def test_sample_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="same examples"):
        Sample(np.zeros((30, 2)), np.zeros((31, 2, 1)))
    with pytest.raises(DataError, match="too few"):
        Sample(np.zeros((10, 2)), np.zeros((10, 2, 1)))
