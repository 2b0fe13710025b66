"""Noise rounded to the 8-bit grid, drawn exactly: certificates that floating point cannot make false.

Adding float32 noise to an image leaks the image through the low-order bits of the sum, and a network can read them:
what was sampled is then not the Gaussian smoothing that the certificate speaks of (Voracek & Hein, ICLR 2023; Jin et
al. 2022). Here the classifier that is smoothed is f∘Q, the network f behind the rounding

    Q(z) = clip(round(255 z), -255 k, 255 (k + 1)) / 255,    k = max(1, floor(6 sigma)).

Cohen's theorem holds for f∘Q as for any function, so radii stay what they are. For an image x = m / 255, m integer,
Q(x + sigma z) = clip(m + i, ...) / 255 with an integer noise i, and i is what is drawn:

    P(i) = Phi((2i + 1) / (510 sigma)) - Phi((2i - 1) / (510 sigma)).

With 0 <= m <= 255 every i >= 255 (k + 1) is clipped to the same value, and so is every i <= -255 (k + 1). Those tails
are drawn as one bin each, which changes nothing.

Laplace noise has its own distribution function in place of Phi, and twice the k. Uniform noise needs no k: on a whole
number of grid steps (`core.law.uniform_width`) it rounds to integers that are all as likely, so that T_i is i 2^60 over
their number, from the lowest one on.

Exactness: a real V, uniform in [0, 2^60), falls into bin i by comparison with T_i = 2^60 Phi((2i + 1) / (510 sigma)).
Only its integer part U is drawn, from the generator's bits, and only floor(T_i) is stored, from arbitrary precision.
U != floor(T_i) settles on which side of T_i V lies; U == floor(T_i) does not, and a copy with such a pixel may not
vote: it counts against its class, as a lower bound needs it. That is one copy in 10^11 of 3x32x32 at sigma = 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError, DataError
from core.law import uniform_width
from core.machine.keystream import Part, words_on_device, words_on_host
from core.machine.noise import Copies, rows_of
from core.machine.noise_key import noise_key

__all__ = ["ExactNoise", "ExactTable", "draw_on_device", "draw_on_host", "exact_table", "grid_integers"]

BITS = 60
"""Bits of U: as many as leave int64 room to spare."""

GUIDE_BITS = 16
"""Leading bits of U that index the guide. At 16 it is 256 KiB and settles 97% of the draws at sigma = 1, more below;
with 12 bits a lookup takes 5 to 7 times as long, without a guide 20 to 40 times."""

BLOCK = 2**16
"""Draws that the CPU looks up at once: the temporary arrays stay small enough to be used again from the cache."""

OFF_GRID = 1e-3
"""How far from an integer 255 times a pixel may lie; float32 rounding of x = m / 255 leaves it below 1e-4."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExactTable:
    """The distribution of the integer noise at one noise level.

    Attributes:
        k: the grid runs from -k to k + 1 in the pixel scale.
        floors: int64 ``(2 * reach,)``, ascending: floor(T_i) for i = -reach .. reach - 1.
        guide: float32 ``(2^16,)``: the noise by the leading bits of U, NaN where `floors` must decide.
    """

    k: int
    floors: Ints
    guide: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        width = 2 ** (BITS - GUIDE_BITS)
        first = np.arange(2**GUIDE_BITS, dtype=np.int64) * width
        below = np.searchsorted(self.floors, first, side="left")
        up_to = np.searchsorted(self.floors, first + (width - 1), side="right")
        guide = np.where(below == up_to, below - self.reach, np.nan).astype(np.float32)
        object.__setattr__(self, "guide", guide)
        for array in (self.floors, self.guide):
            array.flags.writeable = False

    @property
    def reach(self) -> int:
        """The largest magnitude; 255 (k + 1), from which on all noise is clipped to the same value, or less."""
        return len(self.floors) // 2

    def look_up(self, uniform: Ints, out: NDArray[np.float32]) -> Ints:
        """Turn uniform integers into noise.

        Args:
            uniform: int64 ``(N,)`` in [0, 2^60).
            out: float32 ``(N,)``, overwritten with integers in [-reach, reach].

        Returns:
            Positions whose integer is ambiguous; what `out` holds there must not be used.
        """
        np.take(self.guide, uniform >> (BITS - GUIDE_BITS), out=out, mode="wrap")  # "raise" would buffer the output
        open_ = np.flatnonzero(np.isnan(out))
        values = uniform[open_]
        bins = np.searchsorted(self.floors, values, side="right")
        out[open_] = bins - self.reach
        # With bins == 0 this compares with the largest threshold, which U is below then.
        ambiguous: Ints = open_[self.floors[bins - 1] == values]
        return ambiguous


@lru_cache(maxsize=64)
def exact_table(sigma: float, kind: str = "exact") -> ExactTable:
    """The noise's distribution at `sigma`; under 0.1 s at sigma = 1, then remembered.

    Every floor(T_i) is certain: T_i is evaluated with an error bound, and with more digits until no integer lies
    within it. The noise is symmetric, T_(-1-i) = 2^60 - T_i, so one half is evaluated and the other mirrored.

    Args:
        sigma: noise level, > 0, pixel scale [0, 1].
        kind: `exact` (Gaussian), `uniform` or `laplace`.

    Raises:
        ConfigError: for a sigma that is not positive and finite.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"a noise level must be positive and finite, got sigma={sigma!r}")
    if kind == "uniform":
        width = int(uniform_width(sigma))
        # Never a whole number, width being odd; one that nothing reaches where the noise is always 0.
        floors = [place * 2**BITS // width for place in range(1, max(width, 2))]
        return ExactTable(-(-width // 510), np.array(floors, np.int64))
    import mpmath

    context = mpmath.MPContext()  # its own: the shared one's precision belongs to the whole process
    k = max(1, math.floor((12 if kind == "laplace" else 6) * sigma))
    lower = np.zeros(255 * (k + 1), np.int64)  # floor(T_(-1-i)), i = 0, 1, ...: it falls, and stays 0 once it is 0
    for i in range(len(lower)):
        lower[i] = _floor_of_tail(2 * i + 1, sigma, context, kind=kind)
        if lower[i] == 0:
            break
    # T is no integer (`_floor_of_tail` would not have returned), so floor(2^60 - T) = 2^60 - 1 - floor(T).
    return ExactTable(k, np.concatenate([lower[::-1], 2**BITS - 1 - lower]))


def _floor_of_tail(odd: int, sigma: float, context: Any, precision: int = 128, kind: str = "exact") -> int:
    """floor(2^60 (1 - Phi(odd / (510 sigma)))), certainly; `context` is an mpmath context whose precision may change.

    Of Laplace noise floor(2^60 exp(-odd / (510 lambda)) / 2), lambda = sigma / sqrt(2).

    Returns only when an interval around the value that covers the error of its evaluation holds no integer.
    """
    if odd / (510 * sigma) > (30 if kind == "laplace" else 10):  # 1 - Phi(10) < 2^-76, exp(-sqrt(2) 30) < 2^-61
        return 0
    while True:
        context.prec = precision
        z = odd / (510 * context.mpf(sigma))
        twice = context.exp(-z * context.sqrt(2)) if kind == "laplace" else context.erfc(z / context.sqrt(2))
        tail = context.ldexp(twice, BITS - 1)
        # A relative error e of z moves the tail by at most the share e (z^2 + 1); 2^8 covers the roundings on the way.
        error = context.ldexp(tail * (z * z + 1), 8 - precision)
        low, high = int(context.floor(tail - error)), int(context.floor(tail + error))
        if low == high:
            return low
        precision *= 2


class ExactNoise:
    """Exact noise on the 8-bit grid, of a kind of `exact_table`; a `core.machine.noise.Noise`.

    The network reads float32 quotients of integers by 255, on every device the same for the same integers: its input
    holds no trace of the image but their sum. Images must be on the grid themselves, x = m / 255 with 0 <= m <= 255.
    """

    def __init__(self, seed: int, kind: str = "exact") -> None:
        self.seed, self.kind = seed, kind

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> Tensor | None:
        """See `core.machine.noise.Noise.corrupt`: Q(x + sigma z), multiples of 1/255 in [-k, k + 1].

        Raises:
            DataError: for an image that is not on the grid.
        """
        words = 2 * out[0].numel()
        parts = [
            Part(noise_key(self.seed, c.example_id, c.phase, c.sigma, self.kind), c.first * words, c.num * words)
            for c in copies
        ]
        draw = self._on_host if out.device.type == "cpu" else self._on_device
        masks = draw(out, copies, parts)
        if all(mask is None for mask in masks):
            return None
        return torch.cat(
            [
                torch.ones(each.num, dtype=torch.bool, device=out.device) if mask is None else mask
                for mask, each in zip(masks, copies, strict=True)
            ]
        )

    def _on_host(self, out: Tensor, copies: Sequence[Copies], parts: Sequence[Part]) -> Sequence[Tensor | None]:
        drawn = zip(parts, rows_of(out, copies), strict=True)
        return [draw_on_host(rows, each, partial(_uniform_on_host, part), self.kind) for part, (each, rows) in drawn]

    def _on_device(self, out: Tensor, copies: Sequence[Copies], parts: Sequence[Part]) -> Sequence[Tensor | None]:
        uniform = _uniform_on_device(parts, out.device).split_with_sizes([part.num // 2 for part in parts])
        drawn = zip(uniform, rows_of(out, copies), strict=True)
        return [draw_on_device(rows, each, integers, self.kind) for integers, (each, rows) in drawn]


def _uniform_on_host(part: Part, first: int, num: int) -> Ints:
    """Uniform integers in [0, 2^60): pairs of words, little-endian, without their lowest four bits."""
    words = np.empty(2 * num, np.int32)
    words_on_host(Part(part.key, part.first + 2 * first, 2 * num), words)
    uniform = words.view(np.uint64)
    uniform >>= np.uint64(64 - BITS)
    return uniform.view(np.int64)  # next to uint64, searchsorted would compare in float64


def _uniform_on_device(parts: Sequence[Part], device: torch.device) -> Tensor:
    """All that `_uniform_on_host` gives for parts, one after the other: int64."""
    low, high = words_on_device(parts, device).view(-1, 2).to(torch.int64).bitwise_and_(0xFFFFFFFF).unbind(1)
    return (high << 28) | (low >> 4)


def draw_on_host(
    out: Tensor, copies: Copies, uniform: Callable[[int, int], Ints], kind: str = "exact"
) -> Tensor | None:
    """Overwrite `out` with Q(x + sigma z).

    Args:
        out: contiguous float32 ``(N, C, H, W)`` on the CPU.
        copies: of what; the number of copies is that of `out`.
        uniform: gives integers in [0, 2^60): from a place on, so many; asked in order.
        kind: see `exact_table`.

    Returns:
        bool ``(N,)``, False for copies with an ambiguous pixel; None when there is none.
    """
    pixels, table = grid_integers(copies.image, copies.example_id), exact_table(float(copies.sigma), kind)
    noise = out.view(-1).numpy()
    ambiguous: list[int] = []
    for start in range(0, len(noise), BLOCK):
        block = noise[start : start + BLOCK]
        places = table.look_up(uniform(start, len(block)), block)
        ambiguous.extend((start + places).tolist())
    _finish(out, pixels, table)
    if not ambiguous:
        return None
    may_vote = torch.ones(len(out), dtype=torch.bool)
    may_vote[torch.tensor(ambiguous) // out[0].numel()] = False
    return may_vote


def draw_on_device(out: Tensor, copies: Copies, uniform: Tensor, kind: str = "exact") -> Tensor:
    """As `draw_on_host`, from int64 of the number of elements of `out`."""
    pixels, table = grid_integers(copies.image, copies.example_id), exact_table(float(copies.sigma), kind)
    floors, uniform = _floors_on(out.device, table), uniform.view(out.shape)
    bins = torch.searchsorted(floors, uniform, right=True)
    out.copy_(bins - table.reach)
    _finish(out, pixels, table)
    ambiguous = floors[(bins - 1).clamp_(min=0)] == uniform
    return ~ambiguous.flatten(1).any(dim=1)


@lru_cache(maxsize=64)
def _floors_on(device: torch.device, table: ExactTable) -> Tensor:
    return torch.tensor(table.floors, device=device)


def _finish(out: Tensor, pixels: Tensor, table: ExactTable) -> None:
    """Turn the noise into quotients on the grid."""
    out.add_(pixels).clamp_(-255 * table.k, 255 * (table.k + 1))
    # All integers up to here. By a tensor: CUDA divides by a number as it multiplies by its rounded inverse.
    out.div_(torch.full((), 255.0, device=out.device))


def grid_integers(image: Tensor, example_id: str) -> Tensor:
    """255 times the image, as integers in float32.

    Raises:
        DataError: for an image that is not on the 8-bit grid; names the example.
    """
    scaled = image * 255.0
    pixels = scaled.round()
    inside = bool(((pixels >= 0) & (pixels <= 255) & ((scaled - pixels).abs() <= OFF_GRID)).all())  # NaN is not
    if not inside:
        worst = float((scaled - pixels.clamp(0, 255)).abs().max())
        raise DataError(
            f"example {example_id!r}: this noise needs pixels that are multiples of 1/255 in [0, 1], and one is "
            f"{worst:.3g}/255 off; pass 8-bit images (uint8, or uint8 / 255), resized before they were rounded to "
            "8 bits, or use Gaussian noise"
        )
    return pixels
