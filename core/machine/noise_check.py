"""Whether noise is what certificates assume: distributed as its law says, and independent from copy to copy and key to
key. What is not Gaussian is looked at through its distribution function, which makes it so.

The keystream is a cipher's, so this is no proof of quality but looks for what goes wrong around it: a generator that
was exchanged (Dahiya, Shumailov & Anderson, USENIX Security 2024, falsified radii up to 81 times over by one that
passes the usual tests of bits), a seed that lost its bits, a stream that two uses share, a device that rounds
otherwise. What is looked at is what a network is given, on the device that draws it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr, ndtri
from torch import Tensor

from core.errors import NoiseError
from core.law import GAUSSIAN, Floats, Law, law_of
from core.machine.former_noise import FormerGaussianNoise
from core.machine.noise import Copies, Noise
from core.records import Phase

__all__ = ["ALARM", "check_noise", "problems"]

ALARM = 2e-8
"""Probability of a false alarm of each of the tests; there are fewer than 40, so below 1e-6 for all together. The draws
are functions of the seed: a run that was not stopped by chance never will be."""

SHAPE = (1, 16, 32)
LEVEL = 1.0
"""Of the copies whose distribution is looked at: of an image of zeros, so that they are the noise itself."""
STREAMS, COPIES, KEYS = 8, 512, 4096
"""2 million numbers of 8 streams; the first 16 numbers of 4096 keys."""
RELATED = 128
"""Copies of each stream whose independence is looked at, and of each phase and level beside."""


def check_noise(noise: Noise, device: torch.device | str, levels: Iterable[float] = ()) -> None:
    """Refuse noise that is not its law's and independent; half a second, false alarm below 1e-6 for a seed.

    Of a noise of the user's own no more is looked at than its bits, its streams and half-spaces along an axis, at each
    of its levels; of splitting noise, which has no chance, the bits.

    Raises:
        NoiseError: says what was found.
    """
    if found := "; ".join(problems(noise, torch.device(device), levels)):
        raise NoiseError(
            f"the noise that {noise!r} draws on {device} is not what certificates assume: {found}. Nothing may be "
            "certified with it: replace this machine's cryptography, NumPy, SciPy or torch, or use another machine"
        )


def problems(noise: Noise, device: torch.device, levels: Iterable[float] = ()) -> Iterator[str]:
    """What is wrong with noise; see `check_noise`."""
    many = [_copies(f"noise check {n}", num=COPIES) for n in range(STREAMS)]
    values = _drawn(noise, many, device)
    same_everywhere = not isinstance(noise, FormerGaussianNoise)
    if device.type != "cpu" and same_everywhere and not torch.equal(values, _drawn(noise, many, torch.device("cpu"))):
        yield "its bits are not those of the CPU"
    known = noise.kind in ("gaussian", "exact", "uniform", "laplace")
    z = values.flatten(1).numpy()
    if known:
        yield from _distribution(_normal(z.ravel().astype(np.float64), noise.kind, LEVEL, spread=True))
        yield from _related(noise, device, z)
    if noise.kind != "splitting":
        yield from _contradictions(np.sort(z.ravel().astype(np.float64)), law_of(noise.kind))
        for sigma in () if known else sorted(set(levels)):  # at 1 a variance passes for a standard deviation
            own = _drawn(noise, [_copies(f"noise check {n}", sigma=sigma, num=COPIES) for n in range(STREAMS)], device)
            yield from _contradictions(np.sort(own.numpy().ravel().astype(np.float64)), law_of(noise.kind), sigma)
        starts = [_copies(f"key {n}", num=1, shape=(1, 1, 16)) for n in range(KEYS)]
        first = _drawn(noise, starts, device).flatten(1).numpy()
        if (different := len(np.unique(first, axis=0))) < KEYS:
            yield f"{KEYS} keys give {different} streams"


def _contradictions(noise: Floats, law: Law, sigma: float = LEVEL) -> Iterator[str]:
    """Where a half-space along an axis contradicts the law, sampling errors (Dvoretzky-Kiefer-Wolfowitz) set aside.

    Args:
        noise: at `sigma`, sorted.
        law: says that the half-space's probability p becomes no less than cdf(quantile(p) - r / scale) at distance r.
        sigma: noise level.
    """
    error = math.sqrt(math.log(2 / ALARM) / (2 * len(noise)))
    p = np.linspace(0.5, 1.0, 200)[1:-1]
    for side, values in (("up", noise), ("down", -noise[::-1])):
        edge = np.quantile(values, p, method="lower")  # of the half-space below it, of probability p
        for share in (0.05, 0.2, 0.5):
            moved = np.searchsorted(values, edge - share * float(law.scale(sigma))) / len(values)
            left = law.quantile(np.maximum(p - error, 0.5)) - share
            claimed = np.where(left >= 0, law.cdf(np.maximum(left, 0.0)), 1 - law.cdf(np.maximum(-left, 0.0)))
            if (off := float((claimed - moved).max())) > error:
                yield (
                    f"at sigma = {sigma:g} a half-space falls below what its law says by {off:.3f}, {share:g} scale "
                    f"{side} an axis"
                )
                return


def _related(noise: Noise, device: torch.device, z: NDArray[np.float32]) -> Iterator[str]:
    """What is wrong between copies, of one stream and of others."""
    related = [
        _copies("noise check 0", phase, sigma, first, RELATED)
        for phase in (Phase.SELECTION, Phase.ESTIMATION, Phase.PREDICTION)
        for sigma in (LEVEL / 2, LEVEL)
        for first in (0, 10_000)
        if (phase, sigma, first) != (_PHASE, LEVEL, 0)
    ]
    others = _drawn(noise, related, device).flatten(1).numpy()
    parts = [_normal(z.reshape(STREAMS, COPIES, -1)[:, :RELATED].reshape(STREAMS * RELATED, -1), noise.kind, LEVEL)]
    for start, each in zip(range(0, len(others), RELATED), related, strict=True):
        parts.append(_normal(others[start : start + RELATED], noise.kind, each.sigma))
    yield from _independence(np.concatenate(parts).astype(np.float32))


def _normal(noise: NDArray[Any], kind: str, sigma: float, *, spread: bool = False) -> Floats:
    """Noise as standard normal numbers: divided by sigma, or by way of the law of its kind; `spread`: integers on the
    8-bit grid are spread evenly over their cells, each to a number of its own.
    """
    law = law_of(kind)
    if law == GAUSSIAN:
        return np.asarray(noise / sigma, np.float64)
    values = np.asarray(noise, np.float64)
    if spread:
        values = values + (np.random.default_rng(0).random(values.shape) - 0.5) / 255
    return np.asarray(np.sign(values) * ndtri(np.minimum(law.cdf(np.abs(values) / law.scale(sigma)), 1 - 2.0**-53)))


_PHASE = Phase.ESTIMATION


def _copies(
    name: str, phase: Phase = _PHASE, sigma: float = LEVEL, first: int = 0, num: int = 1, shape: tuple[int, ...] = SHAPE
) -> Copies:
    return Copies(torch.zeros(shape), name, phase, sigma, first, num)


def _drawn(noise: Noise, copies: list[Copies], device: torch.device) -> Tensor:
    """The noisy copies, on the host."""
    zeros = copies[0].image.to(device)
    there = [Copies(zeros, c.example_id, c.phase, c.sigma, c.first, c.num) for c in copies]
    out = torch.empty((sum(c.num for c in copies), *zeros.shape), device=device)
    noise.corrupt(out, there)
    return out.cpu()


def _distribution(z: Floats) -> Iterator[str]:
    """Moments, the distribution function as a whole, tails, and whether float32 is used."""
    num, limit = len(z), stats.norm.isf(ALARM / 2)
    power = z.copy()
    # Of rounding to the grid of 1/255 (exact noise) the variance rises by 1.3e-6, far below what is seen here.
    for order, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        if (off := abs(power.mean() - mean) / math.sqrt(variance / num)) > limit or math.isnan(off):
            yield f"its moment of order {order} is {power.mean():.5f}, expected {mean}, {off:.1f} standard errors off"
        power *= z
    # Between the values of exact noise, where its distribution function is that of normal noise.
    edges = (np.arange(-1020, 1020) + 0.5) / 255
    counts = np.bincount(np.clip(np.rint(z * 255) + 1020, 0, 2040).astype(np.int64), minlength=2041)
    found, expected = np.cumsum(counts)[:-1] / num, ndtr(edges)
    if (distance := float(np.abs(found - expected).max())) > stats.kstwobign.isf(ALARM) / math.sqrt(num):
        yield f"its Kolmogorov-Smirnov distance is {distance:.2g}"
    squares = (found - expected) ** 2 / (expected * (1 - expected)) * np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    # Its tail is that of half a chi-squared variable of one degree, times the square root of 3 (Zolotarev).
    if (statistic := float(num * squares.sum() / 255)) > stats.chi2.isf(ALARM / math.sqrt(3), 1) / 2:
        yield f"its Anderson-Darling statistic is {statistic:.3g}"
    for beyond in (3.0, 4.0, 4.5, 5.0):
        edge = (math.floor(255 * beyond) + 0.5) / 255
        for side, tail in (("above", z > edge), ("below", z < -edge)):
            seen = int(tail.sum())
            if stats.binomtest(seen, num, float(ndtr(-edge))).pvalue < ALARM:
                yield f"{seen} of {num} numbers lie {side} {beyond:g}, expected {num * ndtr(-edge):.1f}"
    single = z.astype(np.float32)
    coarse = float((single.astype(np.float16) == single).mean())
    if coarse > 0.01 and np.abs(single * 255 - np.rint(single * 255)).max() > 1e-3:
        yield f"{coarse:.1%} of its numbers are float16"


def _independence(rows: NDArray[np.float32]) -> Iterator[str]:
    """Correlations of all pairs of copies, of their numbers and of the magnitudes; and runs that come twice."""
    count, size = rows.shape
    for what, each in (("numbers", rows), ("squares", (rows**2 - 1) / math.sqrt(2))):
        related = each @ each.T / size
        np.fill_diagonal(related, 0.0)
        worst = float(np.abs(related).max())
        # Products of squares have a long tail: of 512 of them, a mean beyond 0.6 has probability below 1e-14 a pair.
        limit = stats.norm.isf(ALARM / count**2) / math.sqrt(size) if what == "numbers" else 0.8
        if not worst <= limit:
            one, other = np.unravel_index(np.abs(related).argmax(), related.shape)
            yield f"the {what} of copies {one} and {other} have correlation {related[one, other]:.2f}"
    bits = np.abs(rows).view(np.int32).astype(np.uint64).ravel()
    runs = np.zeros(len(bits) - 7, np.uint64)
    for place in range(8):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + bits[place : place + len(runs)]
    runs.sort()
    if (repeated := int((runs[1:] == runs[:-1]).sum())) > 0:
        yield f"{repeated} runs of eight numbers come twice"
