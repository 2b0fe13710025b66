"""Closed-form oracles and small networks that many tests share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from core.law import Law
from core.records import Counts, Draws, Procedure

R = TypeVar("R")


@dataclass(frozen=True)
class Scaled(Law):
    """A law with another one's functions, and a scale that is off: its radii are false."""

    law: Law
    by: float
    norm = "l1"

    def scale(self, sigma: ArrayLike) -> NDArray[np.float64]:
        return self.by * self.law.scale(sigma)

    def quantile(self, p: ArrayLike) -> NDArray[np.float64]:
        return self.law.quantile(p)

    def cdf(self, t: ArrayLike) -> NDArray[np.float64]:
        return self.law.cdf(t)


@dataclass(frozen=True)
class HalfSpace:
    """Votes for class 1 where a.z >= t, ||a|| = 1: p = Phi((a.x - t) / sigma), exact radius |a.x - t|."""

    normal: Tensor
    threshold: float

    def __call__(self, images: Tensor) -> Tensor:
        side = images.flatten(1) @ self.normal.to(images.dtype) - self.threshold
        return torch.stack([-side, side], dim=1)

    def margin(self, image: Tensor) -> float:
        """a.x - t, in float64."""
        return float(image.flatten().double() @ self.normal.double()) - self.threshold


@dataclass(frozen=True)
class Ball:
    """Votes for class 1 inside ||z - centre|| <= rho: p = ncx2.cdf(rho^2 / sigma^2, d, ||x - centre||^2 / sigma^2)."""

    centre: Tensor
    rho: float

    def __call__(self, images: Tensor) -> Tensor:
        inside = self.rho - torch.linalg.vector_norm(images.flatten(1) - self.centre, dim=1)
        return torch.stack([-inside, inside], dim=1)

    def probability(self, distance: float, sigma: float) -> float:
        """P[vote for class 1] at this distance from the centre."""
        return float(stats.ncx2.cdf((self.rho / sigma) ** 2, len(self.centre), (distance / sigma) ** 2))

    def exact_radius(self, distance: float, sigma: float) -> float:
        """How far outwards the smoothed class stays 1: where the probability falls to 1/2."""
        low, high = distance, distance + 10 * self.rho
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.probability(middle, sigma) > 0.5 else (low, middle)
        return low - distance


@dataclass(frozen=True)
class Negated:
    """The other class everywhere."""

    module: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images).flip(1)


def axis(dim: int, index: int) -> Tensor:
    """A unit vector."""
    vector = torch.zeros(dim)
    vector[index] = 1.0
    return vector


def drive(procedure: Procedure[R], votes: Callable[[Draws], Mapping[str, Counts]]) -> R:
    """Run a procedure to its end on given votes, without an engine."""
    try:
        draws = next(procedure)
        while True:
            draws = procedure.send(votes(draws))
    except StopIteration as stop:
        result: R = stop.value
        return result
