"""Multiscale on closed forms, through the engine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from core.machine.engine import Engine, Task
from core.machine.network import Head, Module, Network
from core.machine.noise import GaussianNoise
from core.procedures import multiscale
from core.procedures.multiscale import MultiscaleCertificate, multiscale_certify
from core.procedures.smoothing import certify
from core.records import ABSTAIN, CLASSIFIER, Certificate, Counts, Procedure, Sampling
from tests.helpers.lattice import Floats
from tests.helpers.oracles import HalfSpace, Negated, axis

# --- Closed forms, through the engine ---------------------------------------------------------------------------------

ALPHA = 0.1


@dataclass(frozen=True)
class Slab:
    """Class 1 where |a.z - 1/2| <= half, class 0 on the lower side, class 2 on the upper."""

    half: float

    def __call__(self, images: Tensor) -> Tensor:
        s = images[:, 0, 0, 0] - 0.5
        return torch.stack([-s - self.half, torch.zeros_like(s), s - self.half], dim=1)

    def probabilities(self, s: Floats, sigma: float) -> Floats:
        """Of the three classes, ``(len(s), 3)``."""
        below, above = special.ndtr((-self.half - s) / sigma), special.ndtr((s - self.half) / sigma)
        return np.stack([below, 1 - below - above, above], axis=1)


def cascade_classes(experts: Mapping[float, Slab], s: Floats) -> Counts:
    """The cascade itself, at images whose first pixel is 1/2 + s."""
    result = np.full(len(s), ABSTAIN)
    for sigma in sorted(experts):
        p = experts[sigma].probabilities(s, sigma)
        result = np.where(p.max(axis=1) > 0.5, p.argmax(axis=1), result)
    return result


def exact_radii(experts: Mapping[float, Slab], s: Floats, step: float = 1e-4) -> Floats:
    """Distance to where the cascade's class changes: along the one axis that it depends on, rounded up."""
    places = np.arange(-2.0, 2.0, step)
    classes, own = cascade_classes(experts, places), cascade_classes(experts, s)
    return np.array([np.abs(places[classes != c] - x).min() + step for x, c in zip(s, own, strict=True)])


def certificates(
    experts: Mapping[float, Module], images: Tensor, num: int, classes: int, seed: int = 0
) -> list[MultiscaleCertificate]:
    network = Network({CLASSIFIER: Head(experts, classes)})
    engine = Engine(network, GaussianNoise(seed), batch_size=1000)
    sampling = Sampling(50, num, ALPHA)
    done = engine.run(
        Task(index, f"example {index}", image, multiscale_certify(sorted(experts), sampling))
        for index, image in enumerate(images)
    )
    return [result for _, result in sorted((finished.key, finished.result) for finished in done)]


def first_pixels(s: Floats) -> Tensor:
    images = torch.full((len(s), 1, 2, 2), 0.5)
    images[:, 0, 0, 0] += torch.from_numpy(s).float()
    return images


def false_certificates(experts: Mapping[float, Slab], num: int) -> tuple[int, list[MultiscaleCertificate]]:
    s = np.random.default_rng(0).uniform(-0.5, 0.5, num)
    results = certificates(dict(experts), first_pixels(s), 500, 3)
    pairs = zip(results, exact_radii(experts, s), cascade_classes(experts, s), strict=True)
    wrong = sum(r.prediction != ABSTAIN and (r.prediction != c or r.radius > exact) for r, exact, c in pairs)
    return wrong, results


SLABS = {
    "one network": {0.12: Slab(0.25), 0.5: Slab(0.25)},
    "a level above that cuts the ball": {0.12: Slab(0.45), 0.5: Slab(0.15)},
}


@pytest.mark.parametrize("name", SLABS)
def test_multiscale_slabs_never_exceed_the_exact_radius_beyond_alpha(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num, experts = 300, SLABS[name]
    wrong, results = false_certificates(experts, num)
    allowed = int(stats.binom.ppf(1 - 1e-6, num, ALPHA))
    assert wrong <= allowed
    decided = [result.sigma for result in results]
    assert min(decided.count(0.12), decided.count(0.5)) > 50
    if name == "a level above that cuts the ball":
        assert sum(r.sigma == 0.12 and r.sigma_bound == 0.5 for r in results) > 40  # an upper bound binds
        monkeypatch.setattr(multiscale, "_radius_of_others", lambda level, last, law: math.inf)
        assert false_certificates(experts, num)[0] > allowed, "the planted error is not seen"


def test_multiscale_dual_oracle_never_exceeds_the_exact_radius_beyond_alpha() -> None:
    """Experts that contradict each other, of STATISTICS' router: the cascade is the half-space of the large sigma.

    Near its boundary the large sigma does not decide on these draws, and the other expert says the opposite."""
    plane, num = HalfSpace(axis(4, 0), 0.5), 300
    s = np.random.default_rng(1).uniform(-0.2, 0.2, num)
    results = certificates({0.25: Negated(plane), 0.5: plane}, first_pixels(s), 500, 2)
    certified = [(r, x) for r, x in zip(results, s, strict=True) if not r.abstained]
    wrong = sum(r.prediction != int(x >= 0) or r.radius > abs(x) + 1e-7 for r, x in certified)
    assert len(certified) > 150
    assert wrong <= int(stats.binom.ppf(1 - 1e-6, num, ALPHA))
    assert any(r.abstained for r in results)


def test_multiscale_draws_the_noise_of_standard_smoothing_at_each_level() -> None:
    experts: dict[float, Callable[[Tensor], Tensor]] = dict(SLABS["one network"])
    images = first_pixels(np.linspace(-0.3, 0.3, 12))
    results = certificates(experts, images, 300, 3, seed=7)
    engine = Engine(Network({CLASSIFIER: Head(experts, 3)}), GaussianNoise(7), batch_size=64)

    def alone(sigma: float) -> Procedure[Certificate]:
        return certify(sigma, Sampling(50, 300, 0.3))

    tasks = (Task((i, s), f"example {i}", image, alone(s)) for i, image in enumerate(images) for s in experts)
    standard = {finished.key: finished.result for finished in engine.run(tasks)}
    levels = [(i, level) for i, result in enumerate(results) for level in result.levels]
    assert len(levels) > 12
    for index, level in levels:
        other = standard[index, level.sigma]
        assert np.array_equal(level.counts_selection, other.counts_selection)
        assert np.array_equal(level.counts_estimation, other.counts_estimation)
