"""Noisy copies of an image, the same ones for the same key (`core.machine.noise_key`).

On the CPU the 128 bits of a key seed NumPy's SFC64: `torch.Generator` keeps only 32 bits of its seed there, and two
chunks of one certificate must never coincide. On an accelerator 64 bits of it key the device's own Philox; that stream
can differ between GPU models, which is why shards record their device.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.machine.noise_key import chunk_key
from core.records import Phase

__all__ = ["GaussianNoise", "Noise", "fill_normal", "make_noise"]


class Noise(Protocol):
    """Noisy copies of an image in chunks of a fixed number of draws; see `GaussianNoise.corrupt`."""

    chunk_size: int

    def corrupt(
        self, out: Tensor, image: Tensor, example_id: str, phase: Phase, sigma: float, chunk: int
    ) -> Tensor | None:
        """See `GaussianNoise.corrupt`."""


def make_noise(kind: str, seed: int, chunk_size: int) -> Noise:
    """The noise that a configuration names: `gaussian` or `exact`."""
    if kind == "exact":
        from core.machine.exact_noise import ExactNoise

        return ExactNoise(seed, chunk_size)
    return GaussianNoise(seed, chunk_size)


class GaussianNoise:
    """Standard normal noise in chunks of a fixed number of draws.

    Args:
        seed: the run's seed.
        chunk_size: draws per chunk. It is part of the noise's definition: other chunk sizes give other noise.
    """

    def __init__(self, seed: int, chunk_size: int = 100) -> None:
        self.seed = seed
        self.chunk_size = chunk_size
        self._generators: dict[torch.device, torch.Generator] = {}

    def __repr__(self) -> str:
        return f"GaussianNoise(seed={self.seed}, chunk_size={self.chunk_size})"

    def corrupt(
        self, out: Tensor, image: Tensor, example_id: str, phase: Phase, sigma: float, chunk: int
    ) -> Tensor | None:
        """Overwrite `out` with noisy copies of `image`, float32 x + sigma * z, sigma rounded to float32: radii speak of
        no larger one (`core.procedures.confidence.noise_scale`).

        Args:
            out: contiguous float32 ``(N, C, H, W)`` on the device that draws, one or more whole chunks.
            image: float32 ``(C, H, W)`` in [0, 1], same device.
            example_id: name of the image.
            phase: what the noise is for.
            sigma: noise level.
            chunk: number of the first chunk, from 0.

        Returns:
            bool ``(N,)``, True for copies that may vote; None when all may (always so for Gaussian noise).
        """
        self.fill(out, example_id, phase, sigma, chunk)
        torch.add(image, out, alpha=sigma, out=out)
        return None

    def fill(self, out: Tensor, example_id: str, phase: Phase, sigma: float, chunk: int) -> None:
        """Overwrite `out` with the standard normal draws of chunks.

        Args:
            out: contiguous float32 ``(N, C, H, W)`` on the device that draws, one or more whole chunks.
            example_id: name of the image.
            phase: what the noise is for.
            sigma: the level that it will be scaled to.
            chunk: number of the first chunk, from 0.
        """
        size, fill = self.chunk_size, self._fill_on_host if out.device.type == "cpu" else self._fill_on_device
        for first in range(0, len(out), size):
            fill(out[first : first + size], chunk_key(self.seed, example_id, phase, sigma, chunk + first // size))

    def _fill_on_host(self, out: Tensor, key: bytes) -> None:
        fill_normal(out.numpy(), key)

    def _fill_on_device(self, out: Tensor, key: bytes) -> None:
        """Overwrite a chunk from the device's own generator."""
        generator = self._generators.get(out.device)
        if generator is None:
            generator = self._generators[out.device] = torch.Generator(out.device)
        generator.manual_seed(int.from_bytes(key, "little") & (2**63 - 1))
        out.normal_(generator=generator)


def fill_normal(out: NDArray[np.float32], key: bytes) -> None:
    """Overwrite `out`, contiguous, with the standard normal draws of a key (`core.machine.noise_key`)."""
    seed = int.from_bytes(key, "little")
    np.random.Generator(np.random.SFC64(seed)).standard_normal(dtype=np.float32, out=out)
