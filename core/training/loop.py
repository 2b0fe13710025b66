"""The epochs of a training: one loop for all of them, on one worker or several, that goes on from any batch.

Which samples make up a batch, and what noise they carry, follows from (seed, training, epoch, sample) alone. So a
training that is interrupted and goes on sees what an undisturbed one sees, and W workers see what one sees: each
computes its slice of every batch, weighted so that the mean of their gradients is the gradient of the batch.
"""

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.config.training import OptimisationConfig
from core.errors import ModelError
from core.machine.network import set_tf32
from core.machine.noise_key import training_key
from core.models.denoiser import OneShotDenoiser
from core.training.samples import Samples

__all__ = ["Objective", "Record", "Schedule", "Training", "slice_of"]

T = TypeVar("T")
Record = dict[str, float]
"""What an epoch came to: `epoch` (from 1), each term of the loss (its mean over the samples), `lr`, `samples_per_s`,
`seconds` of all epochs so far (as far as their batches were not done again), and `held_out`, the mean worth of the
samples that are held out, where there are any."""


@dataclass(frozen=True)
class Schedule:
    """Optimiser, rates, arithmetic and length of a training.

    Attributes:
        config: all but the length.
        epochs: passes over the samples.
        steps: batches of the whole training, where it is to end before the last epoch does.
    """

    config: OptimisationConfig
    epochs: int
    steps: int | None = None

    @classmethod
    def of_steps(cls, config: OptimisationConfig, steps: int, size: int) -> Self:
        """Of so many batches of a data set's size."""
        return cls(config, math.ceil(steps / math.ceil(size / config.batch_size)), steps)

    def num_batches(self, per_epoch: int) -> int:
        """Of the whole training."""
        return self.epochs * per_epoch if self.steps is None else self.steps

    def rate(self, batch: int, per_epoch: int = 1) -> float:
        """The learning rate of a batch, counted from 0 through all epochs."""
        of, total = self.config, self.num_batches(per_epoch)
        unit, warm, lr = 1 if of.lr_every == "batch" else per_epoch, of.warmup * total, of.lr
        at = batch // unit * unit
        if of.schedule == "one_cycle":
            peak, low = 0.3 * total - 1, lr / 25
            if at <= peak:
                return _along_cosine(low, lr, at / peak)
            return _along_cosine(lr, low / 1e4, (at - peak) / (total - 1 - peak))
        if of.schedule == "cosine" and at >= warm:
            lr = _along_cosine(lr, 0.0, (at - warm) / (total - warm))
        elif of.schedule == "step":
            lr = lr * of.lr_gamma ** (batch // per_epoch // of.lr_step)
        return lr * min(1.0, (at + unit) / warm) if warm else lr

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW or SGD (without Nesterov's momentum) on all parameters."""
        of, parameters = self.config, model.parameters()
        if of.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=of.lr, weight_decay=of.weight_decay)
        return torch.optim.SGD(parameters, lr=of.lr, momentum=of.momentum, weight_decay=of.weight_decay)


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class Objective(ABC):
    """What is learnt from which samples, under their name and seed: its noise and its order are functions of these.

    All of them are made of the training split, the run's seed, a fixed denoiser on the model's device (None for a
    network that reads the noisy image itself), the noise's kind as in the configuration, and how many processes hold
    the images on this machine.
    """

    num_held_out: int = 0
    """Samples that are not learnt from: the epoch that is worth most on them is the one that is kept."""

    def __init__(self, samples: Samples, schedule: Schedule) -> None:
        self._samples, self.schedule = samples, schedule
        self.name, self.seed, self.threads = samples.name, samples.seed, samples.threads

    def __len__(self) -> int:
        return len(self._samples)

    @abstractmethod
    def batch(self, epoch: int, chosen: NDArray[np.int64]) -> Sequence[Tensor]:
        """What `losses` takes for these samples, on the CPU: the same at every call. Called by other threads."""

    @abstractmethod
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
        self._seconds = 0.0
        self._best: dict[str, Tensor] = {}
        """Weights of the epoch that is worth most on the samples held out."""
        self._average: dict[str, Tensor] = {}
        """The exponential moving average of weights and buffers, with `Schedule.ema`."""
        self._sums: dict[str, Tensor] = {}
        schedule = objective.schedule
        self._per_epoch = math.ceil(len(objective) / schedule.config.batch_size)
        self._optimizer = schedule.make_optimizer(model)
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            set_tf32(False)  # training is float32, all of it, or bfloat16 by autocast

    @property
    def samples_done(self) -> int:
        """Samples seen so far, those of earlier epochs included."""
        return min(self._samples(self._batches_done), self.samples_total)

    @property
    def samples_total(self) -> int:
        """Samples that all epochs will have seen."""
        return self._samples(self.objective.schedule.num_batches(self._per_epoch))

    @property
    def _batches_done(self) -> int:
        return self.epoch * self._per_epoch + self.batch

    @property
    def _end(self) -> int:
        """Batches of the present epoch."""
        total = self.objective.schedule.num_batches(self._per_epoch)
        return min(self._per_epoch, total - self.epoch * self._per_epoch)

    def _samples(self, batches: int) -> int:
        """Samples of the first batches, counted through all epochs."""
        epoch, batch = divmod(batches, self._per_epoch)
        size = len(self.objective)
        return epoch * size + min(batch * self.objective.schedule.config.batch_size, size)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: plain values and the live tensors, to be saved before the next batch.

        The same on all workers, but for the statistics of BatchNorm.
        """
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "seconds": self._seconds,
            "sums": self._sums,
            "best": self._best,
            "average": self._average,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.history = [dict(record) for record in state["history"]]
        self._seconds = float(state.get("seconds", 0.0))
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._best = {name: value.to(self._device) for name, value in state.get("best", {}).items()}
        self._average = {name: value.to(self._device) for name, value in state.get("average", {}).items()}
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def run(self) -> Iterator[Record | None]:
        """Train to the end; a record at the end of each epoch, None after every other batch: moments to take `state`.

        Leaves the model in evaluation mode. Where samples are held out, its weights are then (and in the `state` behind
        the last batch) those of the epoch with the largest `held_out`, of several the first; with `Schedule.ema` they
        are the average.

        Raises:
            ModelError: when a loss or a worth is not finite.
            DataError: when an image cannot be read.
        """
        schedule = self.objective.schedule
        if not self.samples_done:
            self.objective.prepare(self.model)
            if schedule.config.ema is not None:
                self._average = {name: value.clone() for name, value in self.model.state_dict().items()}
        compiled = self.model.unet if isinstance(self.model, OneShotDenoiser) else self.model
        if schedule.config.compile:
            compiled.compile()  # of its calls: names in the state dict stay what they are
        network: nn.Module = _Step(self.model, self.objective)
        if self._workers > 1:
            network = DistributedDataParallel(network)
        self.model.train()
        while self.epoch < schedule.epochs:
            start, before, earlier = time.perf_counter(), self.samples_done, self._seconds
            first = self._samples(self.epoch * self._per_epoch)
            for batch, share in self._batches():
                self._step(network, batch, share)
                self.batch += 1
                self._seconds = earlier + time.perf_counter() - start
                if self.batch < self._end:
                    yield None
            seconds, now = self._seconds - earlier, self.samples_done
            means = {name: value.item() / (now - first) for name, value in self._sums.items()} | self._held_out()
            if not all(map(math.isfinite, means.values())):
                raise ModelError(
                    f"{self.objective.name}: the loss of epoch {self.epoch + 1} is not finite "
                    f"({', '.join(f'{name} {value}' for name, value in means.items())}); lower its learning rate"
                )
            self.epoch, self.batch, self._sums = self.epoch + 1, 0, {}
            record = {"epoch": float(self.epoch), **means, "lr": self._optimizer.param_groups[0]["lr"]}
            rate = (now - before) / max(seconds, 1e-9)
            self.history.append({**record, "samples_per_s": rate, "seconds": self._seconds})
            self._keep_best()
            if self._average and self.epoch == schedule.epochs:
                self.model.load_state_dict(self._average)
            yield self.history[-1]
        if schedule.config.compile:
            compiled._compiled_call_impl = None
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
        epoch, size, objective = self.epoch, self.objective.schedule.config.batch_size, self.objective
        order = _order(objective, epoch)
        starts = range(self.batch * size, min(self._end * size, len(order)), size)

        def make(start: int) -> tuple[Sequence[Tensor], float]:
            whole = order[start : start + size]
            mine = slice_of(whole, self._rank, self._workers)
            # All workers take part in every step: one without a sample lends its hand with a weight of 0.
            weight = self._workers / len(whole) if len(mine) else 0.0
            return objective.batch(epoch, mine if len(mine) else whole[:1]), weight

        return _ahead(make, starts, objective.threads)

    def _step(self, network: nn.Module, batch: Sequence[Tensor], weight: float) -> None:
        schedule, done = self.objective.schedule, self._batches_done
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.rate(done, self._per_epoch)
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            # Dropout: a function of the place too.
            torch.manual_seed(_number(self.objective, "dropout", self.epoch, f"{self.batch}/{self._rank}"))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=schedule.config.precision == "bfloat16"):
                terms = network([tensor.to(self._device) for tensor in batch])
            loss = terms["loss"].sum() * weight
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        with torch.no_grad():
            if schedule.config.ema is not None:
                self._follow(min(schedule.config.ema, (done + 1) / (done + 10)))
            sums = torch.stack([term.double().sum() for term in terms.values()])
            if not weight:
                sums.zero_()
            if self._workers > 1:
                dist.all_reduce(sums)  # at every batch, so that any state of any worker is a whole one
            for name, value in zip(terms, sums, strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + value

    def _follow(self, decay: float) -> None:
        """Move the average: weights and the statistics of BatchNorm; what counts (int64) is copied."""
        state = self.model.state_dict()
        moving = [name for name, value in state.items() if value.is_floating_point()]
        means, values = ([of[name] for name in moving] for of in (self._average, state))
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(means, values, 0)  # type: ignore[no-untyped-call]
        for name in state.keys() - set(moving):
            self._average[name].copy_(state[name])


class _Step(nn.Module):
    """The losses of a batch as one call of one module, however often they call the model: what workers share."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, batch: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return self._objective.losses(self.model, batch)


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
