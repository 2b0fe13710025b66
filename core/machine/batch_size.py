"""How many rows a forward pass should have: what `compute.batch_size: auto` stands for.

Not a search for the best number: sizes are doubled while it pays. The answer depends on the device and on timing, so it
is asked for once per step and kept (`distributed.store.plan.Plan`), never asked again by whoever goes on with the step.
"""

import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from core.machine.network import Network
from core.records import Draws

__all__ = ["DeviceProbe", "Measured", "Probe", "choose_batch_size", "seconds_of_pass"]

FIRST = 8
"""The first size that is tried."""
GAIN = 1.05
"""Doubling goes on while rows per second grow by more than this."""
LARGEST = {"cpu": 1024, "cuda": 16384}
"""No size above these: what is left to gain there is small, and the last batch of a step is padded."""


@dataclass(frozen=True)
class Measured:
    """A forward pass of some size.

    Attributes:
        seconds: that it took.
        needs_bytes: memory for the weights and two such batches at once, one running and one being made.
    """

    seconds: float
    needs_bytes: float


class Probe(Protocol):
    """A device with a network on it.

    Attributes:
        limit_bytes: memory that may be used.
        largest: no size above this one.
    """

    @property
    def limit_bytes(self) -> float:
        """See above."""

    @property
    def largest(self) -> int:
        """See above."""

    def measure(self, batch_size: int) -> Measured:
        """Run passes of this size; raises `torch.OutOfMemoryError` when they do not fit."""


def choose_batch_size(probe: Probe) -> int:
    """Double the size while two batches fit the memory and rows per second grow by more than 5%.

    Where not even the first size fits, it is halved until one does. A size whose two batches fit is also one whose
    double fits once, so nothing much above the limit is ever tried.

    Raises:
        torch.OutOfMemoryError: when a pass of one row does not fit.
    """
    size, best, rate = min(FIRST, probe.largest), 0, 0.0
    while size <= probe.largest:
        fits, seconds = False, 1.0
        try:
            measured = probe.measure(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            fits, seconds = measured.needs_bytes <= probe.limit_bytes or size == 1, measured.seconds
        if best:
            if not fits or size / seconds <= GAIN * rate:
                break
        elif not fits:
            size //= 2
            continue
        elif size < FIRST:  # its double did not fit
            return size
        best, rate, size = size, size / seconds, 2 * size
    return best


class DeviceProbe:
    """Measures a network on its device, on empty images.

    Args:
        network: on its device.
        image_shape: ``(C, H, W)``.
        requests: one of each kind that procedures will make.
        share: of the device's memory that this process may use (CUDA: of the whole device; CPU: of half of what is
            free, since the rest of the machine is not ours).
    """

    def __init__(self, network: Network, image_shape: Sequence[int], requests: Sequence[Draws], share: float) -> None:
        self._network, self._shape, self._requests = network, tuple(image_shape), requests
        self._cuda = network.device.type == "cuda"
        self.largest = LARGEST["cuda" if self._cuda else "cpu"]
        if self._cuda:
            free, total = torch.cuda.mem_get_info(network.device)
            ours = torch.cuda.memory_reserved(network.device)
            self.limit_bytes = 0.9 * min(share * total, free + ours)  # the rest: libraries, fragments
        else:
            # What the process has ever taken: no less can be seen in its peak. Growth beyond it is what counts.
            self._before = _peak_bytes()
            self.limit_bytes = self._before + 0.5 * share * psutil.virtual_memory().available

    def measure(self, batch_size: int) -> Measured:
        """The fastest of a few passes, the first of them not counted, and the most memory that they took."""
        before = self._begin()
        warming = self._pass(batch_size)
        start, taken = time.perf_counter(), [self._pass(batch_size)]
        while warming < 2.0 and (len(taken) < 3 or time.perf_counter() - start < 0.3):  # slow ones vary less
            taken.append(self._pass(batch_size))
        self._network.rows.clear()
        return Measured(min(taken), before + 2 * max(0.0, self._most_bytes() - before))

    def _pass(self, batch_size: int) -> float:
        return seconds_of_pass(self._network, self._network, batch_size, self._shape, self._requests)

    def _begin(self) -> float:
        """Bytes that are there without a pass."""
        if not self._cuda:
            return self._before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._network.device)
        return float(torch.cuda.memory_reserved(self._network.device))

    def _most_bytes(self) -> float:
        return float(torch.cuda.max_memory_reserved(self._network.device)) if self._cuda else _peak_bytes()


def _peak_bytes() -> float:
    """The most memory that this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


@torch.inference_mode()
def seconds_of_pass(
    forward: Callable[[Hashable, Tensor, Tensor], Mapping[str, Tensor]],
    network: Network,
    batch_size: int,
    image_shape: Sequence[int],
    requests: Iterable[Draws],
) -> float:
    """Run one forward pass on empty images for each kind of request.

    Args:
        forward: `network` itself, or what an engine makes of it.
        network: names lanes and the device.
        batch_size: rows.
        image_shape: ``(C, H, W)``.
        requests: one of each kind.

    Returns:
        Seconds of a pass, on average over the kinds.
    """
    zeros = torch.zeros((batch_size, *image_shape), device=network.device)
    taken = []
    for draws in requests:
        sigma = torch.full((batch_size,), draws.sigma, device=network.device)
        start = time.perf_counter()
        for values in forward(network.lane(draws), zeros, sigma).values():
            values.sum().item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return sum(taken) / len(taken) if taken else 0.0
