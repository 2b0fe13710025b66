"""The bits behind all noise: the ChaCha20 keystream of a key (`core.machine.noise_key`), the same on any device.

A stream is addressed by the position of its 32-bit words, so that any part of it can be made alone, in any order. Why a
cipher: a network whose votes were other ones under these bits than under uniform ones would tell ChaCha20 from chance,
and in spite of much looking nothing is known that does; no statistical test of a generator shows as much.

Two forms, equal bit for bit: OpenSSL's on the CPU, and 32-bit additions, exclusive ors and shifts of torch elsewhere.
The state is that of Bernstein's ChaCha20: 256 bits of key, a counter of blocks of 64 bits from 0, and a nonce of 64
bits, here 0. RFC 8439 divides these last 128 bits otherwise, which changes nothing up to block 2^32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Part", "words_on_device", "words_on_host"]

BLOCK = 16
"""32-bit words of a block of ChaCha20."""

SPAN = BLOCK * 2**32
"""Words until the library's counter, one of 32 bits, would have to carry into the nonce."""

ZEROS = memoryview(bytes(2**18))
"""What is encrypted: the keystream is left."""

CONSTANTS = np.frombuffer(b"expand 32-byte k", np.int32)


class Part(NamedTuple):
    """Some words of a stream.

    Attributes:
        key: 32 bytes.
        first: position of the first word, from 0.
        num: of words.
    """

    key: bytes
    first: int
    num: int


def words_on_host(part: Part, out: NDArray[np.int32]) -> None:
    """Overwrite `out`, contiguous int32 ``(part.num,)``, with the words of a part."""
    if (left := SPAN - part.first % SPAN) < part.num:
        words_on_host(Part(part.key, part.first, left), out[:left])
        words_on_host(Part(part.key, part.first + left, part.num - left), out[left:])
        return
    block, skipped = divmod(part.first, BLOCK)
    stream = Cipher(algorithms.ChaCha20(part.key, block.to_bytes(16, "little")), None).encryptor()
    if skipped:
        stream.update(ZEROS[: 4 * skipped])
    room = out.data.cast("B")
    for first in range(0, len(room), len(ZEROS)):
        piece = room[first : first + len(ZEROS)]
        stream.update_into(ZEROS[: len(piece)], piece)


def words_on_device(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The words of parts, one part after the other: int32 ``(sum of num,)``; a few hundred operations for all.

    Each is an addition, exclusive or or shift of 32 bits: whatever computes and however it is compiled, it gives these
    bits.
    """
    begins = np.array([part.first // BLOCK for part in parts], np.int64)
    counts = [-(-(part.first + part.num) // BLOCK) - begin for part, begin in zip(parts, begins, strict=True)]
    firsts = np.cumsum([0, *counts])
    total = int(firsts[-1])
    keys = np.frombuffer(b"".join(part.key for part in parts), np.int32).reshape(-1, 8)
    which = _sent(np.arange(len(parts)), device).repeat_interleave(_sent(np.array(counts), device), output_size=total)
    counters = torch.arange(total, device=device) + _sent(begins - firsts[:-1], device)[which]
    start = torch.zeros((4, 4, total), dtype=torch.int32, device=device)
    start[0] = _sent(CONSTANTS, device)[:, None]
    start[1:3] = _sent(keys, device)[which].T.reshape(2, 4, total)
    start[3, :2] = counters.view(torch.int32).view(total, 2).T
    a, b, c, d = start.clone()
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # diagonals become columns
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    words = torch.stack([a, b, c, d]).add_(start).view(BLOCK, -1).T.flatten()
    starts = [BLOCK * int(place) + part.first % BLOCK for place, part in zip(firsts, parts, strict=False)]
    return torch.cat([words[start : start + part.num] for start, part in zip(starts, parts, strict=True)])


def _sent(host: NDArray[Any], device: torch.device) -> Tensor:
    """On the device, without waiting for what is queued there."""
    tensor = torch.from_numpy(host.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """The quarter round of RFC 8439, section 2.1, on all columns at once, in place."""
    for one, two, three, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        one.add_(two)
        three.bitwise_xor_(one)
        wrapped = (three >> (32 - by)).bitwise_and_((1 << by) - 1)  # without the copies of the sign that are shifted in
        three.bitwise_left_shift_(by).bitwise_or_(wrapped)
