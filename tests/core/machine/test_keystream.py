import numpy as np
import pytest
import torch

from core.machine.keystream import Part, words_on_device, words_on_host
from tests.helpers.reference_noise import chacha20

CPU = torch.device("cpu")
COUNTING = bytes(range(32))


def on_host(part: Part) -> np.ndarray:
    out = np.empty(part.num, np.int32)
    words_on_host(part, out)
    return out


@pytest.mark.parametrize("words", [on_host, lambda part: words_on_device([part], CPU).numpy()], ids=["host", "device"])
def test_words_are_those_of_published_vectors(words) -> None:  # type: ignore[no-untyped-def]
    """RFC 8439, appendix A.1, vectors 1, 2 and 3: keys 0 and 1, nonce 0, blocks 0 and 1."""
    first = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"  # noqa: E501
    second = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"  # noqa: E501
    assert words(Part(bytes(32), 0, 32)).tobytes().hex() == first + second
    third = "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"  # noqa: E501
    assert words(Part(bytes(31) + b"\1", 16, 16)).tobytes().hex() == third


PARTS = [
    Part(COUNTING, 0, 160),
    Part(COUNTING[::-1], 37, 1003),
    Part(COUNTING, 5, 1),
    Part(COUNTING, 16, 16),
    Part(b"\xff" * 32, 2**36 - 21, 64),  # the counter's upper 32 bits come into play
    Part(COUNTING, 2**50 + 3, 70_000),  # more than is encrypted at once
]


def test_words_of_host_device_and_definition_are_the_same() -> None:
    together = words_on_device(PARTS, CPU).numpy()
    each = [on_host(part) for part in PARTS]
    assert np.array_equal(together, np.concatenate(each))
    for part, words in zip(PARTS, each, strict=True):
        assert np.array_equal(words.view(np.uint32), chacha20(*part))


def test_words_any_part_of_a_stream_is_that_of_the_whole() -> None:
    whole = on_host(Part(COUNTING, 0, 400))
    for first, num in ((0, 400), (1, 398), (15, 2), (16, 100), (17, 100), (383, 17), (399, 1), (40, 0)):
        assert np.array_equal(on_host(Part(COUNTING, first, num)), whole[first : first + num])
        assert np.array_equal(words_on_device([Part(COUNTING, first, num)], CPU), whole[first : first + num])
