"""What is read off certificates: certified accuracy, distributions, the oracle, and how sure the numbers are.

Pure NumPy in float64. An example counts as certified only with the right class and a radius above 0, so an abstention
never counts, at no radius and under no convention.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import DataError
from core.law import Floats
from core.procedures.confidence import clopper_pearson_lower, clopper_pearson_upper

__all__ = [
    "Bools",
    "Floats",
    "Ints",
    "average_certified_radius",
    "certified_accuracy",
    "clopper_pearson_interval",
    "dataset_level_bound",
    "ecdf",
    "oracle",
    "paired_difference",
    "reached",
]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def certified_accuracy(correct: ArrayLike, radius: ArrayLike, radii: ArrayLike, strict: bool = True) -> Floats:
    """Share of ALL examples whose class is right and whose certified radius exceeds r, for each r in `radii`.

    Args:
        correct: bool, shape ``(N,)``, whether the certified class is the label; False where abstaining.
        radius: certified l2 radius, shape ``(N,)``, pixel scale [0, 1]; 0 where abstaining.
        radii: shape ``(R,)``, r >= 0.
        strict: count radius > r (the Dual RS authors); otherwise radius >= r (most scripts since Cohen et al. 2019).
            Radius 0 is an abstention and counts under neither, so at r = 0 the two agree.

    Returns:
        float64 shares in [0, 1], shape ``(R,)``.

    Raises:
        DataError: for shapes that do not match, no examples, or a radius that is negative or not finite.
    """
    right, reach = _rows(correct, radius, ndim=1)
    grid = np.asarray(radii, np.float64)
    if grid.ndim != 1 or not np.all(np.isfinite(grid)) or np.any(grid < 0.0):
        raise DataError(f"radii must be a vector of finite numbers >= 0, got {radii!r}")
    certified = np.sort(reach[right & (reach > 0.0)])
    missed = np.searchsorted(certified, grid, side="right" if strict else "left")
    return np.asarray((certified.size - missed) / right.size, np.float64)


def reached(radius: Floats, radii: Floats, strict: bool = True) -> Floats:
    """Which radii are certified, example by example: 0.0 or 1.0, of the shape of `radius` and then ``(R,)``.

    Args:
        radius: any shape, 0 where the class is wrong or nothing is certified (that counts nowhere).
        radii: ``(R,)``.
        strict: count radius > r, otherwise radius >= r.
    """
    each = radius[..., None]
    return ((each > radii if strict else each >= radii) & (each > 0.0)).astype(np.float64)


def average_certified_radius(correct: ArrayLike, radius: ArrayLike) -> float:
    """Mean over ALL examples of the radius, 0 for a wrong class or an abstention (l2, pixel scale [0, 1]).

    A secondary number: it rewards large radii on easy examples (arXiv 2410.06895), so read the curve first.

    Raises:
        DataError: as `certified_accuracy`.
    """
    right, reach = _rows(correct, radius, ndim=1)
    return float(np.where(right, reach, 0.0).mean())


def ecdf(values: ArrayLike) -> tuple[Floats, Floats]:
    """The empirical distribution function of finite numbers ``(N,)``, N >= 1, as the points where it steps up.

    Returns:
        x: the distinct values, ascending; y: share of the values that are <= x, ending at exactly 1.

    Raises:
        DataError: for no values, another shape, or a value that is not finite.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or v.size == 0 or not np.all(np.isfinite(v)):
        raise DataError(f"an ECDF needs a vector of finite numbers, at least one, got shape {v.shape}: {values!r}")
    x, counts = np.unique(v, return_counts=True)
    return x, np.asarray(np.cumsum(counts) / v.size, np.float64)


def oracle(correct: ArrayLike, radius: ArrayLike) -> tuple[Ints, Floats]:
    """The noise level that is best in hindsight, per example. It has seen the label: an upper bound, no certificate.

    Args:
        correct: bool, shape ``(N, K)``, one column per noise level.
        radius: certified l2 radius, shape ``(N, K)``; counts as 0 where the class is wrong or nothing is certified.

    Returns:
        Index of the best level, int64 ``(N,)``, the smaller one on ties (0 where every radius is 0), and its radius,
        float64 ``(N,)``.

    Raises:
        DataError: as `certified_accuracy`.
    """
    right, reach = _rows(correct, radius, ndim=2)
    value = np.where(right, reach, 0.0)
    return np.asarray(value.argmax(axis=1), np.int64), np.asarray(value.max(axis=1), np.float64)


def paired_difference(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Mean of one - other, ``(N, ...)`` each, over the same examples, and its standard error over the draw of these.

    What the two have in common, above all which examples are hard, cancels: intervals of each on its own are far wider.
    The error is nan for a single example, which shows no spread.
    """
    gap = np.asarray(one, np.float64) - other
    if len(gap) < 2:
        return gap.mean(axis=0), np.full(gap.shape[1:], np.nan)
    return gap.mean(axis=0), np.asarray(gap.std(axis=0, ddof=1) / math.sqrt(len(gap)))


def dataset_level_bound(accuracy: float, num_examples: int, alpha: float, rho: float) -> float:
    """How much of a certified accuracy stands once certificates may be wrong, with probability at least 1 - rho.

    Each of the m certificates fails with probability at most alpha, independently, so Bernstein's inequality bounds the
    share that failed and the certified accuracy of the smoothed classifier itself on these m examples is at least

        accuracy - alpha - sqrt(2 alpha (1 - alpha) ln(1/rho) / m) - ln(1/rho) / (3 m).

    The randomness is the noise of the certificates; the examples are fixed. The statement is for one radius. Without
    the factor 2, as in the scripts of Cohen et al. 2019, it would not hold at level rho.

    Args:
        accuracy: measured certified accuracy in [0, 1].
        num_examples: m >= 1.
        alpha: failure probability of one certificate, in (0, 1); for Dual RS the sum over both stages.
        rho: failure probability of the bound, in (0, 1).

    Returns:
        The bound, at least 0.

    Raises:
        DataError: for an argument out of range.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise DataError(f"accuracy is a share in [0, 1], got {accuracy!r}")
    if num_examples < 1:
        raise DataError(f"num_examples must be at least 1, got {num_examples!r}")
    for name, value in (("alpha", alpha), ("rho", rho)):
        if not 0.0 < value < 1.0:
            raise DataError(f"{name} is a failure probability and must lie in (0, 1), got {value!r}")
    log_term = math.log(1.0 / rho) / num_examples
    deviation = math.sqrt(2.0 * alpha * (1.0 - alpha) * log_term)
    return max(0.0, accuracy - alpha - deviation - log_term / 3.0)


def clopper_pearson_interval(accuracy: ArrayLike, num_examples: int, alpha: float = 0.05) -> tuple[Floats, Floats]:
    """Lower and upper ends of the exact two-sided interval for each accuracy, a share k / num_examples, over the draw
    of the test set (Clopper & Pearson 1934).

    Each side misses with probability at most alpha / 2, for one accuracy fixed in advance.

    Raises:
        DataError: for a share that no count out of `num_examples` gives, or an argument out of range.
    """
    share = np.asarray(accuracy, np.float64)
    if num_examples < 1 or not 0.0 < alpha < 1.0:
        raise DataError(f"need num_examples >= 1 and alpha in (0, 1), got {num_examples!r} and {alpha!r}")
    if not np.all((share >= 0.0) & (share <= 1.0)):
        raise DataError(f"accuracy is a share in [0, 1], got {accuracy!r}")
    counts = np.rint(share * num_examples).astype(np.int64)
    if np.any(np.abs(counts - share * num_examples) > 1e-6):
        raise DataError(f"accuracy must be a count divided by num_examples={num_examples}, got {accuracy!r}")
    half = alpha / 2.0
    return clopper_pearson_lower(counts, num_examples, half), clopper_pearson_upper(counts, num_examples, half)


def _rows(correct: ArrayLike, radius: ArrayLike, ndim: int) -> tuple[Bools, Floats]:
    right, reach = np.asarray(correct), np.asarray(radius, np.float64)
    if right.dtype != np.bool_:
        raise DataError(f"correct must be an array of bool, got {right.dtype}")
    if right.ndim != ndim or right.shape != reach.shape or right.size == 0:
        raise DataError(
            f"correct and radius must have one {ndim}-d shape and at least one example, "
            f"got {right.shape} and {reach.shape}"
        )
    if not np.all(np.isfinite(reach)) or np.any(reach < 0.0):
        worst = reach[~np.isfinite(reach) | (reach < 0.0)][0]
        raise DataError(f"a certified radius is finite and >= 0 (0 where abstaining), got {worst!r}")
    return right, reach
