"""Settling a process, each time in a process of its own: what malloc does is a matter of the whole process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
import torch
from core.cpu import settle

if sys.argv[1] == "settled":
    settle(1)

def passes(num):
    for _ in range(num):  # as a forward pass: several tensors of some megabytes, all of them freed
        tensors = [torch.zeros(1_000_000) for _ in range(8)]
        del tensors

def measure():
    passes(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    passes(10)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)

if sys.argv[2] == "main":
    measure()
else:
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
"""


def faults(settled: str, thread: str) -> int:
    """Page faults per pass over 32 MB, which are 7,812 pages."""
    command = [sys.executable, "-c", FAULTS, settled, thread]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize("thread", ["main", "another"])
def test_settle_memory_is_kept_between_passes(thread: str) -> None:
    before = faults("not", thread)
    assert before > 1000  # else there was nothing to settle, and the next line says nothing
    assert faults("settled", thread) < (before / 3 if thread == "another" else 100)


def test_settle_sets_the_threads_of_this_process() -> None:
    command = "import torch; from core.cpu import settle; settle(3); print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "3"
