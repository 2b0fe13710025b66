"""Settling a process, each time in a process of its own: what malloc does is a matter of the whole process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from core.machine.cpu import settle

if {settled}:
    settle(1)

def passes(num):
    for _ in range(num):
        torch.zeros(10_000_000)  # 40 MB, more than glibc keeps by itself, whatever was freed before

passes(30)  # where small pieces lie in between, malloc needs some to find its place
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(10)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def printed(code: str) -> int:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_settle_memory_is_kept_between_passes() -> None:
    assert printed(FAULTS.format(settled=False)) > 5000  # page faults in a pass over 9,765 pages
    assert printed(FAULTS.format(settled=True)) < 100


def test_settle_sets_the_threads_of_this_process() -> None:
    assert printed("import torch; from core.machine.cpu import settle; settle(3); print(torch.get_num_threads())") == 3
