"""Certificates under exact noise: equal in any batch, and sound where float noise leaks."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from core.machine import exact_noise
from core.machine.engine import Engine, Task
from core.machine.exact_noise import ExactNoise, exact_table
from core.machine.keystream import Part
from core.machine.network import Head, Module, Network
from core.machine.noise import GaussianNoise, Noise
from core.models.small import SmallConvNet
from core.procedures.confidence import clopper_pearson_lower
from core.procedures.smoothing import certify
from core.records import CLASSIFIER, Certificate, Sampling
from tests.core.machine.test_exact_noise import Ints, pixels
from tests.helpers.oracles import HalfSpace, axis


def certify_one(
    module: Module, noise: Noise, image: Tensor, sigma: float, sampling: Sampling, batch_size: int = 1000
) -> Certificate:
    engine = Engine(Network({CLASSIFIER: Head(module, 2)}), noise, batch_size=batch_size)
    return next(iter(engine.run([Task(0, "x", image, certify(sigma, sampling))]))).result


def test_run_any_batch_size_gives_identical_results_with_exact_noise() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    module = HalfSpace(axis(16, 2), 0.4)
    images = [torch.randint(256, (1, 4, 4), generator=generator).float() / 255 for _ in range(3)]

    def tasks() -> Iterator[Task[Certificate]]:
        for (index, image), sigma in itertools.product(enumerate(images), (0.25, 0.5)):
            yield Task((index, sigma), f"x{index}", image, certify(sigma, Sampling(100, 250, 0.01)))

    def run(batch_size: int) -> dict[tuple[int, float], Certificate]:
        engine = Engine(Network({CLASSIFIER: Head(module, 2)}), ExactNoise(3), batch_size=batch_size)
        return {finished.key: finished.result for finished in engine.run(tasks())}

    base = run(1)
    assert len(base) == 6
    assert all(run(batch_size) == base for batch_size in (37, 100, 333))


def leak(noisy: Tensor) -> Tensor:
    """Votes for class 1 where (z - 1) + 1 == z in float32: true near 1 for what was rounded there, hardly near 0."""
    same = ((noisy - 1.0) + 1.0 == noisy).flatten().float()
    return torch.stack([0.5 - same, same - 0.5], dim=1)


def exact_probability(m: int, sigma: float) -> float:
    """P[leak∘Q votes for class 1] at x = m / 255, m any integer, by enumeration of the grid."""
    k = max(1, math.floor(6 * sigma))
    grid = np.arange(-255 * k, 255 * (k + 1) + 1)
    votes = leak(torch.from_numpy(grid.astype(np.float32) / np.float32(255)).reshape(-1, 1, 1, 1)).argmax(dim=1)
    below = special.ndtr((grid[:-1] + 0.5 - m) / (255 * sigma))
    return float(np.diff(np.concatenate([[0.0], below, [1.0]])) @ votes.numpy())


def test_certify_float32_leak_gaussian_noise_certifies_falsely() -> None:
    sampling = Sampling(100, 10_000, 0.0005)
    at_one = certify_one(leak, GaussianNoise(0), pixels(255, (1, 1, 1)), 0.5, sampling)
    at_zero = certify_one(leak, GaussianNoise(0), pixels(0, (1, 1, 1)), 0.5, sampling)
    assert at_one.prediction == 1
    assert at_one.radius == pytest.approx(1.585, abs=0.001)
    assert at_zero.prediction == 0  # at distance 1, inside that radius
    assert at_zero.radius > 0


@pytest.mark.parametrize("m", [0, 60, 110, 160, 200, 255])
def test_certify_float32_leak_exact_noise_certifies_soundly(m: int) -> None:
    sigma = 0.5
    result = certify_one(leak, ExactNoise(0), pixels(m, (1, 1, 1)), sigma, Sampling(100, 10_000, 0.001))
    probability = exact_probability(m, sigma)
    votes = int(result.counts_estimation[1])
    assert abs(votes - 10_000 * probability) < 5 * np.sqrt(10_000 * probability * (1 - probability))
    classes = {other: int(exact_probability(other, sigma) > 0.5) for other in range(-600, 900)}
    assert set(classes.values()) == {0, 1}
    assert not result.abstained
    assert all(classes[other] == result.prediction for other in classes if abs(other - m) / 255 < result.radius)


def test_certify_half_space_exact_noise_exceeds_the_exact_radius_as_often_as_alpha_allows() -> None:
    # The threshold lies half-way between two grid values, so that rounding leaves the half-space what it is.
    module, sigma, num = HalfSpace(axis(1, 0), 99.5 / 255), 0.25, 400
    image, sampling = pixels(138, (1, 1, 1)), Sampling(100, 200, 0.1)
    engine = Engine(Network({CLASSIFIER: Head(module, 2)}), ExactNoise(11), batch_size=1000)
    tasks = [Task(i, f"x{i}", image, certify(sigma, sampling)) for i in range(num)]
    results = [finished.result for finished in engine.run(tasks)]
    radius = (138 - 99.5) / 255
    failures = sum(r.prediction != 1 or r.radius > radius for r in results if not r.abstained)
    assert failures <= stats.binom.isf(1e-6, num, sampling.alpha)
    # What Clopper and Pearson give exactly: neither too many nor too few.
    votes, probability = np.arange(201), special.ndtr(radius / sigma)
    wrong = clopper_pearson_lower(votes, 200, sampling.alpha) > probability
    rate = float(stats.binom.pmf(votes, 200, probability)[wrong].sum())
    assert stats.binom.ppf(1e-5, num, rate) <= failures <= stats.binom.isf(1e-5, num, rate)


def test_run_network_gets_only_grid_values() -> None:
    torch.manual_seed(0)
    network, seen = SmallConvNet(1, 4, 2), []

    def module(noisy: Tensor) -> Tensor:
        seen.append(noisy.clone())
        logits: Tensor = network(noisy)
        return logits

    certify_one(module, ExactNoise(0), pixels(100, (1, 4, 4)), 0.25, Sampling(100, 200, 0.01), 150)
    values = torch.cat(seen).numpy()
    assert np.array_equal(values, np.rint(values * 255).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("batch_size", [1, 64, 200])
def test_run_copies_that_may_not_vote_are_missing_from_the_counts(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uniform(part: Part, first: int, num: int) -> Ints:
        numbers = (part.first // 2 + first + np.arange(num)) // 16
        return np.where(numbers % 100 < 3, exact_table(0.25).floors[500], 2**59 - 1)  # three copies of each hundred

    monkeypatch.setattr(exact_noise, "_uniform_on_host", uniform)
    module = HalfSpace(axis(16, 0), -100.0)  # class 1, always
    result = certify_one(module, ExactNoise(0), pixels(9, (1, 4, 4)), 0.25, Sampling(100, 250, 0.01), batch_size)
    assert result.counts_selection.tolist() == [0, 97]
    assert result.counts_estimation.tolist() == [0, 241]
    assert result.p_lower == clopper_pearson_lower(241, 250, 0.01)
