"""Noise as a pure function of (run seed, example id, phase, sigma, number of the draw).

A crash that is retried, another number of workers, another batch size, device or order draws the very same noise, so
nothing that happens to a run can select among certificates (a new draw after a failure would be a selection).
"""

import hashlib

import numpy as np

from core.records import Phase

__all__ = ["auxiliary", "noise_key", "random_of", "training_key"]


def noise_key(seed: int, example_id: str, phase: Phase, sigma: float, kind: str) -> bytes:
    """The 32 bytes that key all draws for an example, a phase and a noise level, one after the other.

    `example_id` comes last and the fields before it hold no "|", so different arguments never meet in one text. Kinds
    of noise (at most 16 letters) share no stream.
    """
    text = f"{seed}|{phase.value}|{float(sigma).hex()}|{example_id}"
    return hashlib.blake2b(text.encode(), digest_size=32, person=kind.encode()).digest()


def auxiliary(seed: int, example_id: str, phase: Phase, sigma: float) -> int:
    """The uniform number of a randomised bound, an integer in [0, 2^53): a function of what keys the draws beside it.

    It shares no bits with any noise, and nobody can draw it again: not a retry, and not the audit.
    """
    return int.from_bytes(noise_key(seed, example_id, phase, sigma, "auxiliary")[:8], "little") >> 11


def training_key(seed: int, training: str, use: str, epoch: int, where: str) -> bytes:
    """The 16-byte key of something random in an epoch of a training: an example's noise or augmentation, the order, ...

    Args:
        seed: of the run.
        training: its name; neither it nor `use` holds "|", and no phase of `noise_key` is called so.
        use: `noise`, `augment`, `order`, `dropout`, ...
        epoch: from 0.
        where: an example id, or a place in the epoch.
    """
    return hashlib.blake2b(f"{seed}|{training}|{use}|{epoch}|{where}".encode(), digest_size=16).digest()


def random_of(key: bytes) -> np.random.Generator:
    """NumPy's generator of a 16-byte key: the same key, the same numbers."""
    return np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
