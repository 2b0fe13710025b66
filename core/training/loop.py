"""The epochs of a training: one loop for all of them, on one worker or several, that goes on from any batch.

Which samples make up a batch, and what noise they carry, follows from (seed, training, epoch, sample) alone. So a
training that is interrupted and goes on sees what an undisturbed one sees, and W workers see what one sees: each
computes its slice of every batch, weighted so that the mean of their gradients is the gradient of the batch.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import ModelError
from core.machine.network import set_tf32
from core.machine.noise_key import training_key

__all__ = ["Objective", "Record", "Schedule", "Training", "slice_of"]

T = TypeVar("T")
Record = dict[str, float]
"""What an epoch came to: `epoch` (from 1), each term of the loss (its mean over the samples), `lr`, `samples_per_s`,
and `held_out`, the mean worth of the samples that are held out, where there are any."""


@dataclass(frozen=True)
class Schedule:
    """Length and rates of a training with AdamW.

    Attributes:
        epochs, batch_size: passes over the samples, samples of a batch (of all workers together).
        lr, weight_decay: AdamW's.
        lr_step: the learning rate is multiplied by `lr_gamma` every so many epochs; None: never.
        lr_gamma: see there.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    lr_step: int | None = None
    lr_gamma: float = 1.0

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0."""
        return self.lr if self.lr_step is None else self.lr * self.lr_gamma ** (epoch // self.lr_step)


class Objective(Protocol):
    """What is learnt from which samples.

    Attributes:
        name: of the training; part of the key of its noise and its order.
        seed: the run's.
        schedule: length and rates.
        threads: that read and noise batches ahead of the network.
        num_held_out: samples that are not learnt from: the epoch that is worth most on them is the one that is kept.
    """

    name: str
    seed: int
    schedule: Schedule
    threads: int
    num_held_out: int = 0

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> Sequence[Tensor]:
        """What `losses` takes for these samples, on the CPU: the same at every call. Called by other threads."""

    def losses(self, model: nn.Module, batch: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Terms by name, each ``(B,)``, on the model's device; `loss` is what is minimised, the others are noted."""

    def prepare(self, model: nn.Module) -> None:
        """Called before the first batch of a training that begins: for what the model takes from its samples."""
        return

    def worth(self, model: nn.Module, chosen: NDArray[np.int64]) -> Tensor:
        """``(B,)`` of some of the samples that are held out, in evaluation mode: the more, the better."""
        return torch.zeros(len(chosen))


class Training:
    """A model, its optimiser and how far they are.

    Same objective, number of workers, thread count and machine: same weights, to the bit, with and without
    interruptions. Another number of workers: equal up to rounding, except that BatchNorm takes its statistics from the
    slice of each worker (those of the first are kept) and that dropout draws differ.

    Args:
        model: trained in place, on its device.
        objective: what it learns.
        rank: which of the workers this process is.
        workers: processes that train together; above 1, torch.distributed's process group must be there.
    """

    def __init__(self, model: nn.Module, objective: Objective, rank: int = 0, workers: int = 1) -> None:
        self.model, self.objective, self._rank, self._workers = model, objective, rank, workers
        self.epoch = 0
        """Epochs that are complete."""
        self.batch = 0
        """Batches of the present epoch that are complete."""
        self.history: list[Record] = []
        self._best: dict[str, Tensor] = {}
        """Weights of the epoch that is worth most on the samples held out."""
        self._sums: dict[str, Tensor] = {}
        schedule = objective.schedule
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            set_tf32(False)  # training is float32, all of it

    @property
    def samples_done(self) -> int:
        """Samples seen so far, those of earlier epochs included."""
        size = len(self.objective)
        return self.epoch * size + min(self.batch * self.objective.schedule.batch_size, size)

    @property
    def samples_total(self) -> int:
        """Samples that all epochs will have seen."""
        return self.objective.schedule.epochs * len(self.objective)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: plain values and the live tensors, to be saved before the next batch.

        The same on all workers, but for the statistics of BatchNorm.
        """
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "sums": self._sums,
            "best": self._best,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.history = [dict(record) for record in state["history"]]
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._best = {name: value.to(self._device) for name, value in state.get("best", {}).items()}
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def run(self) -> Iterator[Record | None]:
        """Train to the end; a record at the end of each epoch, None after every other batch: moments to take `state`.

        Leaves the model in evaluation mode. Where samples are held out, its weights are then (and in the `state` behind
        the last batch) those of the epoch with the largest `held_out`, of several the first.

        Raises:
            ModelError: when a loss or a worth is not finite.
            DataError: when an image cannot be read.
        """
        schedule, size = self.objective.schedule, len(self.objective)
        num_batches = math.ceil(size / schedule.batch_size)
        if not self.samples_done:
            self.objective.prepare(self.model)
        network = self.model if self._workers == 1 else DistributedDataParallel(self.model)
        self.model.train()
        while self.epoch < schedule.epochs:
            for group in self._optimizer.param_groups:
                group["lr"] = schedule.rate(self.epoch)
            start, before = time.perf_counter(), self.batch
            for batch, share in self._batches():
                self._step(network, batch, share)
                self.batch += 1
                if self.batch < num_batches:
                    yield None
            seconds = time.perf_counter() - start
            means = {name: value.item() / size for name, value in self._sums.items()} | self._held_out()
            if not all(map(math.isfinite, means.values())):
                raise ModelError(
                    f"{self.objective.name}: the loss of epoch {self.epoch + 1} is not finite "
                    f"({', '.join(f'{name} {value}' for name, value in means.items())}); lower its learning rate"
                )
            seen = size - before * schedule.batch_size
            self.epoch, self.batch, self._sums = self.epoch + 1, 0, {}
            record = {"epoch": float(self.epoch), **means, "lr": schedule.rate(self.epoch - 1)}
            self.history.append({**record, "samples_per_s": seen / max(seconds, 1e-9)})
            self._keep_best()
            yield self.history[-1]
        self.model.eval()

    def _held_out(self) -> Record:
        """The mean worth of the samples that are held out, of which each worker looks at its part."""
        size = self.objective.num_held_out
        if not size:
            return {}
        mine = slice_of(np.arange(size), self._rank, self._workers)
        self.model.eval()
        with torch.no_grad():
            total = self.objective.worth(self.model, mine).double().sum().to(self._device)
        self.model.train()
        if self._workers > 1:
            dist.all_reduce(total)
        return {"held_out": total.item() / size}

    def _keep_best(self) -> None:
        if not self.objective.num_held_out:
            return
        *before, last = (record["held_out"] for record in self.history)
        if not before or last > max(before):
            self._best = {name: value.clone() for name, value in self.model.state_dict().items()}
        if self.epoch == self.objective.schedule.epochs:
            self.model.load_state_dict(self._best)

    def _batches(self) -> Iterator[tuple[Sequence[Tensor], float]]:
        """What is left of this epoch, as this worker sees it: its slice of each batch and the weight of a sample.

        The weight times the sum over the slice, averaged over the workers, is the mean over the batch.
        """
        epoch, size, objective = self.epoch, self.objective.schedule.batch_size, self.objective
        order = _order(objective, epoch)
        starts = range(self.batch * size, len(order), size)

        def make(start: int) -> tuple[Sequence[Tensor], float]:
            whole = order[start : start + size]
            mine = slice_of(whole, self._rank, self._workers)
            # All workers take part in every step: one without a sample lends its hand with a weight of 0.
            weight = self._workers / len(whole) if len(mine) else 0.0
            return objective.batch(epoch, mine if len(mine) else whole[:1]), weight

        return _ahead(make, starts, objective.threads)

    def _step(self, network: nn.Module, batch: Sequence[Tensor], weight: float) -> None:
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            # Dropout: a function of the place too.
            torch.manual_seed(_number(self.objective, "dropout", self.epoch, f"{self.batch}/{self._rank}"))
            terms = self.objective.losses(network, [tensor.to(self._device) for tensor in batch])
            loss = terms["loss"].sum() * weight
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        with torch.no_grad():
            sums = torch.stack([term.double().sum() for term in terms.values()])
            if not weight:
                sums.zero_()
            if self._workers > 1:
                dist.all_reduce(sums)  # at every batch, so that any state of any worker is a whole one
            for name, value in zip(terms, sums, strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + value


def slice_of(whole: NDArray[np.int64], rank: int, workers: int) -> NDArray[np.int64]:
    """A worker's part of a batch: consecutive samples, as many as the others have or one more."""
    return np.array_split(whole, workers)[rank]


def _order(objective: Objective, epoch: int) -> NDArray[np.int64]:
    """The samples of an epoch in the order in which they are seen."""
    return np.random.default_rng(_number(objective, "order", epoch, "")).permutation(len(objective))


def _number(objective: Objective, use: str, epoch: int, where: str) -> int:
    return int.from_bytes(training_key(objective.seed, objective.name, use, epoch, where)[:7], "little")


def _ahead(make: Callable[[int], T], numbers: Iterable[int], threads: int) -> Iterator[T]:
    """`make` of each number, in order; made by so many threads, one more than there are threads in advance."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
    waiting: deque[Future[T]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
