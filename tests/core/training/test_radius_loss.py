"""The losses of the agreement claim: against plain loops, finite differences, and optima that are known."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from core.config import EstimatorConfig
from core.procedures.confidence import largest_radius
from core.training.estimator import shrunk_radii
from core.training.radius_loss import largest_share, radius_losses, voted_radius

SIGMA_E, LARGEST = 0.5, largest_share(1000, 0.0005)


def config(**keys: Any) -> EstimatorConfig:
    return EstimatorConfig.model_validate({"loss": "radius", "label_radius": "shrunk", **keys})


def numpy_radius(logits: np.ndarray, radii: np.ndarray, settings: EstimatorConfig, warming: bool) -> tuple[float, ...]:
    """Mean loss, expected radius and smooth T, by loops over samples, copies and levels."""
    m, size, width = logits.shape
    losses, expected, joint = [], [], []
    tau = settings.temperature * SIGMA_E
    for b in range(size):
        p = [np.exp(logits[i, b]) / np.exp(logits[i, b]).sum() for i in range(m)]
        expected.append(sum(float(p[i][j] * max(0.0, radii[b, j])) for i in range(m) for j in range(width)) / m)
        mean = sum(p) / m
        levels = []
        for j in range(width):
            q = max(sum(mean[:j]), sum(mean[j + 1 :]))
            reach = SIGMA_E * stats.norm.ppf(1 - LARGEST + (2 * LARGEST - 1) * q)
            levels.append(tau * np.log(np.exp(reach / tau) + np.exp(radii[b, j] / tau)))
        joint.append(-tau * np.log(sum(np.exp(-level / tau) for level in levels)))
        worth = joint[-1]
        if settings.radii:
            worth = sum(1 / (1 + np.exp(-(joint[-1] - r) / 0.05)) for r in settings.radii) / len(settings.radii)
        losses.append(-expected[-1] if warming or settings.loss == "expected_radius" else -worth)
    return float(np.mean(losses)), float(np.mean(expected)), float(np.mean(joint))


@pytest.mark.parametrize(
    ("settings", "warming"),
    [
        (config(loss="expected_radius"), False),
        (config(), False),
        (config(), True),
        (config(temperature=0.3), False),
        (config(radii=[0.1, 0.4]), False),
    ],
    ids=["expected_radius", "radius", "warming", "hot", "radii"],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_radius_losses_value_and_gradient_equal_numpy_and_finite_differences(
    settings: EstimatorConfig, warming: bool, copies: int
) -> None:
    rng = np.random.default_rng(copies)
    logits, radii = rng.normal(size=(copies, 4, 3)), rng.uniform(-0.5, 1, (4, 3))
    tensor = torch.from_numpy(logits).requires_grad_()

    def terms(values: Tensor) -> dict[str, Tensor]:
        still = torch.full((4,), warming)
        return radius_losses(values, torch.from_numpy(radii), still, SIGMA_E, LARGEST, settings)

    means = {name: term.mean() for name, term in terms(tensor).items()}
    expected = dict(zip(means, numpy_radius(logits, radii, settings, warming), strict=True))
    assert list(means) == ["loss", "expected_radius", "radius"]
    assert {name: value.item() for name, value in means.items()} == pytest.approx(expected, rel=1e-10)
    means["loss"].backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-6
        up, down = (numpy_radius(logits + sign * step, radii, settings, warming)[0] for sign in (1, -1))
        assert tensor.grad[index].item() == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)


def test_radius_losses_probability_of_zero_or_one_gives_finite_gradients_and_the_largest_reach() -> None:
    for far in ([900.0, 0.0, -900.0], [-900.0, 0.0, 900.0]):
        logits = torch.tensor([[far], [far]], requires_grad=True)
        terms = radius_losses(
            logits, torch.tensor([[3.0, 0.0, 3.0]]), torch.zeros(1, dtype=torch.bool), 0.5, LARGEST, config()
        )
        terms["loss"].mean().backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        # The middle level certifies nothing: T is how far it is out of reach.
        assert terms["radius"].item() == pytest.approx(largest_radius(0.5, 1000, 0.0005), abs=1e-4)


@pytest.mark.parametrize(("radii", "level", "worth"), [((), 0, 0.6), ((0.15,), 1, 0.5)])
def test_radius_loss_finds_the_optimum_that_is_known(radii: tuple[float, ...], level: int, worth: float) -> None:
    """Two images that the router cannot tell apart, two levels: with certainty in one of them T = R at that level, in
    between less. Level 0 has the larger sum (.5 + .1), level 1 more images beyond .15 (.2 and .3).
    """
    labels = torch.tensor([[0.5, 0.2], [0.1, 0.3]])
    settings = config(radii=radii, temperature=0.01)
    logits = torch.tensor([1.0 - level, float(level)])  # as a warm-up leaves them
    for _ in range(30):
        logits.requires_grad_()
        losses = radius_losses(logits.expand(1, 2, 2), labels, torch.tensor([False] * 2), 0.5, LARGEST, settings)
        (slope,) = torch.autograd.grad(losses["loss"].mean(), logits)
        logits = logits.detach() - 0.3 * slope.sign()
    votes = (1000 * logits.softmax(0)).round().long().expand(2, 2)
    assert int(logits.argmax()) == level
    assert float(voted_radius(votes, labels, 0.5, LARGEST).sum()) == pytest.approx(worth, abs=1e-3)
    # No router of this kind is worth more: all shares of votes, on a grid.
    shares = torch.stack([torch.arange(1001), 1000 - torch.arange(1001)], dim=1)
    t = torch.stack([voted_radius(shares, row.expand(1001, 2), 0.5, LARGEST) for row in labels])
    best = t.sum(dim=0).max() if not radii else (t > radii[0]).double().sum(dim=0).max()
    assert best.item() == pytest.approx(0.6 if not radii else 2)


def test_voted_radius_equals_the_statement_of_the_claim() -> None:
    rng = np.random.default_rng(0)
    votes, radii = rng.multinomial(50, [0.2, 0.5, 0.2, 0.1], size=200), rng.uniform(0, 1, (200, 4))
    votes[:50] = np.eye(4, dtype=np.int64)[rng.integers(0, 4, 50)] * 50
    expected = []
    for row, labels in zip(votes, radii, strict=True):
        median = next(j for j in range(4) if row[: j + 1].sum() >= 25)
        levels = []
        for j in range(4):
            out = row[:j].sum() if j > median else row[j + 1 :].sum()
            share = min((out + 0.5) / 51, LARGEST)
            levels.append(max(0.0 if j == median else SIGMA_E * stats.norm.ppf(share), 0.0, labels[j]))
        expected.append(min(levels))
    found = voted_radius(torch.from_numpy(votes), torch.from_numpy(radii), SIGMA_E, LARGEST)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_shrunk_radii_are_those_of_the_posterior_means_under_the_prior_that_made_the_votes() -> None:
    rng = np.random.default_rng(0)
    a, b, num = (2.0, 0.6), (0.4, 0.3), 100
    p = np.stack([rng.beta(a[level], b[level], 40_000) for level in (0, 1)], axis=1)
    votes = rng.binomial(num, p)
    sigmas = np.array([0.25, 0.5])
    found = shrunk_radii(votes, np.full_like(votes, num), sigmas, 1000, 0.0005)
    for level in (0, 1):
        mean = (votes[:, level] + a[level]) / (num + a[level] + b[level])
        lower = stats.beta.ppf(0.0005, np.rint(1000 * mean), 1001 - np.rint(1000 * mean))
        expected = sigmas[level] * stats.norm.ppf(np.where(mean > 0.5, np.maximum(lower, 0.5), mean.clip(1e-3)))
        assert np.abs(found[:, level] - expected).max() < 0.02 * sigmas[level]
    assert found.max() < 0.98 * largest_radius(0.5, 1000, 0.0005)  # 100 of 100 are not 1,000 of 1,000


def test_shrunk_radii_samples_without_draws_count_for_nothing() -> None:
    votes, num = np.array([[90, 100], [80, 100], [0, 0], [99, 100]]), np.array([[100, 100]] * 4)
    num[2] = 0
    sigmas = np.array([0.25, 0.5])
    found = shrunk_radii(votes, num, sigmas, 1000, 0.0005)
    some = [0, 1, 3]
    np.testing.assert_array_equal(found[some], shrunk_radii(votes[some], num[some], sigmas, 1000, 0.0005))
    assert found[2].tolist() == [0.0, 0.0]
    assert 0 < found[0, 0] < found[3, 0]
    behind = shrunk_radii(np.array([[40], [0], [100]]), np.full((3, 1), 100), sigmas[:1], 1000, 0.0005)[:, 0]
    assert -3.1 * 0.25 < behind[1] < behind[0] < 0 < behind[2]
    assert 0 < found[0, 1] < largest_radius(0.5, 1000, 0.0005)  # unanimous at that level, yet not certain
    assert not shrunk_radii(num * 0, num * 0, sigmas, 1000, 0.0005).any()
