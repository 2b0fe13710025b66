"""Planted generators: each falsifies certificates, and each is caught; and honest noise is not stopped."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import NoiseError
from core.machine import exact_noise, noise_check
from core.machine import noise as noise_module
from core.machine.exact_noise import ExactNoise
from core.machine.noise import Copies, GaussianNoise, Noise, make_noise, rows_of
from core.machine.noise_check import check_noise, problems
from core.machine.noise_key import noise_key
from core.records import Phase

CPU = torch.device("cpu")


class Planted(GaussianNoise):
    """Noise whose numbers, or whose requests, a fault has changed on the way."""

    def __init__(
        self,
        of_numbers: Callable[[Tensor], Tensor] = lambda z: z,
        of_request: Callable[[Copies], Copies] = lambda copies: copies,
    ) -> None:
        super().__init__(0)
        self.of_numbers, self.of_request = of_numbers, of_request

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
        super().corrupt(out, [self.of_request(each) for each in copies])
        for each, rows in rows_of(out, copies):
            rows.sub_(each.image).copy_(self.of_numbers(rows / each.sigma) * each.sigma).add_(each.image)


def heavier(z: Tensor, by: float) -> Tensor:
    """The same sign, order, mean and (within 1e-3) variance; other tails."""
    return z.sign() * z.abs() ** (1 + by) / 2 ** (by / 2 * 1.27)


def antithetic(z: Tensor) -> Tensor:
    other = z.clone()
    other[1::2] = -z[: len(z) // 2 * 2 : 2]
    return other


def of_16_bits(copies: Copies) -> Copies:
    """Another key for each name, of 65,536."""
    return replace(copies, example_id=blake2b(copies.example_id.encode(), digest_size=2).hexdigest())


class SharedLevels(GaussianNoise):
    """Of a key that does not know the level."""

    def corrupt(self, out: Tensor, copies: Sequence[Copies]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                noise_module,
                "noise_key",
                lambda seed, name, phase, sigma, kind: noise_key(seed, name, phase, 0.5, kind),
            )
            super().corrupt(out, copies)


PLANTS: dict[str, Noise] = {
    "scaled by 1.01": Planted(lambda z: z * 1.01),
    "shifted": Planted(lambda z: z + 0.005),
    "tails beyond 3 pulled in": Planted(lambda z: torch.where(z.abs() > 3, z.sign() * (3 + (z.abs() - 3) * 0.8), z)),
    "one tail cut at 4": Planted(lambda z: z.clamp(max=4.0)),
    "lighter tails, as in arXiv 2306.14043": Planted(lambda z: heavier(z, -0.02)),
    "heavier tails": Planted(lambda z: heavier(z, 0.02)),
    "skewed": Planted(lambda z: z + 0.005 * (z * z - 1)),
    "float16": Planted(lambda z: z.half().float()),
    "bfloat16": Planted(lambda z: z.bfloat16().float()),
    "of 12 bits": Planted(lambda z: torch.special.ndtri((torch.special.ndtr(z) * 2**12).floor().add(0.5) / 2**12)),
    "antithetic pairs": Planted(antithetic),
    "one sign for two copies": Planted(lambda z: torch.cat([z[: len(z) // 2], z[: len(z) - len(z) // 2]])),
    "phases share a stream": Planted(of_request=lambda c: replace(c, phase=Phase.SELECTION)),
    "levels share a stream": SharedLevels(0),
    "examples share a stream": Planted(of_request=lambda c: replace(c, example_id="x")),
    "draws are not counted on": Planted(of_request=lambda c: replace(c, first=0)),
    "chunks overlap by half a copy": Planted(of_request=lambda c: replace(c, first=c.first // 100)),
    "a seed of 16 bits": Planted(of_request=of_16_bits),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_problems_of_a_planted_generator_are_found(name: str) -> None:
    assert next(problems(PLANTS[name], CPU), None)


@pytest.mark.parametrize(("kind", "version"), [("gaussian", 2), ("exact", 2), ("gaussian", 1), ("exact", 1)])
def test_problems_of_honest_noise_are_none(kind: str, version: int) -> None:
    assert list(problems(make_noise(kind, 0, version), CPU)) == []


def test_check_noise_stops_what_is_wrong_and_says_what() -> None:
    check_noise(GaussianNoise(0), "cpu")
    with pytest.raises(NoiseError, match=r"on cpu is not what certificates assume: .*moment of order 2 is 1\.02"):
        check_noise(PLANTS["scaled by 1.01"], "cpu")


def test_problems_of_exact_noise_of_thresholds_off_by_one_bin_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exact_noise.exact_table(1.0)
    shifted = exact_noise.ExactTable(right.k, np.roll(right.floors, 1) * (np.arange(len(right.floors)) > 0))
    monkeypatch.setattr(exact_noise, "exact_table", lambda *_: shifted)
    assert any("moment of order 1" in found for found in problems(ExactNoise(0), CPU))


def test_problems_of_a_device_with_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of two million is off by a unit or two; the device is the CPU by another name."""
    drawn = noise_check._drawn

    def on(noise: Noise, copies: list[Copies], device: torch.device) -> Tensor:
        out = drawn(noise, copies, CPU)
        if device.type != "cpu":
            out.view(-1)[77] *= 1 + 2**-22
        return out

    monkeypatch.setattr(noise_check, "_drawn", on)
    assert list(problems(GaussianNoise(0), torch.device("meta"))) == ["its bits are not those of the CPU"]
