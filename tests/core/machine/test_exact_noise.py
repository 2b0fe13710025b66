import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from core.errors import ConfigError, DataError
from core.machine import exact_noise
from core.machine.exact_noise import ExactNoise, ExactTable, exact_table
from core.machine.keystream import Part
from core.machine.noise import Copies, rows_of
from core.machine.noise_key import noise_key
from core.records import Phase
from tests.helpers.reference_noise import chacha20

Ints = NDArray[np.int64]
ONE = 2**60
SIGMAS = (0.12, 0.25, 0.5, 1.0)
PI = 31415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679


class OnDevice(ExactNoise):
    """Draws on the CPU by the code that serves an accelerator."""

    _on_host = ExactNoise._on_device


PATHS = pytest.mark.parametrize("kind", [ExactNoise, OnDevice])


def corrupt(noise: ExactNoise, out: Tensor, image: Tensor, sigma: float, first: int = 0) -> Tensor | None:
    return noise.corrupt(out, [Copies(image, "a", Phase.SELECTION, sigma, first, len(out))])


def fixed_point_floor(i: int, sigma: float) -> int:
    """floor(2^60 Phi((2i + 1) / (510 sigma))) by the Taylor series in integer arithmetic; no libraries, no floats."""
    scale = 2**320
    z = Fraction(2 * i + 1) / (510 * Fraction(sigma))
    square = int(z * z * scale)
    power = total = int(z * scale)
    for n in itertools.count(1):
        power = -power * square // (scale * 2 * n)
        total += power // (2 * n + 1)
        if abs(power) <= 1:
            break
    root = math.isqrt(2 * PI * scale**2 // 10**100)
    return (scale // 2 + total * scale // root) * ONE // scale


def certain_masses(table: ExactTable) -> Ints:
    """How many values of U fall into each bin without ambiguity, for i = -reach .. reach."""
    edges = np.concatenate([[-1], table.floors, [ONE]])
    masses: Ints = np.maximum(np.diff(edges) - 1, 0)
    return masses


def pixels(value: int, shape: tuple[int, ...] = (1, 100, 100)) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8).float().div_(255)


def integers(
    noise: ExactNoise,
    sigma: float,
    value: int = 128,
    shape: tuple[int, ...] = (1, 100, 100),
    first: int = 0,
    num: int = 100,
) -> Ints:
    """The sums of pixel and noise of copies on the grid of integers, ``(num, pixels)``."""
    out = torch.empty(num, *shape)
    corrupt(noise, out, pixels(value, shape), sigma, first)
    sums: Ints = np.rint(255 * out.double().flatten(1).numpy()).astype(np.int64)
    return sums


@pytest.mark.parametrize(("sigma", "k", "num"), [(0.12, 1, 1020), (0.25, 1, 1020), (0.5, 3, 2040), (1.0, 6, 3570)])
def test_exact_table_number_of_thresholds_follows_the_clip_range(sigma: float, k: int, num: int) -> None:
    table = exact_table(sigma)
    assert (table.k, len(table.floors), table.reach) == (k, num, num // 2)


@pytest.mark.parametrize(("sigma", "step"), [(0.12, 9), (0.25, 1), (0.5, 7), (1.0, 13)])
def test_exact_table_floors_equal_an_integer_taylor_series(sigma: float, step: int) -> None:
    table = exact_table(sigma)
    for i in range(-table.reach, table.reach, step):
        assert table.floors[i + table.reach] == fixed_point_floor(i, sigma)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_exact_table_probabilities_are_those_of_the_formula_and_add_up_to_one(sigma: float) -> None:
    table = exact_table(sigma)
    implied = np.diff(np.concatenate([[0], table.floors, [ONE]]))
    assert implied.sum() == ONE
    with mpmath.workdps(40):
        for i in range(-table.reach + 1, table.reach, 11):
            upper, lower = (mpmath.ncdf(mpmath.mpf(2 * i + s) / (510 * mpmath.mpf(sigma))) for s in (1, -1))
            assert abs(int(implied[i + table.reach]) - ONE * (upper - lower)) <= 1


@pytest.mark.parametrize("sigma", SIGMAS)
def test_exact_table_mean_is_zero_and_variance_is_that_of_rounded_noise(sigma: float) -> None:
    table = exact_table(sigma)
    masses, i = certain_masses(table), np.arange(-table.reach, table.reach + 1)
    assert sum(int(m) * int(n) for m, n in zip(masses, i, strict=True)) == 0
    variance = sum(Fraction(int(m) * int(n) ** 2, ONE) for m, n in zip(masses, i, strict=True)) / 255**2
    # The tails beyond k + 1, cut off at more than 6 sigma, hold less than a billionth of the variance.
    assert float(variance) == pytest.approx(sigma**2 + 1 / (12 * 255**2), rel=1e-9)


def test_exact_table_lumped_tails_are_what_the_clip_makes_of_them() -> None:
    for sigma in SIGMAS:
        k, reach = exact_table(sigma).k, exact_table(sigma).reach
        beyond = np.arange(reach, reach + 3000)
        for value in (0, 255):
            assert set(np.clip(value + beyond, -255 * k, 255 * (k + 1))) == {255 * (k + 1)}
            assert set(np.clip(value - beyond, -255 * k, 255 * (k + 1))) == {-255 * k}


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_exact_table_sigma_that_is_no_noise_level_raises(sigma: float) -> None:
    with pytest.raises(ConfigError, match="positive and finite"):
        exact_table(sigma)


@pytest.mark.parametrize("precision", [8, 40, 64, 256])
def test_floor_of_tail_any_starting_precision_gives_the_same_integer(precision: int) -> None:
    context = mpmath.MPContext()
    for odd in (1, 3, 77, 511, 1019, 100_001):
        expected = fixed_point_floor(-(odd + 1) // 2, 0.25) if odd < 2000 else 0
        assert exact_noise._floor_of_tail(odd, 0.25, context, precision) == expected


@pytest.mark.parametrize("sigma", SIGMAS)
def test_look_up_equals_bisection_also_next_to_every_threshold(sigma: float) -> None:
    table = exact_table(sigma)
    words = np.random.default_rng(0).integers(0, ONE, 20_000)
    near = (table.floors[:, None] + np.array([-1, 0, 1])).ravel()
    edges = np.arange(0, 2**16, 37) << 44  # where the guide's entries meet
    uniform = np.unique(np.clip(np.concatenate([words, near, edges, edges - 1, [0, ONE - 1]]), 0, ONE - 1))
    out = np.empty(len(uniform), np.float32)
    ambiguous = set(table.look_up(uniform, out).tolist())
    floors = table.floors.tolist()
    distinct = set(floors)
    for place, value in enumerate(uniform.tolist()):
        assert (place in ambiguous) == (value in distinct)
        if place not in ambiguous:
            assert out[place] == bisect_right(floors, value) - table.reach


def test_look_up_thresholds_where_entries_of_the_guide_meet_are_seen() -> None:
    entry = 2**44
    floors = np.sort(np.array([edge * entry + by for edge in (5, 9, 11) for by in (-1, 0)] + [20 * entry] * 1014))
    table = ExactTable(1, floors)
    uniform = np.array([edge * entry + by for edge in (5, 9, 11) for by in (-2, -1, 0, 1)])
    out = np.empty(12, np.float32)
    assert table.look_up(uniform, out).tolist() == [1, 2, 5, 6, 9, 10]
    assert out[[0, 3, 4, 7, 8, 11]].tolist() == [-510, -508, -508, -506, -506, -504]


def test_uniform_is_60_bits_of_the_stream_on_host_and_device() -> None:
    part = Part(b"k" * 32, 6, 200_000)
    words = chacha20(*part).astype(np.uint64)
    expected = ((words[1::2] << np.uint64(32)) | words[::2]) >> np.uint64(4)
    uniform = exact_noise._uniform_on_host(part, 0, 100_000)
    assert uniform.dtype == np.int64  # next to int64 thresholds, uint64 would be compared as float64
    assert uniform.tolist() == expected.tolist()
    assert exact_noise._uniform_on_host(part, 77, 100).tolist() == expected[77:177].tolist()
    assert exact_noise._uniform_on_device([part, part], torch.device("cpu")).tolist() == expected.tolist() * 2


@pytest.mark.parametrize("sigma", SIGMAS)
def test_look_up_centre_of_a_bin_gives_its_integer(sigma: float) -> None:
    bins = np.arange(-math.floor(255 * 5 * sigma), math.floor(255 * 5 * sigma) + 1)
    centres = np.floor(ONE * special.ndtr(bins / (255 * sigma))).astype(np.int64)
    out = np.empty(len(bins), np.float32)
    assert not len(exact_table(sigma).look_up(centres, out))
    assert np.array_equal(out, bins)


def mean_in_standard_errors(kind: type[ExactNoise]) -> float:
    sums = integers(kind(0), 0.25, num=200)
    return float((sums.mean() - 128) / (255 * 0.25 / np.sqrt(sums.size)))


@PATHS
def test_corrupt_mean_noise_is_zero(kind: type[ExactNoise]) -> None:
    assert abs(mean_in_standard_errors(kind)) < 5


@PATHS
@pytest.mark.parametrize("by", [-1, 1])
def test_corrupt_mean_noise_shows_thresholds_shifted_by_one_bin(
    kind: type[ExactNoise], by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exact_table(0.25)
    floors = np.roll(right.floors, by)
    floors[0 if by > 0 else -1] = 0 if by > 0 else ONE - 1
    monkeypatch.setattr(exact_noise, "exact_table", lambda *_: ExactTable(right.k, floors))
    assert abs(mean_in_standard_errors(kind)) > 10


@PATHS
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_corrupt_frequencies_fit_the_probabilities(kind: type[ExactNoise], sigma: float) -> None:
    sums = integers(kind(1), sigma).ravel() - 128
    edges = np.arange(-math.floor(255 * 3.5 * sigma), math.floor(255 * 3.5 * sigma) + 1)
    observed = np.bincount(np.searchsorted(edges, sums, side="right"), minlength=len(edges) + 1)
    expected = np.diff(special.ndtr(np.concatenate([[-np.inf], (edges - 0.5) / (255 * sigma), [np.inf]])))
    assert stats.chisquare(observed, expected * len(sums)).pvalue > 1e-6
    assert sums.var() == pytest.approx((255 * sigma) ** 2, rel=5 * np.sqrt(2 / len(sums)))


@PATHS
def test_corrupt_output_is_the_float32_quotient_of_integers_in_the_clip_range(kind: type[ExactNoise]) -> None:
    for value, sigma in itertools.product((0, 77, 255), (0.1, 0.25, 0.5)):
        out = torch.empty(100, 3, 20, 20)
        corrupt(kind(0), out, pixels(value, (3, 20, 20)), sigma)
        sums = integers(kind(0), sigma, value, (3, 20, 20)).reshape(out.shape)
        k = exact_table(sigma).k
        assert sums.min() >= -255 * k
        assert sums.max() <= 255 * (k + 1)
        assert np.array_equal(out.numpy(), sums.astype(np.float32) / np.float32(255))


PLANTED = pytest.mark.parametrize(
    ("kind", "source"), [(ExactNoise, "_uniform_on_host"), (OnDevice, "_uniform_on_device")], ids=["host", "device"]
)


def plant(monkeypatch: pytest.MonkeyPatch, source: str, planted: Ints) -> None:
    """Let the uniform integers of the stream start with these."""

    def on_host(part: Part, first: int, num: int) -> Ints:
        assert part.first == 0
        return planted[first : first + num]

    def on_device(parts: Sequence[Part], device: torch.device) -> Tensor:
        (part,) = parts
        return torch.from_numpy(planted[: part.num // 2].copy())

    monkeypatch.setattr(exact_noise, source, on_host if source == "_uniform_on_host" else on_device)


@PLANTED
def test_corrupt_extreme_draws_end_at_the_clip_whatever_the_pixel(
    kind: type[ExactNoise], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, source, np.array([0, ONE - 1]))
    for value in (0, 1, 128, 255):
        out = torch.empty(2, 1, 1, 1)
        mask = corrupt(kind(0), out, pixels(value, (1, 1, 1)), 0.25)
        assert mask is None or mask.all()
        assert out.flatten().tolist() == [-1.0, 2.0]


@PLANTED
def test_corrupt_copies_with_an_ambiguous_pixel_may_not_vote(
    kind: type[ExactNoise], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    floors, fine = exact_table(0.25).floors, ONE // 3
    # Copies of two pixels: 0 ambiguous in its second, 1 next to a threshold on both sides, 2 in its first, 3 untouched.
    planted = np.array([fine, floors[0], floors[510] - 1, floors[510] + 1, floors[-1], fine, fine, fine])
    plant(monkeypatch, source, planted)
    mask = corrupt(kind(0), torch.empty(4, 1, 1, 2), pixels(7, (1, 1, 2)), 0.25)
    assert mask is not None
    assert (mask.dtype, mask.tolist()) == (torch.bool, [False, True, False, True])


@pytest.mark.parametrize(("value", "off"), [(7.3, "0.3"), (-0.25, "0.25"), (300.0, "45")])
def test_corrupt_pixel_off_the_grid_is_refused_with_its_distance(value: float, off: str) -> None:
    image = pixels(7, (1, 2, 2))
    image[0, 1, 0] = value / 255
    with pytest.raises(DataError, match=rf"example 'a'.* one is {off}/255 off"):
        corrupt(ExactNoise(0), torch.empty(4, 1, 2, 2), image, 0.25)


@PATHS
def test_corrupt_several_images_at_once_gives_what_each_gives_alone(kind: type[ExactNoise]) -> None:
    many = torch.empty(12, 1, 2, 3)
    asked = [
        Copies(pixels(value, (1, 2, 3)), name, phase, sigma, first, num)
        for value, name, phase, sigma, first, num in (
            (7, "a", Phase.SELECTION, 0.25, 5, 4),
            (9, "b", Phase.SELECTION, 0.5, 0, 1),
            (7, "a", Phase.ESTIMATION, 0.25, 0, 7),
        )
    ]
    kind(0).corrupt(many, asked)
    for each, rows in rows_of(many, asked):
        one = torch.empty(each.num, 1, 2, 3)
        ExactNoise(0).corrupt(one, [each])
        assert torch.equal(rows, one)


def test_corrupt_several_images_at_once_masks_copies_of_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(part: Part, first: int, num: int) -> Ints:
        planted = np.full(num, ONE // 3)
        planted[4 - first : 5 - first] = exact_table(0.25).floors[500] if part.first == 8 else ONE // 3
        return planted

    monkeypatch.setattr(exact_noise, "_uniform_on_host", uniform)
    image = pixels(7, (1, 1, 2))
    asked = [Copies(image, "a", Phase.SELECTION, 0.25, first, 4) for first in (0, 2, 4)]
    mask = ExactNoise(0).corrupt(torch.empty(12, 1, 1, 2), asked)
    assert mask is not None
    assert mask.tolist() == [True] * 6 + [False] + [True] * 5
    assert ExactNoise(0).corrupt(torch.empty(4, 1, 1, 2), asked[:1]) is None


def test_corrupt_in_blocks_gives_the_same_copies_and_masks_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = integers(ExactNoise(0), 0.25, shape=(1, 4, 4), num=3)
    monkeypatch.setattr(exact_noise, "BLOCK", 7)
    assert np.array_equal(integers(ExactNoise(0), 0.25, shape=(1, 4, 4), num=3), whole)
    planted = np.full(10, ONE // 3)
    planted[[0, 7]] = exact_table(0.25).floors[500]  # first in each block
    plant(monkeypatch, "_uniform_on_host", planted)
    mask = corrupt(ExactNoise(0), torch.empty(5, 1, 1, 2), pixels(7, (1, 1, 2)), 0.25)
    assert mask is not None
    assert mask.tolist() == [False, True, True, False, True]


@PATHS
def test_corrupt_same_arguments_give_the_same_copies_and_others_independent_ones(kind: type[ExactNoise]) -> None:
    def copies(
        seed: int = 0, name: str = "a", phase: Phase = Phase.SELECTION, sigma: float = 0.5, first: int = 0
    ) -> Tensor:
        out = torch.empty(100, 3, 8, 8)
        kind(seed).corrupt(out, [Copies(pixels(128, (3, 8, 8)), name, phase, sigma, first, 100)])
        return (out - 128 / 255) / sigma

    assert torch.equal(copies(), copies())
    others = [copies(seed=1), copies(name="b"), copies(phase=Phase.ESTIMATION), copies(sigma=0.25), copies(first=100)]
    for one, two in itertools.combinations([copies(), *others], 2):
        assert abs(float((one * two).mean())) < 5 / np.sqrt(one.numel())


def test_corrupt_shares_no_stream_with_gaussian_noise() -> None:
    assert len({noise_key(0, "a", Phase.SELECTION, 0.5, kind) for kind in ("gaussian", "exact")}) == 2


@PATHS
def test_corrupt_writes_into_a_slice_like_into_a_whole_tensor(kind: type[ExactNoise]) -> None:
    big, whole, image = torch.full((300, 3, 8, 8), 9.0), torch.empty(100, 3, 8, 8), pixels(50, (3, 8, 8))
    corrupt(kind(0), big[100:200], image, 0.5)
    corrupt(kind(0), whole, image, 0.5)
    assert torch.equal(big[100:200], whole)
    assert (big[:100] == 9).all()
    assert (big[200:] == 9).all()


def test_corrupt_8_bit_pixels_divided_with_rounding_errors_give_the_same_copies() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).float()
    first = torch.empty(100, 1, 16, 16)
    corrupt(ExactNoise(0), first, values / 255, 0.25)
    for image in (values * (1 / 255), (values.double() / 255).float(), values / 255 - 1e-6, values / 255 + 1e-6):
        out = torch.empty(100, 1, 16, 16)
        corrupt(ExactNoise(0), out, image, 0.25)
        assert torch.equal(out, first)


@PATHS
def test_corrupt_one_object_at_several_levels_gives_what_fresh_ones_give(kind: type[ExactNoise]) -> None:
    noise = kind(0)
    for sigma in (0.25, 0.5, 1.0, 0.25):
        assert np.array_equal(integers(noise, sigma, shape=(1, 8, 8)), integers(kind(0), sigma, shape=(1, 8, 8)))


@pytest.mark.parametrize("value", [0.3, 100.5 / 255, (100 + 2e-3) / 255, 256 / 255, -1 / 255, math.nan, math.inf])
def test_corrupt_off_grid_image_raises_and_names_the_example_and_the_remedy(value: float) -> None:
    image = pixels(100, (1, 4, 4))
    image[0, 2, 1] = value
    with pytest.raises(DataError, match=r"example 'cat-7'.*multiples of 1/255.*pass 8-bit images"):
        ExactNoise(0).corrupt(torch.empty(9, 1, 4, 4), [Copies(image, "cat-7", Phase.SELECTION, 0.25, 0, 9)])
