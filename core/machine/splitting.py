"""Splitting noise for 8-bit images, derandomised: certificates that cannot fail (Levine & Feizi 2021, 2103.10834).

An axis is split at every m-th of the points between two grey levels, m = 2 lambda 255: at s + 1/2 + m Z for a pixel of
0 to 255. A copy holds, of each pixel, the middle of its piece of [0, 255]: of two images, pixels that lie on the same
piece cannot be told apart, and a fraction |x - y| 255 / m of the m splits tells them apart. So the probability of any
event changes by at most |x - y|_1 / (2 lambda) (theorems 1 and 2 there), however the splits of different pixels depend
on one another. Here copy b splits pixel i at s = (b + v_i) mod m, b = 0 .. m - 1: that is all copies, and each pixel
sees every split once.

v is a part of the classifier: a function of the run's seed, the shape of the images and m, the same for every image.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import DualRSError
from core.law import SPLITTING
from core.machine.exact_noise import grid_integers
from core.machine.keystream import Part, words_on_host
from core.machine.noise import Copies, rows_of
from core.machine.noise_key import noise_key
from core.records import Phase

__all__ = ["SplittingNoise", "offsets", "split"]


class SplittingNoise:
    """Splitting noise; a `core.machine.noise.Noise` without chance: draw b of an estimation is copy b.

    Selection draws are some of the same copies, spread over all of them; training draws are copies at random.
    """

    kind = "splitting"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
        """See `core.machine.noise.Noise.corrupt`: multiples of 1/1020 in [0, 1].

        Raises:
            DataError: for an image that is not on the 8-bit grid.
        """
        for each, rows in rows_of(out, copies):
            m = SPLITTING.copies(each.sigma)
            base = torch.from_numpy(self._bases(each, m)).to(out.device).view(-1, *[1] * each.image.dim())
            v = torch.tensor(offsets(self.seed, tuple(each.image.shape), m), device=out.device)
            pixels = grid_integers(each.image, each.example_id).to(torch.int64)
            rows.copy_(split(pixels, (base + v) % m, m))
            rows.div_(torch.full((), 1020.0, device=out.device))

    def _bases(self, copies: Copies, m: int) -> NDArray[np.int64]:
        """The numbers of copies that draws take."""
        draws = np.arange(copies.first, copies.first + copies.num, dtype=np.int64)
        if copies.phase is Phase.TRAINING:
            words = np.empty(copies.num, np.int32)
            key = noise_key(self.seed, copies.example_id, copies.phase, copies.sigma, self.kind)
            words_on_host(Part(key, copies.first, copies.num), words)
            return words.view(np.uint32).astype(np.int64) % m
        if copies.phase is Phase.ESTIMATION:
            if draws[-1] >= m:
                raise DualRSError(f"draw {draws[-1]} of {m} copies at sigma = {copies.sigma:g}: each counts once")
            return draws
        step = next(step for step in range(max(1, round(0.618 * m)), 2 * m) if np.gcd(step, m) == 1)
        return draws * step % m


def split(pixels: Tensor, s: Tensor, m: int) -> Tensor:
    """Four times the middle of the piece that each pixel lies on, int64.

    Args:
        pixels: int64 in [0, 255].
        s: int64 in [0, m): pieces end at s + 1/2 + m Z, and at 0 and 255. Broadcasts with `pixels`.
        m: their length.
    """
    low = 2 * (s + m * torch.div(pixels - s - 1, m, rounding_mode="floor")) + 1  # twice, and below the pixel
    return low.clamp(min=0) + (low + 2 * m).clamp(max=510)


@lru_cache(maxsize=64)
def offsets(seed: int, shape: tuple[int, ...], m: int) -> NDArray[np.int64]:
    """v: int64 of the shape of an image, in [0, m); read-only."""
    words = np.empty(int(np.prod(shape)), np.int32)
    key = noise_key(seed, "offsets", Phase.ESTIMATION, m / 510.0, "splitting")
    words_on_host(Part(key, 0, len(words)), words)
    v: NDArray[np.int64] = (words.view(np.uint32).astype(np.int64) % m).reshape(shape)
    v.setflags(write=False)
    return v
