import hashlib

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr, ndtri

from core.errors import DualRSError
from core.machine import normal
from core.machine.keystream import Part
from core.machine.normal import KS_DISTANCE, LARGEST, MAX_ERROR, normals_on_device, normals_on_host

CPU = torch.device("cpu")
Ints = NDArray[np.int64]


def numbers(s: Ints) -> NDArray[np.float32]:
    """What words stand for, by the CPU's form."""
    out = np.empty(len(s), np.float32)
    for first in range(0, len(s), normal._BLOCK):
        piece = slice(first, first + normal._BLOCK)
        normal._map(s[piece].astype(np.int32), out[piece])
    return out


@pytest.fixture(scope="module")
def words() -> Ints:
    """All words of the outermost tail, both ends of every piece, and a million of each octave's kind."""
    rng = np.random.default_rng(0)
    pieces = np.arange(127 << 10, 158 << 10)
    edges = (pieces << 13).astype(np.int32).view(np.float32).astype(np.int64)
    near = (edges[:, None] + np.array([-1, 0, 1])).ravel()
    spread = np.exp(rng.uniform(0, np.log(2**31), 10**6)).astype(np.int64)
    s = np.concatenate([np.arange(1, 2**18), near, spread, rng.integers(1, 2**31, 10**6)])
    return np.sort(s[(s > 0) & (s < 2**31)])


def test_map_is_the_quantile_function_up_to_the_stated_error(words: Ints) -> None:
    z = numbers(words).astype(np.float64)
    error = np.abs(z + ndtri(words / 2**32))
    assert 0.8 * MAX_ERROR < error.max() < MAX_ERROR
    # P(z > t) lies between the probabilities of words below and up to the one whose z is t.
    tail = np.abs(ndtr(-z) - words / 2**32)
    assert 0.5 * KS_DISTANCE < tail.max() + 2.0**-33 < KS_DISTANCE


def test_map_in_the_tails_is_right_in_relative_terms(words: Ints) -> None:
    tail = words[words < 2**20]  # beyond 3.5
    z = numbers(tail).astype(np.float64)
    assert np.abs(log_ndtr(-z) - np.log(tail / 2**32)).max() < 5e-6
    assert z.max() == pytest.approx(6.2303, abs=1e-4) and z.max() < LARGEST  # noqa: PT018


def test_map_against_40_digits(words: Ints) -> None:
    with mpmath.workdps(40):
        for s in (1, 2, 3, 1000, 2**20 + 1, 2**29, 2**30 - 1, 2**30, 2**31 - 2**20, 2**31 - 1):
            p = mpmath.mpf(s) / 2**32
            quantile = mpmath.findroot(lambda z, p=p: mpmath.ncdf(-z) - p, max(0.1, float(-ndtri(s / 2**32))))
            assert abs(float(numbers(np.array([s]))[0]) - quantile) < MAX_ERROR


def test_map_is_symmetric_monotone_and_zero_at_its_two_single_words(words: Ints) -> None:
    assert np.array_equal(numbers(-words), -numbers(words))
    z = numbers(words).astype(np.float64)
    assert np.diff(z).max() < 4.8e-7  # falls, up to a last bit where pieces meet
    assert numbers(np.array([0, -(2**31)])).tolist() == [0.0, 0.0]


def test_table_leaves_no_rounding_to_the_last_bits_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other last bits, by ten units, on every value of the quantile function: the same table. Otherwise: an error."""
    fresh = normal._table.__wrapped__
    for factor in (1 + 10 * 2.0**-52, 1 - 10 * 2.0**-52):
        monkeypatch.setattr(normal, "ndtri", lambda p, factor=factor: ndtri(p) * factor)
        a, c = fresh()
        assert hashlib.sha256(a.tobytes() + c.tobytes()).hexdigest()[:16] == normal._DIGEST
    monkeypatch.setattr(normal, "ndtri", lambda p: ndtri(p) * (1 + 1e-7))
    with pytest.raises(DualRSError, match="the table of the noise has digest"):
        fresh()


PARTS = [Part(bytes(range(32)), 0, 70_000), Part(b"x" * 32, 37, 1003), Part(b"y" * 32, 2**36 - 8, 100_001)]


def test_normals_of_host_and_device_are_the_same_bits() -> None:
    out = np.empty(sum(part.num for part in PARTS), np.float32)
    normals_on_host(PARTS, out)
    assert np.array_equal(normals_on_device(PARTS, CPU).numpy().view(np.int32), out.view(np.int32))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_normals_on_host_do_not_depend_on_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Part(b"a" * 32, 3, 700), Part(b"b" * 32, 0, 1), Part(b"c" * 32, 5, 300)]
    one, other = np.empty((2, 1001), np.float32)
    normals_on_host(parts, one)
    monkeypatch.setattr(normal, "_BLOCK", block)
    normals_on_host(parts, other)
    assert np.array_equal(one, other)


def test_normals_compiled_or_fused_would_be_the_same_bits() -> None:
    """What a compiler may do to (x - a) c, a fused operation being none of it: float64 rounded once at each step."""
    s = np.random.default_rng(1).integers(-(2**31), 2**31, 100_000)
    a, c = normal._table()
    x = s.astype(np.float32)
    piece = x.view(np.uint32) >> 13
    difference = (x.astype(np.float64) - a[piece].astype(np.float64)).astype(np.float32)
    product = (difference.astype(np.float64) * c[piece].astype(np.float64)).astype(np.float32)
    assert np.array_equal(product, numbers(s))
