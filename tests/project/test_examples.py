"""The procedure of examples/new_procedure.py keeps its promise; `make docs-test` runs the examples themselves."""

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom

from core.records import ABSTAIN, Sampling
from examples.new_procedure import two_sided

SIGMA, SAMPLING = 0.5, Sampling(10, 40, 0.05)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.51, 0.6, 0.75, 0.9, 0.97])
def test_two_sided_is_wrong_with_probability_below_alpha(p: float) -> None:
    """Two classes, the selection draws having chosen the second, of probability p: an exact sum over its votes."""
    true_radius = SIGMA * ndtri(p)  # negative: the claim itself is false
    k = np.arange(SAMPLING.num_estimation + 1)
    found = [two_sided(np.array([0, 10]), np.array([40 - votes, votes]), SIGMA, SAMPLING) for votes in k]
    false = [c.prediction != ABSTAIN and c.radius > max(true_radius, 0.0) for c in found]
    assert binom.pmf(k, 40, p)[false].sum() <= SAMPLING.alpha


def test_two_sided_draws_without_a_class_are_a_class_of_their_own() -> None:
    full = two_sided(np.array([0, 10]), np.array([0, 40]), SIGMA, SAMPLING)
    lost = two_sided(np.array([0, 10]), np.array([0, 25]), SIGMA, SAMPLING)  # 15 of 40 had no finite logits
    assert 0.0 == lost.radius < full.radius
    assert lost.prediction == ABSTAIN
