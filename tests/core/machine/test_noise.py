import itertools

import numpy as np
import torch
from scipy import stats

from core.machine.noise import GaussianNoise
from core.machine.noise_key import chunk_key
from core.procedures.confidence import noise_scale
from core.records import Phase


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
