"""Continuous batching of certification procedures on one device.

Hundreds of procedures (generators, see `core.procedures`) are live at once. Each asks for draws and waits for votes;
the engine cuts the requests into rows, packs rows of many examples, phases and noise levels into batches of one fixed
shape, runs the network, adds up the votes on the device, and resumes the procedures whose requests are complete.
Finished ones leave and new ones enter, so that the device never sees a half-empty batch until the very end, where the
last one is padded (unless the caller would rather not): every forward pass has the same shape, so a row's result does
not depend on what else is running.
"""

import logging
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from core.machine.batch_size import seconds_of_pass
from core.machine.network import Network
from core.machine.noise import Copies, Noise
from core.machine.noise_key import auxiliary
from core.records import AUXILIARY, Draws, Procedure

__all__ = ["Engine", "Finished", "Task"]

R = TypeVar("R")

_log = logging.getLogger(__name__)

_SLOTS = 64
"""Requests that have room for their votes at first; it doubles when more are open."""
_CPU_NUMBERS = 400_000
"""Numbers that a thread gets in a pass where nothing is padded, 130 images of 3x32x32: activations of more leave the
CPU's caches. But 16 rows at least and 1,024 at most."""


@dataclass(frozen=True, slots=True)
class Task(Generic[R]):
    """One procedure on one image.

    Attributes:
        key: handed back with the result.
        example_id: names the image in the noise key.
        image: ``(C, H, W)`` float32 in [0, 1].
        procedure: a fresh generator.
    """

    key: Any
    example_id: str
    image: Tensor
    procedure: Procedure[R]


@dataclass(frozen=True, slots=True)
class Finished(Generic[R]):
    """A task's key and what its procedure returned, or the error that ended it.

    Attributes:
        key: the task's.
        value: what the procedure returned; None when it failed.
        error: of this task alone (its image, its procedure); the other tasks are not touched by it.
    """

    key: Any
    value: R | None
    error: Exception | None = None

    @property
    def result(self) -> R:
        """What the procedure returned; raises the task's error."""
        if self.error is not None:
            raise self.error
        return cast(R, self.value)


@dataclass(slots=True, eq=False)
class _Live:
    """A procedure that has started: the request that it waits for, and those it has made ahead, with their answers."""

    task: Task[Any]
    image: Tensor
    waits_for: Draws | None = None
    answers: dict[Draws, dict[str, Any] | None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Request:
    """A live procedure's open request. Rows from next_row up to end are still to be launched."""

    owner: _Live
    draws: Draws
    slot: int
    next_row: int

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.draws.start + self.draws.num


@dataclass(slots=True)
class _Lane:
    """First come, first served queue of requests that may share a batch."""

    queue: deque[_Request] = field(default_factory=deque)
    rows: int = 0


@dataclass(slots=True)
class _Launched:
    """A batch on its way: requests that it completes, and their votes as soon as `event` has happened."""

    requests: list[_Request]
    votes: Tensor | None
    event: torch.cuda.Event | None


class Engine:
    """Runs procedures on one network, batched.

    Guarantee: the votes of a request depend on the seed, the example, the phase, the noise level and the network
    evaluated at this batch shape; never on the other tasks, their number or their order. When the device runs out of
    memory, a batch is run as equal micro-batches from then on (`micro_batch`, logged): the noise is the same, and the
    network is evaluated at another shape; see "Batch shapes" in docs/guarantees.md.

    Args:
        network: what votes.
        noise: where noise comes from.
        batch_size: rows of every forward pass, as long as they fit.
        max_live: procedures live at once, at most (bounds the memory for images and votes).
        pad: whether a batch that is not full is padded, so that all passes have one shape. Without, its shape is that
            of the work, for networks that take any, and on a CPU no larger than is fast: with few images nothing is run
            in vain, but the last bits of logits may then depend on how many images there are.
    """

    def __init__(
        self, network: Network, noise: Noise, *, batch_size: int = 1000, max_live: int = 4096, pad: bool = True
    ):
        if batch_size < 1 or max_live < 1:
            raise ConfigError(f"batch_size and max_live must be at least 1, got {batch_size} and {max_live}")
        self.network = network
        self.noise = noise
        self.batch_size = batch_size
        self.micro_batch = batch_size
        """Rows of a forward pass at present: `batch_size` unless memory has run out."""
        self.max_live = max_live
        self.pad = pad
        self.rows_run = 0
        """Rows sent through the network so far, padding included."""
        device = network.device
        self._device = device
        self._width = 1 + max(head.num_outputs for head in network.heads.values())
        self._head_index = {name: i for i, name in enumerate(network.heads)}
        # votes[slot, head, class]; the last class counts draws with non-finite logits; slot 0 takes the padding rows.
        # A free slot holds zeros.
        self._votes = torch.zeros((_SLOTS, len(network.heads), self._width), dtype=torch.int64, device=device)
        self._ones = torch.ones(batch_size, dtype=torch.int64, device=device)
        self._free_slots = list(range(_SLOTS - 1, 0, -1))
        self._lanes: dict[Hashable, _Lane] = {}
        self._image_shape: torch.Size | None = None
        self._noisy: Tensor | None = None
        self._in_flight: deque[_Launched] = deque()
        # On an accelerator the next batch is queued before the votes of the last one are read.
        self._depth = 1 if device.type == "cuda" else 0
        self.live = 0
        """Procedures that have started and not finished."""

    @torch.inference_mode()
    def warm_up(self, image_shape: tuple[int, ...], requests: Iterable[Draws]) -> float:
        """One forward pass of the batch shape for each kind of request, so that a device that is too small or a network
        that does not fit says so before any work is taken.

        Args:
            image_shape: ``(C, H, W)``.
            requests: one of each kind that procedures will make.

        Returns:
            Seconds that a pass took, on average over the kinds.
        """
        seconds = seconds_of_pass(self._logits, self.network, self.batch_size, image_shape, requests)
        self.network.rows.clear()
        return seconds

    def run(self, tasks: Iterable[Task[R] | None]) -> Iterator[Finished[R]]:
        """Run every task and yield results in the order of completion.

        Args:
            tasks: pulled as there is room. A None means "nothing at the moment": the engine goes on with what it
                has; a source that yields None while `live` is 0 is asked again at once, so it should block then.

        Raises:
            ModelError, ConfigError: from the network, which all tasks share, or about it (`Network.check`). An error of
                one task is in its `Finished`.
            torch.OutOfMemoryError: when not even one row at a time fits.
        """
        source = iter(tasks)
        exhausted = False
        self.network.look()
        try:
            while True:
                while not exhausted and self.live < self.max_live and self._longest_queue() < 2 * self.batch_size:
                    try:
                        task = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if task is None:
                        break
                    yield from self._start(task)
                rows = self._longest_queue()
                if rows >= self.batch_size or (rows and not self._in_flight):
                    lane = max(self._lanes, key=lambda key: self._lanes[key].rows)
                    self.network.check(lane, *self._launch(lane), self.micro_batch)
                    while len(self._in_flight) > self._depth:
                        yield from self._harvest()
                elif self._in_flight:  # a vote that is on its way may bring more rows: better than padding
                    yield from self._harvest()
                elif exhausted:
                    return
        finally:
            self._reset()

    @torch.inference_mode()
    def _reset(self) -> None:
        """Forget unfinished work, so that an abandoned or failed run leaves nothing to the next one."""
        self._lanes.clear()
        self._in_flight.clear()
        self._votes.zero_()  # also where nothing is live: what was made ahead may be half drawn
        self._free_slots = list(range(len(self._votes) - 1, 0, -1))
        self.live = 0

    def _longest_queue(self) -> int:
        return max((lane.rows for lane in self._lanes.values()), default=0)

    def _start(self, task: Task[R]) -> Iterator[Finished[R]]:
        image = self._to_device(task.image.float())
        if self._image_shape is None:
            self._image_shape = image.shape
        elif self._image_shape != image.shape:
            error = DataError(
                f"example {task.example_id!r} has shape {tuple(image.shape)}, "
                f"the others {tuple(self._image_shape)}: all images of a run must have one shape"
            )
            yield Finished(task.key, None, error)
            return
        self.live += 1
        yield from self._resume(_Live(task, image), None)

    def _resume(self, live: _Live, answer: dict[str, Any] | None) -> Iterator[Finished[Any]]:
        """Send an answer (None to start) and queue what the procedure asks next, or yield its result."""
        key, procedure = live.task.key, live.task.procedure
        while True:
            try:
                draws = next(procedure) if answer is None else procedure.send(answer)
            except StopIteration as stop:
                self.live -= 1
                yield Finished(key, stop.value)
                return
            except Exception as error:  # of this procedure alone: its neighbours go on
                self.live -= 1
                yield Finished(key, None, error)
                return
            for each in (draws, *draws.ahead):
                if each not in live.answers:
                    self._queue(live, each)
            if live.answers[draws] is None:
                live.waits_for = draws
                return
            answer = live.answers.pop(draws)

    def _queue(self, live: _Live, draws: Draws) -> None:
        lane = self._lanes.setdefault(self.network.lane(draws), _Lane())
        if not self._free_slots:
            held = len(self._votes)
            self._votes = torch.cat([self._votes, torch.zeros_like(self._votes)])
            self._free_slots = list(range(2 * held - 1, held - 1, -1))
        lane.queue.append(_Request(live, draws, self._free_slots.pop(), draws.start))
        lane.rows += draws.num
        live.answers[draws] = None

    @torch.inference_mode()
    def _launch(self, lane_key: Hashable) -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
        """Fill one batch from a lane, run it, add up its votes; returns batch, levels (host), logits, rows in use."""
        assert self._image_shape is not None
        lane, shape = self._lanes[lane_key], self.batch_size
        if not self.pad and self.network.any_batch(lane_key):
            if self._device.type == "cpu":
                fitting = min(max(_CPU_NUMBERS // max(1, self._image_shape.numel()), 16), 1024)
                shape = min(shape, fitting * torch.get_num_threads())
            if lane.rows < 2 * shape:  # the last passes: equal ones
                shape = -(-lane.rows // -(-lane.rows // shape))
        if self._noisy is None or len(self._noisy) < shape:
            self._noisy = torch.empty((shape, *self._image_shape), device=self._device)
        noisy = self._noisy[:shape]
        cells = np.zeros(shape, np.int64)  # where each row's slot begins in the votes; padding rows: slot 0
        sigmas = np.empty(shape, np.float32)
        copies: list[Copies] = []
        completed: list[_Request] = []
        row = 0
        while row < shape and lane.queue:
            request = lane.queue[0]
            draws, live, taken = request.draws, request.owner, min(request.end - request.next_row, shape - row)
            copies.append(Copies(live.image, live.task.example_id, draws.phase, draws.sigma, request.next_row, taken))
            cells[row : row + taken] = request.slot * self._votes[0].numel()
            sigmas[row : row + taken] = draws.sigma
            row += taken
            request.next_row += taken
            if request.next_row == request.end:
                completed.append(lane.queue.popleft())
        lane.rows -= row
        may_vote = self.noise.corrupt(noisy[:row], copies)
        noisy[row:] = 0.0  # padding
        sigmas[row:] = sigmas[0]  # a level that is asked for anyway; its votes go to slot 0
        self.rows_run += shape
        cell_of_row = self._to_device(torch.from_numpy(cells))
        if may_vote is not None:  # on the device: reading it here would wait for all that is queued there
            cell_of_row[:row] *= may_vote
        levels = torch.from_numpy(sigmas)
        logits = self._logits(lane_key, noisy, self._to_device(levels))
        for name, values in logits.items():
            cell = self._votes_of(values).add_(cell_of_row).add_(self._head_index[name] * self._width)
            self._votes.view(-1).scatter_add_(0, cell, self._ones[:shape])
        self._in_flight.append(self._read_later(completed))
        return noisy, levels, logits, row

    def _votes_of(self, values: Tensor) -> Tensor:
        """The class that each row votes for, int64; the last of `_votes` for rows with non-finite logits."""
        vote = values.argmax(dim=1)
        # What is not finite spoils the sum. Where looking would wait for the device, every row is looked at there.
        if self._device.type == "cpu" and math.isfinite(values.sum().item()):
            return vote
        finite = values.abs().amax(dim=1) < torch.inf  # False for NaN too
        return torch.where(finite, vote, self._width - 1)

    def _logits(self, lane: Hashable, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Logits of a batch, in micro-batches of the largest size that has fitted so far.

        Raises:
            torch.OutOfMemoryError: when a single row does not fit.
        """
        before = self.micro_batch
        while True:
            try:
                logits = self._in_pieces(lane, noisy, sigma)
                break
            except torch.OutOfMemoryError as error:
                if self.micro_batch == 1:
                    error.add_note("not even a forward pass of one row fits: use a device with more memory")
                    raise
                if not self.network.may_split:
                    error.add_note("with certify.reference all passes have one shape: lower compute.batch_size")
                    raise
            # Out of the handler, whose traceback holds the activations of the pass that failed.
            self.micro_batch = -(-self.micro_batch // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if self.micro_batch < before:
            _log.warning(
                "out of memory in a pass of %d rows on %s: a batch of %d rows runs as %d passes of %d from now on",
                before,
                self._device,
                self.batch_size,
                -(-self.batch_size // self.micro_batch),
                self.micro_batch,
            )
        return logits

    def _in_pieces(self, lane: Hashable, noisy: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """All passes have one shape: where the batch is no multiple of it, the last one starts earlier."""
        size, total = self.micro_batch, len(noisy)
        if size >= total:
            return self.network(lane, noisy, sigma)
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, total, size):
            start = min(first, total - size)
            rows = slice(start, start + size)
            for name, values in self.network(lane, noisy[rows], sigma[rows]).items():
                parts.setdefault(name, []).append(values[first - start :])
        return {name: torch.cat(values) for name, values in parts.items()}

    def _read_later(self, completed: list[_Request]) -> _Launched:
        """Queue the copy of the completed requests' votes to the host, without waiting for it."""
        if not completed:
            return _Launched(completed, None, None)
        # By a pinned index: a plain list would be copied in a way that waits for the forward pass.
        slots = self._to_device(torch.tensor([request.slot for request in completed]))
        votes = self._votes.index_select(0, slots)
        self._votes.index_fill_(0, slots, 0)  # for the next requests there
        if self._device.type != "cuda":
            return _Launched(completed, votes, None)
        host = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
        host.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Launched(completed, host, event)

    def _harvest(self) -> Iterator[Finished[Any]]:
        """Resume the procedures whose requests the oldest launched batch completed."""
        launched = self._in_flight.popleft()
        if launched.votes is None:
            return
        if launched.event is not None:
            launched.event.synchronize()
        votes = launched.votes.numpy()
        for request, counts in zip(launched.requests, votes, strict=True):
            self._free_slots.append(request.slot)
            answer = {
                name: counts[self._head_index[name], : self.network.heads[name].num_outputs].copy()
                for name in request.draws.heads
            }
            draws, live = request.draws, request.owner
            if draws.auxiliary:
                number = auxiliary(self.noise.seed, live.task.example_id, draws.phase, draws.sigma)
                answer[AUXILIARY] = np.array([number])
            live.answers[draws] = answer
            if live.waits_for == draws:  # or it was made ahead, and is not asked for yet
                live.waits_for = None
                yield from self._resume(live, live.answers.pop(draws))

    def _to_device(self, host: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return host.pin_memory().to(self._device, non_blocking=True)
        return host
