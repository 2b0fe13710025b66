"""Version 1 draws what it drew when it was the only one: runs begun with it go on."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from core.machine.exact_noise import ExactTable, exact_table
from core.machine.former_noise import FormerExactNoise, FormerGaussianNoise, chunk_key
from core.machine.noise import Copies
from core.records import Phase

IMAGE = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).float() / 255


def asked(first: int, num: int, name: str = "a", sigma: float = 0.25) -> Copies:
    return Copies(IMAGE, name, Phase.ESTIMATION, sigma, first, num)


def drawn(kind: type[FormerGaussianNoise], copies: list[Copies], size: int = 20) -> Tensor:
    out = torch.empty(sum(each.num for each in copies), 1, 4, 4)
    kind(5, size).corrupt(out, copies)
    return out


def seed_of(number: int, kind: str = "gaussian", sigma: float = 0.25) -> int:
    text = f"5|estimation|{sigma.hex()}|{number}|a".encode()
    key = hashlib.blake2b(text, digest_size=16).digest()
    assert key == chunk_key(5, "a", Phase.ESTIMATION, sigma, number)
    if kind == "exact":
        key = hashlib.blake2b(key, digest_size=16, person=b"exact").digest()
    return int.from_bytes(key, "little")


def test_gaussian_chunks_are_those_of_sfc64() -> None:
    for number in (3, 4):
        z = np.random.Generator(np.random.SFC64(seed_of(number))).standard_normal((20, 1, 4, 4), np.float32)
        found = drawn(FormerGaussianNoise, [asked(20 * number, 20)])
        assert torch.equal(found, torch.add(IMAGE, torch.from_numpy(z), alpha=0.25))


def test_exact_chunks_are_those_of_sfc64() -> None:
    table = exact_table(0.25)
    uniform = np.random.SFC64(seed_of(2, "exact")).random_raw(320) >> np.uint64(4)
    bins = np.searchsorted(table.floors, uniform.astype(np.int64), side="right") - table.reach
    sums = np.clip(bins.reshape(20, 1, 4, 4) + np.arange(16).reshape(1, 4, 4), -255, 510)
    found = drawn(FormerExactNoise, [asked(40, 20)])
    assert np.array_equal(found.numpy(), sums.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("kind", [FormerGaussianNoise, FormerExactNoise])
def test_corrupt_any_window_is_part_of_the_whole_chunks(kind: type[FormerGaussianNoise]) -> None:
    whole = torch.cat([drawn(kind, [asked(20 * number, 20)]) for number in range(5)])
    for first, num in ((0, 100), (3, 10), (15, 10), (19, 1), (20, 20), (7, 60), (40, 33)):
        assert torch.equal(drawn(kind, [asked(first, num)]), whole[first : first + num])
    both = drawn(kind, [asked(15, 30), asked(0, 7, "b"), asked(90, 10)])
    assert torch.equal(both, torch.cat([whole[15:45], drawn(kind, [asked(0, 7, "b")]), whole[90:]]))


def test_corrupt_masks_the_copies_that_are_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    table = exact_table(0.25)
    planted = [int(np.random.SFC64(seed_of(number, "exact")).random_raw(320)[16 * 7]) >> 4 for number in (0, 1)]
    floors = np.sort(np.concatenate([table.floors[2:], planted]))
    monkeypatch.setattr("core.machine.exact_noise.exact_table", lambda *_: ExactTable(table.k, floors))
    out = torch.empty(35, 1, 4, 4)
    mask = FormerExactNoise(5, 20).corrupt(out, [asked(30, 1, "b"), asked(5, 34)])
    assert mask is not None
    assert torch.nonzero(~mask).flatten().tolist() == [1 + 7 - 5, 1 + 27 - 5]


@pytest.mark.parametrize("kind", [FormerGaussianNoise, FormerExactNoise])
def test_on_a_device_63_bits_of_the_key_seed_its_own_generator(
    kind: type[FormerGaussianNoise], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a machine without an accelerator can tell."""

    class Seeded(Exception):  # noqa: N818 - no error
        """Where the generator would begin to draw."""

    class Generator:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "meta"

        def manual_seed(self, seed: int) -> None:
            raise Seeded(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    with pytest.raises(Seeded) as caught:
        kind(5, 20).corrupt(torch.empty(20, 1, 4, 4, device="meta"), [asked(60, 20)])
    assert caught.value.args == (seed_of(3, "exact" if kind is FormerExactNoise else "gaussian") % 2**63,)
