import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from core.machine.exact_noise import ExactNoise
from core.machine.noise import GaussianNoise, make_noise
from core.machine.noise_key import chunk_key
from core.procedures.confidence import noise_scale
from core.records import Phase


class OnDevice(GaussianNoise):
    """Draws on the CPU by the code that serves an accelerator."""

    _fill_on_host = GaussianNoise._fill_on_device


def chunk(seed: int = 0, example: str = "a", phase: Phase = Phase.SELECTION, sigma: float = 0.5, number: int = 0):  # type: ignore[no-untyped-def]
    out = torch.empty(100, 3, 8, 8)
    GaussianNoise(seed).fill(out, example, phase, sigma, number)
    return out


def test_fill_same_key_gives_same_noise() -> None:
    assert torch.equal(chunk(), chunk())


def test_fill_any_part_of_the_key_changed_gives_other_noise() -> None:
    base = chunk()
    others = [chunk(seed=1), chunk(example="b"), chunk(phase=Phase.ESTIMATION), chunk(sigma=0.25), chunk(number=1)]
    for one, two in itertools.combinations([base, *others], 2):
        correlation = float((one * two).mean())
        assert abs(correlation) < 5 / np.sqrt(one.numel())


def test_fill_several_chunks_at_once_gives_what_each_gives_alone() -> None:
    out = torch.empty(300, 3, 8, 8)
    GaussianNoise(0).fill(out, "a", Phase.SELECTION, 0.5, 4)
    assert torch.equal(out, torch.cat([chunk(number=number) for number in (4, 5, 6)]))


def test_fill_is_standard_normal() -> None:
    values = torch.cat([chunk(number=i).flatten() for i in range(10)]).double().numpy()
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * len(values))
    assert stats.kstest(values, "norm").pvalue > 1e-6


def test_chunk_key_separates_fields_that_could_run_together() -> None:
    keys = {
        chunk_key(1, "1|x", Phase.SELECTION, 0.5, 1),
        chunk_key(1, "x", Phase.SELECTION, 0.5, 11),
        chunk_key(11, "x", Phase.SELECTION, 0.5, 1),
        chunk_key(1, "x", Phase.SELECTION, 0.5 + 2**-53, 1),
        chunk_key(1, "x", Phase.SELECTION, 0.5, 1),
    }
    assert len(keys) == 5
    assert all(len(key) == 16 for key in keys)


def test_fill_writes_into_a_slice_like_into_a_whole_tensor() -> None:
    big = torch.zeros(300, 3, 8, 8)
    GaussianNoise(0).fill(big[100:200], "a", Phase.SELECTION, 0.5, 0)
    assert torch.equal(big[100:200], chunk())
    assert not big[:100].any()
    assert not big[200:].any()


def test_corrupt_scales_with_the_float32_and_radii_speak_of_no_more() -> None:
    """0.12 is scaled with 0.1199999973: without an image and with draws of 2^k the product shows the factor itself."""
    for sigma in (0.12, 0.1, 0.25, 0.5, 0.7, 1.0):
        noise, out = GaussianNoise(0), torch.empty(100, 1, 8, 8)
        noise.fill = lambda out, *key: out.fill_(8.0)  # type: ignore[method-assign]
        noise.corrupt(out, torch.zeros(1, 8, 8), "a", Phase.ESTIMATION, sigma, 0)
        applied = set((out.double() / 8.0).flatten().tolist())
        assert len(applied) == 1
        assert float(noise_scale(sigma)) == min(sigma, *applied)


def test_corrupt_is_the_image_plus_sigma_times_the_normal_draws_of_the_key() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = torch.full((200, 3, 8, 8), torch.nan)
    assert GaussianNoise(5).corrupt(out, image, "a", Phase.ESTIMATION, 0.12, 3) is None
    for number, copies in ((3, out[:100]), (4, out[100:])):
        seed = int.from_bytes(chunk_key(5, "a", Phase.ESTIMATION, 0.12, number), "little")
        normal = np.random.Generator(np.random.SFC64(seed)).standard_normal((100, 3, 8, 8), np.float32)
        expected = image.double() + 0.12 * torch.from_numpy(normal).double()
        torch.testing.assert_close(copies.double(), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", GaussianNoise), ("exact", ExactNoise)])
def test_make_noise_is_the_one_that_is_named(kind: str, expected: type[GaussianNoise | ExactNoise]) -> None:
    noise = make_noise(kind, 7, 30)
    assert type(noise) is expected
    assert repr(noise) == f"{expected.__name__}(seed=7, chunk_size=30)"
    assert repr(expected(7)) == f"{expected.__name__}(seed=7, chunk_size=100)"


def test_fill_on_a_device_seeds_its_one_generator_with_63_bits_of_the_key() -> None:
    noise, state = OnDevice(5, chunk_size=20), torch.get_rng_state()
    out = torch.empty(60, 1, 4, 4)
    generators = []
    for sigma in (0.25, 0.5):
        noise.fill(out, "a", Phase.ESTIMATION, sigma, 3)
        for number, copies in ((3, out[:20]), (4, out[20:40]), (5, out[40:])):
            seed = int.from_bytes(chunk_key(5, "a", Phase.ESTIMATION, sigma, number), "little") % 2**63
            expected = torch.empty(20, 1, 4, 4).normal_(generator=torch.Generator().manual_seed(seed))
            assert torch.equal(copies, expected)
        generators.append(noise._generators[torch.device("cpu")])
    assert torch.equal(torch.get_rng_state(), state)
    assert generators[0] is generators[1]
