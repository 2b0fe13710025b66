"""The noise by its definition, slowly: shares no code and no library with the rooms that draw it."""

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["chacha20", "normals", "stream_key"]


def chacha20(key: bytes, first: int, num: int) -> NDArray[np.uint32]:
    """32-bit words of the keystream, as in RFC 8439 but with a counter of 64 bits and no nonce."""
    blocks = np.arange(first // 16, -(-(first + num) // 16), dtype=np.uint64)
    fixed = [*np.frombuffer(b"expand 32-byte k" + key, "<u4")]
    words = [np.full(len(blocks), word) for word in fixed] + [(blocks & np.uint64(2**32 - 1)).astype(np.uint32)]
    words += [(blocks >> np.uint64(32)).astype(np.uint32), *np.zeros((2, len(blocks)), np.uint32)]
    x = [word.copy() for word in words]

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for i, j, k, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[i] = x[i] + x[j]
            x[k] = x[k] ^ x[i]
            x[k] = (x[k] << np.uint32(by)) | (x[k] >> np.uint32(32 - by))

    for _ in range(10):
        for column in range(4):
            quarter(column, 4 + column, 8 + column, 12 + column)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    out = np.stack([a + b for a, b in zip(x, words, strict=True)], axis=1).ravel()
    return out[first % 16 : first % 16 + num]


def stream_key(seed: int, example_id: str, phase: str, sigma: float, kind: str = "gaussian") -> bytes:
    """The key of an example's draws."""
    text = f"{seed}|{phase}|{sigma.hex()}|{example_id}"
    return hashlib.blake2b(text.encode(), digest_size=32, person=kind.encode()).digest()


def normals(
    seed: int, example_id: str, phase: str, sigma: float, num: int, shape: tuple[int, ...], first: int = 0
) -> NDArray[np.float32]:
    """Standard normal draws from number `first` on, float32 ``(num, *shape)``; off by 1e-6 at most."""
    size = int(np.prod(shape))
    words = chacha20(stream_key(seed, example_id, phase, sigma), first * size, num * size).view(np.int32)
    s = words.astype(np.float64)
    z = np.where(s == 0, 0.0, -np.sign(s) * ndtri(np.where(s == 0, 1.0, np.abs(s)) / 2**32))
    return z.astype(np.float32).reshape(num, *shape)
