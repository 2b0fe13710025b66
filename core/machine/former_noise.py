"""Noise of version 1, for runs that were begun with it: resumed, audited and replayed, never begun anew.

Draws come in chunks of a fixed number, each with a key of its own. On the CPU the key's 128 bits seed NumPy's SFC64; on
an accelerator 63 bits of it seed the device's own generator, so that the two draw other noise, as GPU models may too.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.machine.exact_noise import BITS, Ints, draw_on_device, draw_on_host
from core.machine.noise import Copies
from core.machine.noise_key import random_of
from core.records import Phase

__all__ = ["FormerExactNoise", "FormerGaussianNoise", "chunk_key", "fill_normal"]


def chunk_key(seed: int, example_id: str, phase: Phase, sigma: float, chunk: int) -> bytes:
    """The 16-byte key of one chunk of noise."""
    text = f"{seed}|{phase.value}|{float(sigma).hex()}|{chunk}|{example_id}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def fill_normal(out: NDArray[np.float32], key: bytes) -> None:
    """Overwrite `out`, contiguous, with the standard normal draws of a key."""
    random_of(key).standard_normal(dtype=np.float32, out=out)


class FormerGaussianNoise:
    """Normal noise of version 1. The number of draws in a chunk is part of its definition: other chunk sizes give other
    noise.
    """

    kind = "gaussian"

    def __init__(self, seed: int, chunk_size: int) -> None:
        self.seed = seed
        self.chunk_size = chunk_size

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> Tensor | None:
        """See `core.machine.noise.Noise.corrupt`. Chunks are drawn whole, and of some only a part is used."""
        may_vote = torch.ones(len(out), dtype=torch.bool, device=out.device)
        masked, size, row = False, self.chunk_size, 0
        for each in copies:
            for start in range(each.first - each.first % size, each.first + each.num, size):
                first, end = max(start, each.first), min(start + size, each.first + each.num)
                place = slice(row + first - each.first, row + end - each.first)
                whole = out[place] if end - first == size else out.new_empty(size, *out.shape[1:])
                key = chunk_key(self.seed, each.example_id, each.phase, each.sigma, start // size)
                mask = self._draw(whole, each, key)
                if end - first < size:
                    out[place] = whole[first - start : end - start]
                if mask is not None:
                    may_vote[place], masked = mask[first - start : end - start], True
            row += each.num
        return may_vote if masked else None

    def _draw(self, out: Tensor, copies: Copies, key: bytes) -> Tensor | None:
        """Overwrite a chunk; returns which copies may vote."""
        if out.device.type == "cpu":
            fill_normal(out.numpy(), key)
        else:
            out.normal_(generator=_generator(out.device, key))
        torch.add(copies.image, out, alpha=copies.sigma, out=out)
        return None


class FormerExactNoise(FormerGaussianNoise):
    """Exact noise of version 1."""

    kind = "exact"

    def _draw(self, out: Tensor, copies: Copies, key: bytes) -> Tensor | None:
        key = hashlib.blake2b(key, digest_size=16, person=b"exact").digest()
        if out.device.type != "cpu":
            generator = _generator(out.device, key)
            uniform = torch.randint(2**BITS, out.shape, generator=generator, dtype=torch.int64, device=out.device)
            return draw_on_device(out, copies, uniform)
        stream = np.random.SFC64(int.from_bytes(key, "little"))

        def uniform_on_host(_: int, num: int) -> Ints:
            words = stream.random_raw(num)
            words >>= np.uint64(64 - BITS)
            return words.view(np.int64)

        return draw_on_host(out, copies, uniform_on_host)


def _generator(device: torch.device, key: bytes) -> torch.Generator:
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") & (2**63 - 1))
