"""l1 noise as it is drawn: its distribution, half-spaces and boxes, splitting by brute force, and planted faults."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from core import DualSmoothedClassifier, SmoothedClassifier
from core.errors import ConfigError, DataError, DualRSError
from core.law import GAUSSIAN, LAPLACE, SPLITTING, UNIFORM, Law
from core.machine import exact_noise, noise_check
from core.machine.exact_noise import BITS, ExactNoise, exact_table
from core.machine.keystream import Part, words_on_host
from core.machine.noise import Copies, Noise, make_noise
from core.machine.noise_check import problems
from core.machine.noise_key import noise_key
from core.machine.splitting import SplittingNoise, offsets, split
from core.records import Phase
from core.training.samples import STANDARD
from tests.helpers.oracles import HalfSpace, Scaled, axis

CPU = torch.device("cpu")


def drawn(
    noise: Noise, image: Tensor, sigma: float, num: int, phase: Phase = Phase.ESTIMATION, first: int = 0
) -> Tensor:
    out = torch.empty(num, *image.shape)
    noise.corrupt(out, [Copies(image, "x", phase, sigma, first, num)])
    return out


@pytest.mark.parametrize("sigma", [0.05, 0.25, 1.0])
def test_tables_are_the_distributions_rounded_to_eight_bits(sigma: float) -> None:
    width = 2 * int(mpmath.nint((510 * sigma * math.sqrt(3) - 1) / 2)) + 1
    uniform, laplace = exact_table(sigma, "uniform"), exact_table(sigma, "laplace")
    assert uniform.reach == (width - 1) // 2
    assert uniform.floors.tolist() == [math.floor(Fraction(i * 2**BITS, width)) for i in range(1, width)]
    with mpmath.workdps(40):
        for i in (0, 1, 7, 40, 200):
            tail = mpmath.exp(-(2 * i + 1) / (510 * mpmath.mpf(sigma) / mpmath.sqrt(2))) / 2
            assert laplace.floors[laplace.reach + i] == mpmath.floor(2**BITS * (1 - tail))
            assert laplace.floors[laplace.reach - 1 - i] == mpmath.floor(2**BITS * tail)


@pytest.mark.parametrize("kind", ["uniform", "laplace"])
def test_copies_are_integers_from_the_keystream_in_any_pieces(kind: str) -> None:
    image, noise = torch.randint(256, (2, 3, 3)).float() / 255, ExactNoise(5, kind)
    whole = drawn(noise, image, 0.25, 40)
    assert torch.equal(whole[17:], drawn(noise, image, 0.25, 23, first=17))
    words = np.empty(2 * 40 * 18, np.int32)
    words_on_host(Part(noise_key(5, "x", Phase.ESTIMATION, 0.25, kind), 0, len(words)), words)
    table = exact_table(0.25, kind)
    integers = np.searchsorted(table.floors, (words.view(np.uint64) >> 4).astype(np.int64), side="right") - table.reach
    pixels = np.rint(255 * image.numpy()) + integers.reshape(40, 2, 3, 3)
    expected = np.clip(pixels, -255 * table.k, 255 * (table.k + 1)).astype(np.float32) / np.float32(255)
    assert np.array_equal(whole.numpy(), expected)
    assert not torch.equal(whole, drawn(ExactNoise(5), image, 0.25, 40))
    with pytest.raises(DataError, match="this noise needs pixels that are multiples of 1/255"):
        drawn(noise, image + 0.001, 0.25, 1)


@pytest.mark.parametrize("sigma", [0.001, 0.25])  # at the first uniform noise is 0 everywhere
@pytest.mark.parametrize("kind", ["uniform", "laplace"])
def test_device_form_draws_the_same_bits(kind: str, sigma: float) -> None:
    image, noise = torch.randint(256, (2, 3, 3)).float() / 255, ExactNoise(5, kind)
    out, copies = torch.empty(40, 2, 3, 3), [Copies(image, "x", Phase.ESTIMATION, sigma, 0, 40)]
    noise._on_device(out, copies, [Part(noise_key(5, "x", Phase.ESTIMATION, sigma, kind), 0, 2 * 40 * 18)])
    assert torch.equal(out, drawn(noise, image, sigma, 40))


class Box:
    """Votes for class 1 where all pixels are at most t."""

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, images: Tensor) -> Tensor:
        inside = (self.t - images.flatten(1)).amin(dim=1)
        return torch.stack([-inside, inside], dim=1)


@pytest.mark.parametrize(("kind", "law"), [("uniform", UNIFORM), ("laplace", LAPLACE)])
def test_half_spaces_and_boxes_are_certified_up_to_their_l1_distance(kind: str, law: Law) -> None:
    image = torch.full((1, 4, 4), 204 / 255)
    lam = float(law.scale(0.5))
    plane = SmoothedClassifier(HalfSpace(axis(16, 3), 0.5), 2, 0.5, noise=kind).certify(image, num_estimation=20_000)
    assert 0.8 * 0.3 < plane.radius <= 0.3 + 0.5 / 255  # along an axis the half-space is the worst case
    diagonal = HalfSpace(torch.full((16,), 0.25), 4 * 0.7)  # l1 distance 16 * 0.1, l2 distance 0.4
    certificate = SmoothedClassifier(diagonal, 2, 0.25, noise=kind).certify(image, num_estimation=20_000)
    assert 0.3 < certificate.radius <= 16 * (0.8 - 0.7)
    t, num = 0.8 + 0.9 * lam, 20_000
    box = SmoothedClassifier(Box(t), 2, 0.5, noise=kind).certify(image[:, :1, :2], num_estimation=num)
    one = 0.95 if kind == "uniform" else 1 - math.exp(-0.9) / 2  # P[a pixel is inside]; two of them
    share = 1 / (2 * one)  # to what a pixel's probability has to fall
    farther = 2 * lam * (one - share) if kind == "uniform" else 0.9 * lam - lam * float(LAPLACE.quantile(share))
    assert 0.0 < box.radius <= farther + 0.5 / 255
    assert box.radius == pytest.approx(float(lam * law.quantile(one**2)), rel=0.2)


@pytest.mark.parametrize("kind", ["uniform", "laplace"])
def test_honest_noise_passes_and_planted_laws_and_noises_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, law = ExactNoise(3, kind), UNIFORM if kind == "uniform" else LAPLACE
    assert not list(problems(noise, CPU))
    zeros = torch.zeros(1, 16, 32)
    numbers = np.sort(drawn(noise, zeros, 1.0, 4096).numpy().ravel().astype(np.float64))
    assert not list(noise_check._contradictions(numbers, law))
    for planted in (Scaled(law, 2.0), Scaled(law, 1.05), Scaled(GAUSSIAN, 1.0), Scaled(LAPLACE, 2.0)):
        assert list(noise_check._contradictions(numbers, planted))
    right = exact_table(1.0, kind)
    shifted = exact_noise.ExactTable(right.k, np.concatenate([right.floors[1:], right.floors[-1:]]))
    wider = exact_table(1.02, kind)
    for table in (shifted, wider):  # off by one grey level; another sigma
        monkeypatch.setattr(exact_noise, "exact_table", lambda sigma, kind, table=table: table)
        assert list(noise_check._distribution(
            noise_check._normal(drawn(noise, zeros, 1.0, 4096).numpy().ravel(), kind, 1.0, spread=True)
        ))  # fmt: skip


def published(x: Fraction, s: Fraction, lam: Fraction) -> Fraction:
    """The copy of a pixel as Levine & Feizi write it."""
    above = math.ceil((x - s) / (2 * lam))
    return (min(2 * lam * above + s, Fraction(1)) + max(2 * lam * (above - 1) + s, Fraction(0))) / 2


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_splitting_copies_are_the_published_ones(sigma: float) -> None:
    image, m = torch.arange(0, 256, 17).view(1, 4, 4).float() / 255, SPLITTING.copies(sigma)
    lam, v = Fraction(m, 510), offsets(7, (1, 4, 4), m)
    copies = drawn(SplittingNoise(7), image, sigma, m)
    for b in {0, m // 3, m - 1}:
        for place, pixel in enumerate(range(0, 256, 17)):
            s = Fraction(2 * ((b + int(v.flat[place])) % m) + 1, 510)
            expected = published(Fraction(pixel, 255), s, lam)
            assert copies[b].flatten()[place].item() == np.float32(float(expected))
    assert torch.equal(copies[5:9], drawn(SplittingNoise(7), image, sigma, 4, first=5))
    some = drawn(SplittingNoise(7), image, sigma, m, Phase.SELECTION)
    assert sorted(map(tuple, some.flatten(1).tolist())) == sorted(map(tuple, copies.flatten(1).tolist()))
    with pytest.raises(DualRSError, match=f"draw {m} of {m} copies"):
        drawn(SplittingNoise(7), image, sigma, 1, first=m)


def shares(table: Tensor, m: int, v: Sequence[int], pixels: Tensor, num: int | None = None) -> Tensor:
    """The share of the copies of each two-pixel image for which a classifier, a table of the middles, says yes."""
    s = (torch.arange(num or m)[:, None] + torch.tensor(v)) % m
    middles = split(pixels[:, None], s, m)
    return table[middles[..., 0], middles[..., 1]].double().mean(dim=1)


def test_splitting_by_brute_force_changes_a_share_by_the_l1_distance_at_most() -> None:
    """All pairs of 12 x 12 images under several couplings: the bound holds and is reached; of half of it neither."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(list(itertools.product(range(120, 132), repeat=2)))
    distance = (grid[:, None] - grid).abs().sum(dim=2)
    broken = tight = 0
    for m, first in itertools.product((3, 8, 11), (0, 1, 2)):
        table = torch.randint(2, (1021, 1021), generator=generator)
        for v in ((0, 0), (first, 5 % m)):
            p = shares(table, m, v, grid)
            change = (p[:, None] - p).abs()
            assert bool((change <= distance / m + 1e-12).all())
            tight += int((change[distance == 1] > 1 / m - 1e-12).any())
            q = shares(table, m, v, grid, m - 1)
            broken += int(((q[:, None] - q).abs() > distance / (2 * m) + 1e-12).any())  # lambda doubled
    assert tight
    assert broken


class Lookup:
    """A random function of the copies of a two-pixel image: hardest for a smoothed classifier."""

    def __init__(self, seed: int, outputs: int, block: int) -> None:
        self.table = torch.randint(outputs, (1021 // block + 1,) * 2, generator=torch.Generator().manual_seed(seed))
        self.outputs, self.block = outputs, block

    def __call__(self, images: Tensor) -> Tensor:
        place = (images.flatten(1) * 1020).round().long() // self.block
        return torch.nn.functional.one_hot(self.table[place[:, 0], place[:, 1]], self.outputs).float()


def test_routed_classifier_under_splitting_keeps_its_class_throughout_the_ball() -> None:
    """Both claims and the standard certificate, against the routed classifier at every 8-bit image of the ball."""
    levels, sigma_e, seed = (0.02, 0.05), 0.05, 11
    router, classifier = Lookup(1, 2, 90), Lookup(2, 2, 60)
    dual = DualSmoothedClassifier(router, classifier, levels, sigma_e, 2, seed=seed, noise="splitting")
    window = torch.tensor(list(itertools.product(range(-26, 27), repeat=2)))

    def votes(module: Lookup, sigma: float, pixels: Tensor) -> Tensor:
        m = SPLITTING.copies(sigma)
        s = (torch.arange(m)[:, None] + torch.tensor(offsets(seed, (1, 1, 2), m)).view(2)) % m
        copies = split(pixels[:, None], s, m).float() / 1020
        return module(copies.view(-1, 2)).view(len(pixels), m, -1).double().mean(dim=1)

    certified = largest = 0
    images = torch.randint(30, 226, (60, 2), generator=torch.Generator().manual_seed(3))
    stack = (images.float() / 255).view(-1, 1, 1, 2)
    constant, agreement = dual.certify_many(stack), dual.certify_many(stack, claim="agreement")
    standard = SmoothedClassifier(classifier, 2, 0.05, seed=seed, noise="splitting").certify_many(stack)
    for center, one, two, plain in zip(images, constant, agreement, standard, strict=True):
        assert one.alpha == two.alpha == plain.alpha == 0.0
        assert plain.num_estimation == SPLITTING.copies(0.05)
        pixels = center + window
        distance = window.abs().sum(dim=1) / 255
        level = (votes(router, sigma_e, pixels)[:, 0] < 0.5).long()  # the median
        answers = torch.stack([votes(classifier, sigma, pixels).argmax(dim=1) for sigma in levels])
        routed = answers.gather(0, level[None])[0]
        assert plain.p_lower == pytest.approx(
            float(votes(classifier, 0.05, center[None])[0, plain.top_class]), rel=1e-9
        )
        for certificate, answer in ((one, routed), (two, routed), (plain, answers[1])):
            if certificate.prediction >= 0:
                inside = distance < certificate.radius
                assert bool((answer[inside] == certificate.prediction).all())
                certified += 1
                largest = max(largest, int(inside.sum()))
        assert two.radius >= one.radius - 1e-12
    assert certified > 100
    assert largest > 25


def test_splitting_refuses_what_needs_chance() -> None:
    g = SmoothedClassifier(Lookup(2, 2, 60), 2, 0.05, noise="splitting")
    image = torch.zeros(1, 1, 2)
    with pytest.raises(ConfigError, match="decides without chance"):
        g.predict(image)
    with pytest.raises(ConfigError, match="budget must be 'fixed', got 'sequential'"):
        g.certify(image, budget="sequential")


@pytest.mark.parametrize("kind", STANDARD)
def test_training_noise_has_standard_deviation_one_and_its_own_kurtosis(kind: str) -> None:
    out = np.empty((40, 5000), np.float32)
    STANDARD[kind](out, b"k" * 16)
    kurtosis = {"uniform": 1.8, "laplace": 6.0}.get(kind, 3.0)
    assert out.mean() == pytest.approx(0.0, abs=0.01)
    assert out.std() == pytest.approx(1.0, abs=0.01)
    assert float((out.astype(np.float64) ** 4).mean()) == pytest.approx(kurtosis, rel=0.05)
    assert make_noise(kind, 0).kind == kind


def test_splitting_offsets_and_training_copies_come_from_their_keystreams() -> None:
    def words(key: bytes, num: int) -> list[int]:
        out = np.empty(num, np.int32)
        words_on_host(Part(key, 0, num), out)
        return out.view(np.uint32).tolist()

    m, image = SPLITTING.copies(0.1), torch.randint(256, (1, 4, 4)).float() / 255
    expected = [word % m for word in words(noise_key(7, "offsets", Phase.ESTIMATION, m / 510.0, "splitting"), 16)]
    assert offsets(7, (1, 4, 4), m).ravel().tolist() == expected
    copies = drawn(SplittingNoise(7), image, 0.1, m)
    chosen = [word % m for word in words(noise_key(7, "x", Phase.TRAINING, 0.1, "splitting"), 20)]
    assert torch.equal(drawn(SplittingNoise(7), image, 0.1, 20, Phase.TRAINING), copies[chosen])
    assert torch.equal(drawn(SplittingNoise(7), image, 0.1, 8, Phase.TRAINING, first=12), copies[chosen[12:]])
