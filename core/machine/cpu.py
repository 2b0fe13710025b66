"""How a process computes on the CPU: its threads, and the memory between its forward passes."""

import ctypes
import sys

import torch

__all__ = ["settle"]

# Of <malloc.h>: the numbers are part of glibc's interface.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def settle(threads: int) -> None:
    """Make this process one that computes for long: `threads` threads to an operation, and freed memory is kept.

    A forward pass allocates and frees tens of megabytes of activations. glibc hands them back to the system in between,
    which then maps and zeroes every page again for the next pass: a third of the time of a small network
    (docs/performance.md). What is kept is about the most that was in use at once. In threads other than the main one,
    single tensors above 64 MiB are handed back all the same; other C libraries are left as they are.

    Args:
        threads: at least 1.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
