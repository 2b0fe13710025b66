"""What a noise proves: how fast the probability of an event can change as the input moves, and so every radius.

A `Law` holds for a noise and a norm if for every event A and inputs x, y

    scale * quantile(P_y[A]) >= scale * quantile(P_x[A]) - |x - y|,

with P_x[A] the probability of A under the noisy copies of x: with p on the left the quantile is antisymmetric about
1/2, so that an event of probability above 1/2 keeps the majority within scale * quantile(p), and one event stays ahead
of another within half of the difference of both. All certificates rest on that alone; docs/guarantees.md holds the
proofs.

**Noise levels are standard deviations**, whatever the noise: `sigmas` in a configuration mean the same amount of noise
everywhere. What else a noise is described by (the lambda of uniform and Laplace noise) is `Law.scale`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

__all__ = [
    "GAUSSIAN",
    "LAPLACE",
    "SPLITTING",
    "UNIFORM",
    "Arithmetic",
    "Gaussian",
    "Laplace",
    "Law",
    "Norm",
    "Splitting",
    "Uniform",
    "law_of",
    "uniform_width",
]

Floats = NDArray[np.float64]
Norm = Literal["l2", "l1"]
Arithmetic = Literal[1, 2]
"""Version of the rounding of bounds and radii. A run that was begun with the first one, whose radii were up to 3e-8 too
large (`Gaussian.scale`), goes on with it."""


class Law(ABC):
    """What a noise proves; immutable and hashable. See the module for what `scale` and `quantile` promise."""

    norm: ClassVar[Norm]
    """Of the radii. Certificates in different norms cannot be joined."""
    exhaustive: ClassVar[bool] = False
    """Whether an estimation takes all copies that there are, each as likely: the share of votes is the probability
    itself, and nothing can fail."""
    arithmetic: Arithmetic = 2

    @abstractmethod
    def scale(self, sigma: ArrayLike) -> Floats:
        """What `quantile` is multiplied by, for a noise of standard deviation `sigma`: the true one or less, but for
        float64's rounding of a value. Pixel scale [0, 1].
        """

    @abstractmethod
    def quantile(self, p: ArrayLike) -> Floats:
        """Of p in (0, 1): 0 at 1/2, increasing, antisymmetric about it; float64, not rounded to any side."""

    @abstractmethod
    def cdf(self, t: ArrayLike) -> Floats:
        """The inverse of `quantile`, for t >= 0."""

    def limit(self, sigma: float) -> float:
        """The radius that a probability of 1 would certify: no number of draws certifies it."""
        return float(self.scale(sigma) * self.quantile(1.0))

    def copies(self, sigma: float) -> int:
        """How many copies there are under an exhaustive law."""
        raise NotImplementedError(f"{type(self).__name__} has no end of copies at {sigma!r}")


@dataclass(frozen=True)
class Gaussian(Law):
    """Normal noise, l2 (Cohen et al. 2019, arXiv 1902.02918, theorem 1): sigma Phi^-1(p)."""

    arithmetic: Arithmetic = 2
    norm = "l2"

    def scale(self, sigma: ArrayLike) -> Floats:
        """The smaller of sigma and the float32 next to it.

        Gaussian noise is scaled by the float32 (0.12 becomes 0.1199999973), exact noise by sigma itself; the smaller
        one is safe for both. The first arithmetic takes sigma as it is written.
        """
        level = np.asarray(sigma, np.float64)
        return level if self.arithmetic == 1 else np.asarray(np.minimum(level, level.astype(np.float32)))

    def quantile(self, p: ArrayLike) -> Floats:
        """Phi^-1."""
        return np.asarray(special.ndtri(np.asarray(p, np.float64)))

    def cdf(self, t: ArrayLike) -> Floats:
        """Phi."""
        return np.asarray(special.ndtr(np.asarray(t, np.float64)))


@dataclass(frozen=True)
class Uniform(Law):
    """Uniform noise on [-lambda, lambda]^d, l1 (Yang et al. 2020, arXiv 2002.08118): 2 lambda (p - 1/2)."""

    norm = "l1"

    def scale(self, sigma: ArrayLike) -> Floats:
        """Lambda, that of `uniform_width`: sqrt(3) sigma to within 1/510."""
        return np.asarray(uniform_width(sigma) / 510.0)

    def quantile(self, p: ArrayLike) -> Floats:
        """2 p - 1."""
        return np.asarray(2.0 * np.asarray(p, np.float64) - 1.0)

    def cdf(self, t: ArrayLike) -> Floats:
        """(1 + t) / 2, at most 1."""
        return np.asarray(np.minimum(0.5 + 0.5 * np.asarray(t, np.float64), 1.0))


@dataclass(frozen=True)
class Splitting(Uniform):
    """Deterministic splitting noise for 8-bit images, l1 (Levine & Feizi 2021, arXiv 2103.10834): 2 lambda (p - 1/2).

    x and y are images of 8 bits: in between nothing is claimed. See `core.machine.splitting`.
    """

    exhaustive = True

    def scale(self, sigma: ArrayLike) -> Floats:
        """Lambda, with 2 lambda 255 an integer, the number of copies: sqrt(3) sigma to within 1/1020."""
        return np.asarray(np.maximum(np.rint(510.0 * math.sqrt(3.0) * np.asarray(sigma, np.float64)), 1.0) / 510.0)

    def copies(self, sigma: float) -> int:
        """2 lambda 255."""
        return round(float(self.scale(sigma)) * 510.0)


@dataclass(frozen=True)
class Laplace(Law):
    """Laplace noise of scale lambda, l1 (Teng et al. 2019): -lambda log(2 (1 - p)) for p >= 1/2."""

    norm = "l1"

    def scale(self, sigma: ArrayLike) -> Floats:
        """Lambda = sigma / sqrt(2)."""
        return np.asarray(np.asarray(sigma, np.float64) / math.sqrt(2.0))

    def quantile(self, p: ArrayLike) -> Floats:
        """Of the standard Laplace distribution."""
        p = np.asarray(p, np.float64)
        with np.errstate(divide="ignore"):
            return np.asarray(-np.sign(p - 0.5) * np.log(2.0 * np.minimum(p, 1.0 - p)))

    def cdf(self, t: ArrayLike) -> Floats:
        """1 - exp(-t) / 2."""
        return np.asarray(1.0 - 0.5 * np.exp(-np.asarray(t, np.float64)))


def uniform_width(sigma: ArrayLike) -> Floats:
    """2 lambda 255 of uniform noise of standard deviation `sigma`: the nearest odd number.

    Odd, so that the noise on an 8-bit image, rounded to 8 bits, is as many integers around 0, each as likely.
    """
    return np.asarray(2.0 * np.floor(255.0 * math.sqrt(3.0) * np.asarray(sigma, np.float64)) + 1.0)


GAUSSIAN, UNIFORM, LAPLACE, SPLITTING = Gaussian(), Uniform(), Laplace(), Splitting()


def law_of(noise: str, arithmetic: Arithmetic = 2) -> Law:
    """The law of a noise, by its name in a configuration."""
    others: dict[str, Law] = {"uniform": UNIFORM, "laplace": LAPLACE, "splitting": SPLITTING}
    return others[noise] if noise in others else Gaussian(arithmetic)
