"""One map from 32-bit words to standard normal numbers, with the same bits on every device.

A word s, as a signed integer, stands for the z beyond which a normal number lies with probability |s| / 2^32, on the
side of the sign of s: the quantile function in 2^32 points, symmetric without exception. s = 0 stands for 0, not for
infinity: what is cut off are the tails beyond 6.34, 2^-32 of all numbers, and z ends at 6.23.

The quantile function is evaluated piece by piece. x = float32(s), rounded to nearest, holds the number of its piece in
its upper bits, 2^10 pieces to an octave, so that the tails are as fine as the middle; on a piece z = (x - a) c. These
are a conversion, two constants that are looked up, a difference and a product, rounded as IEEE 754 has it. A difference
before a product is nothing that a compiler could contract, so no device may come to other bits.
"""

import hashlib
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from core.errors import DualRSError
from core.machine.keystream import Part, words_on_device, words_on_host

__all__ = ["KS_DISTANCE", "LARGEST", "MAX_ERROR", "normals_on_device", "normals_on_host"]

MAX_ERROR = 8e-7
"""Bound of the distance of z to the quantile (float32's own resolution at 6 is 4.8e-7)."""

KS_DISTANCE = 6e-8
"""Bound of the Kolmogorov-Smirnov distance between z and a standard normal number. On a piece z is uniform, so its
density there is a step, off by up to 0.05% at its ends."""

LARGEST = 6.2303
"""No z is larger in magnitude; a number of 2^32 would be."""

_PIECES = 10
"""Logarithm of the number of pieces to an octave."""
_SHIFT = 23 - _PIECES
_SIGN = 1 << _PIECES + 8
_DIGEST = "58c335a542c0ed98"

_BLOCK = 2**16
"""Numbers that the CPU makes at once: the temporary arrays stay in its cache."""

Floats = NDArray[np.float32]


@lru_cache(maxsize=1)
def _table() -> tuple[Floats, Floats]:
    """Two numbers of each piece, a and c, by the upper bits of x, sign included; zeros where no x falls.

    In the middle m of a piece of width h the line has the slope of the quantile function q, and lies q'' h^2 / 16
    beside its tangent, which halves the largest error. Where a piece holds one x, that is m. No number here is a small
    difference of large ones, so what SciPy's last bits leave open is gone in float32.

    Raises:
        DualRSError: when the table comes out otherwise all the same: the noise would be another one.
    """
    piece = np.arange(127 << _PIECES, 158 << _PIECES)  # of x = 1 to 2^31
    begin, end = (((piece + more) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64) for more in (0, 1))
    alone = end - begin <= 1
    m = np.where(alone, begin, (begin + end) / 2)
    q = -ndtri(m / 2**32)
    slope = -np.sqrt(2 * np.pi) * np.exp(q * q / 2) / 2**32
    beside = np.where(alone, 0.0, q * slope**2 * (end - begin) ** 2 / 16)
    a, c = np.zeros((2, 2 * _SIGN), np.float32)
    a[piece], c[piece] = m - (q + beside) / slope, slope
    a[158 << _PIECES] = 2.0**31  # where z is 0
    a[_SIGN:], c[_SIGN:] = -a[:_SIGN], c[:_SIGN]
    if (found := hashlib.sha256(a.tobytes() + c.tobytes()).hexdigest()[:16]) != _DIGEST:
        raise DualRSError(
            f"the table of the noise has digest {found!r}, expected {_DIGEST!r}: this SciPy computes the normal "
            "distribution otherwise than all versions known; install another one (pip install -c constraints.txt scipy)"
        )
    return a, c


def normals_on_host(parts: Sequence[Part], out: Floats) -> None:
    """Overwrite `out`, contiguous float32 ``(sum of num,)``, with the normal numbers of parts of streams."""
    bits = _ROOM.bits
    first = filled = 0
    for key, begin, num in parts:
        done = 0
        while done < num:
            taken = min(num - done, _BLOCK - filled)
            words_on_host(Part(key, begin + done, taken), bits[filled : filled + taken])
            done, filled = done + taken, filled + taken
            if filled == _BLOCK:
                _map(bits[:_BLOCK], out[first : first + _BLOCK])
                first, filled = first + _BLOCK, 0
    _map(bits[:filled], out[first:])


def _map(bits: NDArray[np.int32], out: Floats) -> None:
    """Overwrite `out` with the numbers that words stand for; at most a block."""
    a, c = _table()
    index, constant = _ROOM.index[: len(out)], _ROOM.constant[: len(out)]
    np.copyto(out, bits, casting="unsafe")
    np.right_shift(out.view(np.uint32), _SHIFT, out=index, casting="unsafe")
    # "wrap" is the mode that neither buffers nor looks for what is not there.
    np.take(a, index, out=constant, mode="wrap")
    np.subtract(out, constant, out=out)
    np.take(c, index, out=constant, mode="wrap")
    np.multiply(out, constant, out=out)


class _Room(threading.local):
    """Arrays of a thread that are used again: new ones would be mapped and zeroed by the system each time."""

    def __init__(self) -> None:
        self.bits, self.index = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int64)
        self.constant = np.empty(_BLOCK, np.float32)


_ROOM = _Room()


@lru_cache(maxsize=8)
def _table_on(device: torch.device) -> tuple[Tensor, Tensor]:
    a, c = (torch.from_numpy(each).to(device) for each in _table())
    return a, c


def normals_on_device(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The normal numbers of parts of streams: float32 ``(sum of num,)``."""
    a, c = _table_on(device)
    x = words_on_device(parts, device).to(torch.float32)
    index = (x.view(torch.int32) >> _SHIFT).bitwise_and_(2 * _SIGN - 1)
    return x.sub_(a[index]).mul_(c[index])
