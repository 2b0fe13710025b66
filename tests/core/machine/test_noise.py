import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from core.law import GAUSSIAN
from core.machine.exact_noise import ExactNoise
from core.machine.former_noise import FormerExactNoise, FormerGaussianNoise
from core.machine.noise import Copies, GaussianNoise, Noise, make_noise, rows_of
from core.machine.noise_key import noise_key
from core.records import Phase
from tests.helpers.reference_noise import normals, stream_key

NOTHING = torch.zeros(3, 8, 8)


class OnDevice(GaussianNoise):
    """Draws on the CPU by the code that serves an accelerator."""

    _on_host = GaussianNoise._on_device


PATHS = pytest.mark.parametrize("kind", [GaussianNoise, OnDevice])


def draws(
    seed: int = 0, name: str = "a", phase: Phase = Phase.SELECTION, sigma: float = 0.5, first: int = 0, num: int = 100
) -> Tensor:
    out = torch.empty(num, 3, 8, 8)
    GaussianNoise(seed).corrupt(out, [Copies(NOTHING, name, phase, sigma, first, num)])
    return out


def test_corrupt_any_part_of_the_key_changed_gives_other_noise_and_the_same_key_the_same() -> None:
    assert torch.equal(draws(), draws())
    others = [draws(seed=1), draws(name="b"), draws(phase=Phase.ESTIMATION), draws(sigma=0.25), draws(first=100)]
    for one, two in itertools.combinations([draws(), *others], 2):
        assert abs(float((one * two).mean() / one.std() / two.std())) < 5 / np.sqrt(one.numel())


def test_corrupt_is_standard_normal() -> None:
    values = draws(num=1000).flatten().double().numpy() / 0.5
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * len(values))
    assert stats.kstest(values, "norm").pvalue > 1e-6


def test_noise_key_separates_fields_that_could_run_together() -> None:
    keys = {
        noise_key(1, "1|x", Phase.SELECTION, 0.5, "gaussian"),
        noise_key(1, "x", Phase.SELECTION, 0.5, "gaussian"),
        noise_key(11, "x", Phase.SELECTION, 0.5, "gaussian"),
        noise_key(1, "x", Phase.SELECTION, 0.5 + 2**-53, "gaussian"),
        noise_key(1, "x", Phase.SELECTION, 0.5, "exact"),
    }
    assert len(keys) == 5
    assert all(len(key) == 32 for key in keys)
    assert noise_key(1, "x", Phase.SELECTION, 0.5, "exact") == stream_key(1, "x", "selection", 0.5, "exact")


@PATHS
def test_corrupt_is_the_image_plus_sigma_times_the_normal_draws_of_the_key(kind: type[GaussianNoise]) -> None:
    """Several images in one batch, parts of their streams, a size that is no multiple of a cipher's block."""
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    asked = [
        Copies(images[0], "a", Phase.ESTIMATION, 0.12, 3, 200),
        Copies(images[1], "b", Phase.ESTIMATION, 0.12, 0, 1),
        Copies(images[0], "a", Phase.SELECTION, 0.25, 17, 40),
    ]
    big = torch.full((300, 3, 5, 7), 9.0)
    out = big[20:261]
    noise: Noise = kind(5)
    assert noise.corrupt(out, asked) is None
    for each, rows in rows_of(out, asked):
        z = normals(5, each.example_id, each.phase.value, each.sigma, each.num, (3, 5, 7), each.first)
        expected = each.image.double() + each.sigma * torch.from_numpy(z).double()
        torch.testing.assert_close(rows.double(), expected, rtol=0.0, atol=1e-6)
    assert (big[:20] == 9).all()
    assert (big[261:] == 9).all()


def test_corrupt_of_host_and_device_are_the_same_bits() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = [Copies(image, f"x{n}", Phase.ESTIMATION, 0.12, 100 * n, 50 + n) for n in range(5)]
    one, other = torch.empty(2, 260, 3, 32, 32)
    GaussianNoise(1).corrupt(one, asked)
    OnDevice(1).corrupt(other, asked)
    assert torch.equal(one, other)


def test_corrupt_rounds_product_and_sum_as_ieee_754_has_it() -> None:
    """By float64, where the product of two float32 is exact: on no device may the two become one."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    with_image = torch.empty(100, 3, 8, 8)
    GaussianNoise(0).corrupt(with_image, [Copies(image, "a", Phase.SELECTION, 0.12, 0, 100)])
    z = torch.empty(100, 3, 8, 8)
    GaussianNoise(0)._on_host(z, [_part_of("a", 0.12, 100 * 192)])
    product = (z.double() * float(np.float32(0.12))).float()
    assert torch.equal(with_image, (product.double() + image.double()).float())


def _part_of(name: str, sigma: float, num: int):  # type: ignore[no-untyped-def]
    from core.machine.keystream import Part

    return Part(stream_key(0, name, "selection", sigma), 0, num)


def test_corrupt_scales_with_the_float32_and_radii_speak_of_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.12 is scaled with 0.1199999973: without an image and with draws of 2^k the product shows the factor itself."""
    monkeypatch.setattr(GaussianNoise, "_on_host", lambda self, out, parts: out.fill_(8.0))
    for sigma in (0.12, 0.1, 0.25, 0.5, 0.7, 1.0):
        applied = set((draws(sigma=sigma).double() / 8.0).flatten().tolist())
        assert len(applied) == 1
        assert float(GAUSSIAN.scale(sigma)) == min(sigma, *applied)


@pytest.mark.parametrize(
    ("kind", "version", "expected"),
    [
        ("gaussian", 2, GaussianNoise),
        ("exact", 2, ExactNoise),
        ("gaussian", 1, FormerGaussianNoise),
        ("exact", 1, FormerExactNoise),
    ],
)
def test_make_noise_is_the_one_that_is_named(kind: str, version: int, expected: type[Noise]) -> None:
    noise = make_noise(kind, 7, version, 30)
    assert type(noise) is expected
    assert noise.seed == 7
    assert getattr(noise, "chunk_size", 30) == 30
    assert type(make_noise(kind, 7)) is {"gaussian": GaussianNoise, "exact": ExactNoise}[kind]


@pytest.mark.parametrize(("kind", "version"), [("gaussian", 1), ("gaussian", 2), ("exact", 2)])
def test_votes_of_examples_are_independent(kind: str, version: int) -> None:
    """What a bound over a data set rests on: votes for one image under many names vary as binomial ones do."""
    noise, num, names = make_noise(kind, 11, version, 25), 50, 800
    image = torch.full((1, 2, 2), 0.0)
    out = torch.empty(num * names, 1, 2, 2)
    noise.corrupt(out, [Copies(image, f"example {n}", Phase.ESTIMATION, 0.5, 0, num) for n in range(names)])
    for votes in (out.flatten(1).sum(dim=1) > 0.3, out[:, 0, 0, 0] > 0.3):
        counts = votes.view(names, num).sum(dim=1).double().numpy()
        p = counts.mean() / num
        spread = counts.var() / (num * p * (1 - p))  # 0 of one stream for all
        assert abs(spread - 1) < 4.5 * (2 / names) ** 0.5
        for lag in (1, 2, 7):
            assert abs(np.corrcoef(counts[lag:], counts[:-lag])[0, 1]) < 4.5 / names**0.5
