"""Every metric against a hand-computed case and against plain loops."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from core.errors import DataError
from core.evaluation.metrics import (
    average_certified_radius,
    certified_accuracy,
    clopper_pearson_interval,
    dataset_level_bound,
    ecdf,
    oracle,
    paired_difference,
    reached,
)

# Radii on a coarse lattice, so that ties with the evaluated radii are common.
RADIUS = st.integers(0, 6).map(lambda i: i / 4)
ROWS = st.lists(st.tuples(st.booleans(), RADIUS), min_size=1, max_size=30)


def columns(rows: list[tuple[bool, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c for c, _ in rows], bool), np.array([r for _, r in rows], float)


def test_certified_accuracy_strict_drops_radius_equal_to_r() -> None:
    correct = np.array([True, True, True, False])
    radius = np.array([0.25, 0.5, 0.1, 0.9])
    np.testing.assert_array_equal(certified_accuracy(correct, radius, [0.0, 0.1, 0.25, 0.5]), [0.75, 0.5, 0.25, 0.0])


def test_certified_accuracy_not_strict_keeps_radius_equal_to_r() -> None:
    correct = np.array([True, True, True, False])
    radius = np.array([0.25, 0.5, 0.1, 0.9])
    got = certified_accuracy(correct, radius, [0.0, 0.1, 0.25, 0.5, 0.51], strict=False)
    np.testing.assert_array_equal(got, [0.75, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("strict", [True, False])
def test_certified_accuracy_abstention_never_counts_at_zero(strict: bool) -> None:
    # A radius of 0 is an abstention even if its row claims a right class.
    got = certified_accuracy(np.array([True, False, True]), np.array([0.0, 0.0, 1e-12]), [0.0], strict=strict)
    np.testing.assert_array_equal(got, [1 / 3])


@given(ROWS, st.lists(RADIUS, max_size=8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_certified_accuracy_any_rows_equals_loops(
    rows: list[tuple[bool, float]], radii: list[float], strict: bool
) -> None:
    expected = []
    for r in radii:
        hits = 0
        for correct, radius in rows:
            if correct and radius > 0 and (radius > r or (not strict and radius == r)):
                hits += 1
        expected.append(hits / len(rows))
    np.testing.assert_array_equal(certified_accuracy(*columns(rows), np.array(radii, float), strict), expected)


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_average_certified_radius_any_rows_equals_area_under_curve(rows: list[tuple[bool, float]]) -> None:
    correct, radius = columns(rows)
    # All radii are multiples of 1/4, so the curve is flat in between and its area is a finite sum.
    area = 0.25 * certified_accuracy(correct, radius, np.arange(8) / 4).sum()
    assert average_certified_radius(correct, radius) == pytest.approx(area, abs=1e-12)


def test_average_certified_radius_wrong_class_counts_as_zero() -> None:
    assert average_certified_radius(np.array([True, False, False]), np.array([0.6, 9.0, 0.0])) == pytest.approx(0.2)


def test_ecdf_with_ties_steps_once_per_value() -> None:
    x, y = ecdf([3.0, 1.0, 3.0, -2.0])
    np.testing.assert_array_equal(x, [-2.0, 1.0, 3.0])
    np.testing.assert_array_equal(y, [0.25, 0.5, 1.0])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ecdf_any_values_equals_loops(values: list[int]) -> None:
    x, y = ecdf(np.array(values, float))
    assert x.tolist() == sorted(set(values))
    assert y.tolist() == [sum(v <= at for v in values) / len(values) for at in x]


def test_oracle_wrong_class_and_ties_takes_smaller_index() -> None:
    correct = np.array([[True, True, True], [False, True, True], [False, False, False], [True, False, True]])
    radius = np.array([[0.2, 0.5, 0.5], [0.9, 0.1, 0.3], [0.5, 0.6, 0.0], [0.1, 0.9, 0.0]])
    index, best = oracle(correct, radius)
    np.testing.assert_array_equal(index, [1, 2, 0, 0])
    np.testing.assert_array_equal(best, [0.5, 0.3, 0.0, 0.1])
    assert index.dtype == np.int64


@given(st.lists(st.tuples(*[st.tuples(st.booleans(), RADIUS)] * 3), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_oracle_any_rows_equals_loops(rows: list[tuple[tuple[bool, float], ...]]) -> None:
    correct = np.array([[c for c, _ in row] for row in rows])
    radius = np.array([[r for _, r in row] for row in rows])
    index, best = oracle(correct, radius)
    for i, row in enumerate(rows):
        at, value = 0, 0.0
        for k, (c, r) in enumerate(row):
            if c and r > value:
                at, value = k, r
        assert (index[i], best[i]) == (at, value)


def test_dataset_level_bound_hand_computed() -> None:
    # m = 500, alpha = rho = 0.001, ln(1000) = 6.907755278982137:
    # sqrt(2 * 0.000999 * 6.907755 / 500) = 0.0052539, 6.907755 / 1500 = 0.0046052.
    assert dataset_level_bound(0.7, 500, 0.001, 0.001) == pytest.approx(0.7 - 0.001 - 0.0052539 - 0.0046052, abs=1e-7)


def test_dataset_level_bound_tiny_accuracy_is_clipped_at_zero() -> None:
    assert dataset_level_bound(0.0, 500, 0.001, 0.001) == 0.0
    assert dataset_level_bound(0.005, 500, 0.001, 0.001) == 0.0


@pytest.mark.parametrize("rho", [0.05, 0.001])
@pytest.mark.parametrize("alpha", [0.0005, 0.001, 0.01, 0.3])
@pytest.mark.parametrize("m", [1, 20, 500, 10_000])
def test_dataset_level_bound_exact_failure_is_at_most_rho(m: int, alpha: float, rho: float) -> None:
    """More certificates fail than the bound subtracts, if each fails with probability alpha."""
    allowed = 1.0 - dataset_level_bound(1.0, m, alpha, rho)
    assert stats.binom.sf(np.floor(m * allowed), m, alpha) <= rho


def test_clopper_pearson_interval_all_or_none_is_closed_form() -> None:
    low, high = clopper_pearson_interval([0.0, 1.0], 50, 0.05)
    np.testing.assert_allclose(low, [0.0, 0.025 ** (1 / 50)], rtol=1e-12)
    np.testing.assert_allclose(high, [1 - 0.025 ** (1 / 50), 1.0], rtol=1e-12)


@pytest.mark.parametrize("successes", [1, 7, 33, 49])
def test_clopper_pearson_interval_inner_counts_solves_both_tails(successes: int) -> None:
    low, high = clopper_pearson_interval(successes / 50, 50, 0.05)
    assert stats.binom.sf(successes - 1, 50, float(low)) == pytest.approx(0.025, rel=1e-7)
    assert stats.binom.cdf(successes, 50, float(high)) == pytest.approx(0.025, rel=1e-7)


def test_clopper_pearson_interval_rounded_share_is_refused() -> None:
    with pytest.raises(DataError, match=r"num_examples=300"):
        clopper_pearson_interval(0.333, 300)


BOOLS = np.array([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certified_accuracy(BOOLS, np.ones(3), [0.0]), r"\(2,\) and \(3,\)"),
        (lambda: certified_accuracy(np.zeros(0, bool), np.zeros(0), [0.0]), "at least one example"),
        (lambda: certified_accuracy(np.array([1, 0]), np.ones(2), [0.0]), "int64"),
        (lambda: certified_accuracy(BOOLS, np.array([1.0, -0.5]), [0.0]), "-0.5"),
        (lambda: certified_accuracy(BOOLS, np.array([1.0, np.nan]), [0.0]), "nan"),
        (lambda: certified_accuracy(BOOLS, np.ones(2), [-0.1]), "-0.1"),
        (lambda: certified_accuracy(BOOLS, np.ones(2), 0.5), "0.5"),
        (lambda: average_certified_radius(BOOLS, np.array([np.inf, 0.0])), "inf"),
        (lambda: ecdf([]), "at least one"),
        (lambda: ecdf([1.0, np.nan]), "finite"),
        (lambda: oracle(BOOLS, np.ones(2)), "2-d"),
        (lambda: dataset_level_bound(1.5, 10, 0.1, 0.1), "1.5"),
        (lambda: dataset_level_bound(0.5, 0, 0.1, 0.1), "got 0"),
        (lambda: dataset_level_bound(0.5, 10, 0.0, 0.1), "alpha"),
        (lambda: dataset_level_bound(0.5, 10, 0.1, 1.0), "rho"),
        (lambda: clopper_pearson_interval(0.5, 0), "got 0"),
        (lambda: clopper_pearson_interval(-0.5, 2), "-0.5"),
    ],
)
def test_metrics_bad_input_names_the_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_reached_is_certified_accuracy_by_example() -> None:
    radius = np.array([[0.0, 0.3], [0.25, 0.2]])
    assert reached(radius, np.array([0.0, 0.25])).tolist() == [[[0, 0], [1, 1]], [[1, 0], [1, 0]]]
    assert reached(radius, np.array([0.0, 0.25]), strict=False).tolist() == [[[0, 0], [1, 1]], [[1, 1], [1, 0]]]
    assert reached(radius[0], np.array([0.0, 0.25])).tolist() == [[0, 0], [1, 1]]


def test_paired_difference_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random((60, 1))
    one, other = hard + 0.1 * rng.random((60, 3)), hard + 0.1 * rng.random((60, 3))
    mean, error = paired_difference(one, other)
    np.testing.assert_allclose(mean / error, stats.ttest_rel(one, other).statistic)
    assert np.all(error < stats.sem(one) / 4), "what is common does not cancel"


def test_paired_difference_of_shares_equals_hand_count() -> None:
    """Of ten examples three are gained and one is lost: sqrt((4 / 10 - .2 ** 2) / 9)."""
    one = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    other = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(paired_difference(one, other), [0.2, 0.2])


def test_paired_difference_one_example_has_no_error() -> None:
    mean, error = paired_difference(np.ones((1, 2)), np.zeros((1, 2)))
    assert mean.tolist() == [1, 1]
    assert np.all(np.isnan(error))
    assert error.shape == (2,)


def test_import_metrics_alone_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'matplotlib', 'ray', 'pandas', 'pyarrow'}"
    code = f"import sys, core.evaluation.metrics; print(*{heavy} & set(sys.modules))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
