"""Noisy copies of images, the same ones for the same key (`core.machine.noise_key`), bit for bit on every device.

The bits come from a cipher (`core.machine.keystream`), the normal numbers from a table (`core.machine.normal`). Runs
begun before that go on with what they had (`core.machine.former_noise`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.machine.keystream import Part
from core.machine.noise_key import noise_key
from core.machine.normal import normals_on_device, normals_on_host
from core.records import Phase

__all__ = ["Copies", "GaussianNoise", "Noise", "make_noise", "rows_of"]


@dataclass(frozen=True, slots=True)
class Copies:
    """Noisy copies that a batch holds of an image.

    Attributes:
        image: float32 ``(C, H, W)`` in [0, 1], on the device that draws.
        example_id: name of the image.
        phase: what the noise is for.
        sigma: noise level.
        first: number of the first draw, from 0.
        num: of draws.
    """

    image: Tensor
    example_id: str
    phase: Phase
    sigma: float
    first: int
    num: int


class Noise(Protocol):
    """What makes noisy copies."""

    seed: int
    """The run's."""
    kind: str
    """As a configuration names it."""

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> Tensor | None:
        """Overwrite `out` with noisy copies. Each depends on the seed, its example, phase, level and number alone.

        Args:
            out: contiguous float32 ``(sum of num, C, H, W)`` on the device that draws.
            copies: what goes there, in this order.

        Returns:
            bool, True for rows that may vote; None when all may.
        """


def make_noise(kind: str, seed: int, version: int = 2, chunk_size: int = 100) -> Noise:
    """The noise that a configuration names: its `noise`, `noise_version` and, for version 1, `compute.chunk_size`."""
    if version == 1:
        from core.machine.former_noise import FormerExactNoise, FormerGaussianNoise

        return FormerExactNoise(seed, chunk_size) if kind == "exact" else FormerGaussianNoise(seed, chunk_size)
    if kind in ("exact", "uniform", "laplace"):
        from core.machine.exact_noise import ExactNoise

        return ExactNoise(seed, kind)
    if kind == "splitting":
        from core.machine.splitting import SplittingNoise

        return SplittingNoise(seed)
    if ":" in kind:
        from core.machine.own_noise import UserNoise

        return UserNoise(kind, seed)
    return GaussianNoise(seed)


def rows_of(out: Tensor, copies: Sequence[Copies]) -> Iterator[tuple[Copies, Tensor]]:
    """The copies, each with its rows of `out`."""
    first = 0
    for each in copies:
        yield each, out[first : first + each.num]
        first += each.num


class GaussianNoise:
    """Normal noise: copies are the float32 sum of x and the float32 product sigma z, with sigma rounded to float32.

    Radii speak of no larger sigma (`core.law.Gaussian.scale`). All copies may vote.

    Args:
        seed: the run's seed.
    """

    kind = "gaussian"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
        """See `Noise.corrupt`."""
        size = out[0].numel()
        parts = [
            Part(noise_key(self.seed, c.example_id, c.phase, c.sigma, "gaussian"), c.first * size, c.num * size)
            for c in copies
        ]
        (self._on_host if out.device.type == "cpu" else self._on_device)(out, parts)
        for each, rows in rows_of(out, copies):
            rows.mul_(each.sigma).add_(each.image)  # two roundings: what does both at once may round once

    def _on_host(self, out: Tensor, parts: Sequence[Part]) -> None:
        normals_on_host(parts, out.view(-1).numpy())

    def _on_device(self, out: Tensor, parts: Sequence[Part]) -> None:
        out.copy_(normals_on_device(parts, out.device).view(out.shape))
