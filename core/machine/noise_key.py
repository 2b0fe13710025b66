"""Noise as a pure function of (run seed, example id, phase, sigma, chunk).

A crash that is retried, another number of workers, another batch size or another order draws the very same noise, so
nothing that happens to a run can select among certificates (a new draw after a failure would be a selection).
"""

import hashlib

from core.records import Phase

__all__ = ["chunk_key", "training_key"]


def chunk_key(seed: int, example_id: str, phase: Phase, sigma: float, chunk: int) -> bytes:
    """The 16-byte key of one chunk of noise.

    `example_id` comes last and the fields before it hold no "|", so different arguments never meet in one text.
    """
    text = f"{seed}|{phase.value}|{float(sigma).hex()}|{chunk}|{example_id}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def training_key(seed: int, training: str, use: str, epoch: int, where: str) -> bytes:
    """The 16-byte key of something random in an epoch of a training: an example's noise or augmentation, the order, ...

    Args:
        seed: of the run.
        training: its name; neither it nor `use` holds "|", and no phase of `chunk_key` is called so.
        use: `noise`, `augment`, `order`, `dropout`, ...
        epoch: from 0.
        where: an example id, or a place in the epoch.
    """
    return hashlib.blake2b(f"{seed}|{training}|{use}|{epoch}|{where}".encode(), digest_size=16).digest()
