"""A replica: denoiser and heads loaded once on one device, and an engine that stays full across shards.

The engine runs in a thread of its own and takes examples from whichever shards are in flight, so the device does not
drain at a shard's end. A plain class: Ray wraps it at launch (`distributed.scheduler`), the local executor does not.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from core.config import Config
from core.data import Dataset, Split
from core.engine import Engine, Task
from core.errors import DualRSError
from core.models.checkpoints import load_model
from core.models.denoiser import OneShotDenoiser
from core.network import Head, Network
from core.noise import make_noise
from core.records import CLASSIFIER, ESTIMATOR, Certificate, DualCertificate, Rule, Sampling
from core.sequential import Budget, dual_procedure, standard_procedure
from distributed.datasets import load_dataset
from distributed.shards import CERTIFICATE_SCHEMA, DUAL_SCHEMA, Plan, ShardStore, certificate_row, dual_row

__all__ = ["Facts", "Replica", "Work", "build_engine", "build_network", "make_row", "make_task", "procedures"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What a replica does; small and picklable: names of files, not weights.

    Attributes:
        root: the run directory.
        store: folder of the shards inside it.
        method: `standard` certifies every example at every sigma; `dual` runs DUAL-CERTIFY once per example.
        split: which examples.
        sampling: draws and failure probability of a certificate.
        budget: `fixed`, `sequential` or `grid`, as in `CertifyConfig`.
        models: files by name: `denoiser`, `classifier` and, for `dual`, `estimator`.
        config: the run's configuration.
        device: `cpu` or `cuda`.
    """

    root: Path
    store: str
    method: Literal["standard", "dual"]
    split: Split
    sampling: Sampling
    budget: Budget
    models: Mapping[str, Path]
    config: Config
    device: str

    @property
    def rows_per_example(self) -> int:
        """Rows that an example gives."""
        return len(self.config.sigmas) if self.method == "standard" else 1


def build_network(models: Mapping[str, Path], config: Config, num_classes: int, device: str) -> Network:
    """Load denoiser and heads and check them against the configuration.

    Raises:
        ModelError: for a file that cannot be loaded, or a sigma beyond the denoiser's schedule.
    """
    denoiser = load_model(models["denoiser"]) if "denoiser" in models else None
    if isinstance(denoiser, OneShotDenoiser):
        for sigma in {*config.sigmas, config.estimator_sigma}:
            denoiser.timestep(sigma)
    widths = {CLASSIFIER: num_classes, ESTIMATOR: len(config.sigmas)}
    denoise = {CLASSIFIER: True, ESTIMATOR: config.estimator.denoiser}
    heads = {
        name: Head(load_model(models[name]), width, denoise[name]) for name, width in widths.items() if name in models
    }
    return Network(heads, cast("OneShotDenoiser | None", denoiser), device)


def build_engine(work: Work, num_classes: int) -> Engine:
    """Network, noise and batch shape of a work; sets the CPU threads of this process."""
    config, compute = work.config, work.config.compute
    if work.device == "cpu":
        torch.set_num_threads(compute.threads_per_replica)
    network = build_network(work.models, config, num_classes, work.device)
    return Engine(network, make_noise(config.noise, config.seed, compute.chunk_size), batch_size=compute.batch_size)


def procedures(work: Work) -> Iterator[Callable[[], Any]]:
    """What is run on each example: makers of fresh generators, in the order of the example's rows."""
    config, certify = work.config, work.config.certify
    arguments = (
        work.sampling,
        Rule(certify.look_every, certify.early_share, certify.futility_z),
        config.grid_radii,
    )
    if work.method == "dual":
        yield partial(
            dual_procedure, work.budget, config.sigmas, config.estimator_sigma, *arguments, certify.alpha_split
        )
        return
    for sigma in config.sigmas:
        yield partial(standard_procedure, work.budget, sigma, *arguments)


def make_task(key: Any, data: Dataset, index: int, procedure: Callable[[], Any]) -> Task[Any]:
    """The engine's task for one procedure on one example."""
    image = torch.from_numpy(data.image(index)).float().div_(255.0)
    return Task(key, data.example_ids[index], image, procedure())


def make_row(data: Dataset, index: int, result: Certificate | DualCertificate) -> dict[str, Any]:
    """The row of a result."""
    example_id, label = data.example_ids[index], int(data.labels[index])
    if isinstance(result, DualCertificate):
        return dual_row(example_id, label, result)
    return certificate_row(example_id, label, result)


@dataclass(frozen=True)
class Facts:
    """What is said of a shard when it is committed, or why it was not (`error`, "Type: message")."""

    shard: int
    examples: int = 0
    draws: int = 0
    latency_s: float = 0.0
    error: str = ""


@dataclass(eq=False)
class _OpenShard:
    """A shard whose examples are in the engine."""

    number: int
    missing: int
    future: "Future[Rows]"
    rows: Rows = field(default_factory=list)


class Replica:
    """Certifies shards of a plan.

    Data or models that cannot be loaded fail each `submit`, with the reason.

    Args:
        work: what to do.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._inbox: queue.SimpleQueue[_OpenShard | None] = queue.SimpleQueue()
        self._open: set[_OpenShard] = set()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._load(work)
        except DualRSError as error:
            self._failure = error
            return
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def _load(self, work: Work) -> None:
        self._device = "cpu" if work.device == "cpu" else f"cuda: {torch.cuda.get_device_name()}"
        self._data = load_dataset(work.config.dataset, work.split)
        self._store = ShardStore(work.root, work.store)
        self._plan = Plan.read(self._store.plan_file)
        self._engine = build_engine(work, self._data.num_classes)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Ray Data's way in: a batch of shard numbers -> one line of facts per committed shard.

        An error of ours is a line too: no retry would mend it, and Ray would hand on its text alone.
        """
        for number in np.asarray(batch["shard"]).tolist():
            start = time.monotonic()
            try:
                rows = await asyncio.wrap_future(self.submit(int(number)))
                facts = await asyncio.to_thread(self.commit, int(number), rows, start)
            except DualRSError as error:
                facts = Facts(shard=int(number), error=f"{type(error).__name__}: {error}")
            yield {key: np.array([value]) for key, value in asdict(facts).items()}

    def submit(self, number: int) -> "Future[Rows]":
        """Give a shard to the engine; the future holds its rows. Several shards may be in flight."""
        future: Future[Rows] = Future()
        with self._lock:  # a shard is either seen by the engine's last words or refused here
            if self._failure is not None:
                future.set_exception(self._failure)
            else:
                shard = _OpenShard(number, len(self._plan.shards[number]) * self.work.rows_per_example, future)
                self._inbox.put(shard)
        return future

    def commit(self, number: int, rows: Rows, start: float) -> Facts:
        """Write a finished shard and say what it took."""
        schema = CERTIFICATE_SCHEMA if self.work.method == "standard" else DUAL_SCHEMA
        self._store.commit(number, rows, schema, self._device)
        draws = sum(row["num_draws"] for row in rows)
        return Facts(number, len(self._plan.shards[number]), draws, time.monotonic() - start)

    def close(self) -> None:
        """End the engine's thread after the certificate at hand; shards that are not finished are given up."""
        if self._thread is not None:
            self._closing.set()
            self._inbox.put(None)
            self._thread.join()

    def _serve(self) -> None:
        """The engine's thread: run tasks of whatever shards arrive, complete their futures."""
        try:
            for finished in self._engine.run(self._tasks()):
                if self._closing.is_set():
                    return
                shard, index = finished.key
                shard.rows.append(make_row(self._data, index, finished.result))
                shard.missing -= 1
                if not shard.missing:
                    self._open.discard(shard)
                    shard.rows.sort(key=lambda row: (row["example_id"], row["sigma"] or 0.0))
                    shard.future.set_result(shard.rows)
        except BaseException as error:  # handed to whoever waits, and to all who come later
            with self._lock:
                self._failure = error
                waiting = [*self._open, *self._drain()]
            for shard in waiting:
                shard.future.set_exception(error)

    def _drain(self) -> Iterator[_OpenShard]:
        while not self._inbox.empty():
            if shard := self._inbox.get():
                yield shard

    def _tasks(self) -> Iterator[Task[Any] | None]:
        """Tasks of the shards in order of arrival; None while nothing has arrived and the engine has work."""
        while True:
            try:
                shard = self._inbox.get(block=self._engine.live == 0)
            except queue.Empty:
                yield None
                continue
            if shard is None:
                return
            self._open.add(shard)
            for index in self._plan.shards[shard.number]:
                for procedure in procedures(self.work):
                    yield make_task((shard, index), self._data, index, procedure)
