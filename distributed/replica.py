"""A replica: denoiser and heads loaded once on one device, and an engine that stays full across shards.

The engine runs in a thread of its own and takes examples from whichever shards are in flight, so the device does not
drain at a shard's end. A plain class: Ray wraps it at launch (`distributed.scheduler`), the local executor does not.
"""

import asyncio
import json
import logging
import os
import queue
import socket
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch

from core.batch_size import DeviceProbe, choose_batch_size
from core.config import Config
from core.data import Dataset, Split
from core.engine import Engine, Task
from core.errors import ConfigError, DualRSError, ModelError
from core.models.checkpoints import load_model
from core.models.denoiser import OneShotDenoiser
from core.network import Forward, Head, Network
from core.noise import make_noise
from core.records import CLASSIFIER, ESTIMATOR, Certificate, Draws, DualCertificate, Phase, Rule, Sampling
from core.sequential import Budget, dual_procedure, standard_procedure
from distributed.datasets import load_dataset
from distributed.metrics import ReplicaMetrics
from distributed.shards import (
    CERTIFICATE_SCHEMA,
    DUAL_SCHEMA,
    OK,
    ShardStore,
    certificate_row,
    dual_row,
    error_row,
)
from distributed.storage import Folder

__all__ = [
    "Facts",
    "Replica",
    "Work",
    "build_engine",
    "build_network",
    "check_visible",
    "is_device_error",
    "make_row",
    "make_task",
    "measure_rate",
    "probe_batch_size",
    "procedures",
    "retired",
]

_log = logging.getLogger(__name__)

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
        models: by role (`denoiser`, those of `Config.classifiers` and, for `dual`, `estimator`): name in models/ and
            SHA-256.
        config: the run's configuration.
        device: `cpu`, `cuda` or, before the cluster has been asked, `auto`.
        data_digest: `Dataset.digest` of the split; a replica that finds another one refuses it. Empty: not compared.
        started: when this call of the driver began, seconds since the epoch.
    """

    root: Folder
    store: str
    method: Literal["standard", "dual"]
    split: Split
    sampling: Sampling
    budget: Budget
    models: Mapping[str, tuple[str, str]]
    config: Config
    device: str
    data_digest: str = ""
    started: float = field(default_factory=time.time)

    @property
    def rows_per_example(self) -> int:
        """Rows that an example gives."""
        return len(self.config.sigmas) if self.method == "standard" else 1

    @property
    def draws_per_example(self) -> int:
        """Rows of forward passes that an example takes, at most."""
        stages = len(self.config.sigmas) if self.method == "standard" else 2
        return stages * (self.sampling.num_selection + self.sampling.num_estimation)

    @property
    def levels(self) -> tuple[float | None, ...]:
        """Noise levels of an example's rows; (None,) where the estimator picks it."""
        return self.config.sigmas if self.method == "standard" else (None,)

    @property
    def schema(self) -> pa.Schema:
        """Of the rows."""
        return CERTIFICATE_SCHEMA if self.method == "standard" else DUAL_SCHEMA

    def model_files(self) -> dict[str, Path]:
        """The networks as files of this machine."""
        models = self.root / "models"
        return {role: models.fetch(f"{name}.safetensors", digest) for role, (name, digest) in self.models.items()}


def build_network(models: Mapping[str, Path], config: Config, num_classes: int, device: str) -> Network:
    """Load denoiser and heads and check them against the configuration.

    Args:
        models: files by role, see `Work`; the roles that are missing are left out.
        config: the run's.
        num_classes: of the data set.
        device: where they go.

    Raises:
        ModelError: for a file that cannot be loaded, or a sigma beyond the denoiser's schedule.
    """
    denoiser = load_model(models["denoiser"]) if "denoiser" in models else None
    if isinstance(denoiser, OneShotDenoiser):
        for sigma in {*config.sigmas, config.estimator_sigma}:
            denoiser.timestep(sigma)
    loaded = {role: load_model(file) for role, file in models.items() if role != "denoiser"}
    heads = {}
    if CLASSIFIER in loaded:
        heads[CLASSIFIER] = Head(loaded[CLASSIFIER], num_classes)
    elif experts := {sigma: loaded[role] for role, sigma in config.classifiers.items() if sigma and role in loaded}:
        heads[CLASSIFIER] = Head(experts, num_classes)
    if ESTIMATOR in loaded:
        heads[ESTIMATOR] = Head(loaded[ESTIMATOR], len(config.sigmas), config.estimator.denoiser)
    return Network(heads, cast("OneShotDenoiser | None", denoiser), device)


def build_engine(work: Work, num_classes: int, batch_size: int | None = None) -> Engine:
    """Network, noise and batch shape of a work; sets the CPU threads of this process.

    Args:
        work: what to do.
        num_classes: of the data set.
        batch_size: the plan's; None takes the configured one (a plan from before plans kept it).

    Raises:
        ConfigError: without a number, from the plan or the configuration.
    """
    config, compute = work.config, work.config.compute
    rows = batch_size or compute.batch_size
    if rows == "auto":
        raise ConfigError(f"the plan of {work.store} does not say what compute.batch_size=auto came to; use a number")
    forward = Forward(compute.precision, compute.channels_last, compute.compile)
    noise = make_noise(config.noise, config.seed, compute.chunk_size)
    return Engine(_load_network(work, num_classes, forward), noise, batch_size=rows)


def _load_network(work: Work, num_classes: int, forward: Forward) -> Network:
    if work.device == "cpu":
        torch.set_num_threads(work.config.compute.threads_per_replica)
    plain = build_network(work.model_files(), work.config, num_classes, work.device)
    return Network(plain.heads, plain.denoiser, plain.device, forward)


def _requests(work: Work, network: Network) -> list[Draws]:
    """One of each kind that the procedures of a work make: of every network, at the highest level that it sees."""
    experts = isinstance(network.heads[CLASSIFIER].module, Mapping)
    levels = work.config.sigmas if experts else work.config.sigmas[-1:]
    requests = [Draws(level, 1, (CLASSIFIER,), Phase.ESTIMATION) for level in levels]
    if work.method == "dual":
        requests.append(Draws(work.config.estimator_sigma, 1, (ESTIMATOR,), Phase.ESTIMATION))
    return requests


def warm_up(engine: Engine, work: Work, data: Dataset) -> float:
    """One forward pass of every network of a work; returns the seconds of one, on average."""
    return engine.warm_up(data.shape, _requests(work, engine.network))


def check_visible(work: Work) -> None:
    """Refuse to work where the run directory is another one.

    Raises:
        ConfigError: when this machine does not see the driver's files.
    """
    if not work.root.exists("manifest.json"):
        raise ConfigError(
            f"{str(work.root)!r} cannot be seen on {socket.gethostname()}: replicas on other machines need a run "
            "directory on a shared file system or an object store (s3://, gs://)"
        )


def probe_batch_size(work: Work) -> int:
    """What `compute.batch_size: auto` comes to on this device (`core.batch_size.choose_batch_size`).

    Uncompiled where `compute.compile` is set: every size that is tried would be compiled anew, for minutes each.

    Raises:
        ModelError: when the device is too small for a single row.
    """
    check_visible(work)
    data, compute = load_dataset(work.config.dataset, work.split), work.config.compute
    network = _load_network(work, data.num_classes, Forward(compute.precision, compute.channels_last))
    replicas_here = max(1, (os.cpu_count() or 1) // compute.threads_per_replica)
    share = min(1.0, compute.gpus_per_replica) if work.device == "cuda" else 1 / replicas_here
    try:
        return choose_batch_size(DeviceProbe(network, data.shape, _requests(work, network), share))
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"not even one row fits on {work.device} of {_node()}: use a larger device ({error})"
        ) from error


def measure_rate(work: Work, batch_size: int | None = None, seconds: float = 2.0) -> float:
    """Rows per second of the bare forward passes of a work at its batch shape, on this device."""
    check_visible(work)
    data = load_dataset(work.config.dataset, work.split)
    engine = build_engine(work, data.num_classes, batch_size)
    start, took = time.monotonic(), warm_up(engine, work, data)
    while time.monotonic() - start < seconds:
        took = min(took, warm_up(engine, work, data))
    return engine.batch_size / took


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
    """What is said of a shard when it is committed, or why it was not (`failure`, "Type: message")."""

    shard: int
    examples: int = 0
    draws: int = 0
    errors: int = 0
    attempt: int = 1
    replica: str = ""
    first_error: str = ""
    failure: str = ""


@dataclass(eq=False)
class _OpenShard:
    """A shard whose examples are in the engine.

    `done` holds (example id, sigma) of rows that an earlier attempt has committed; `rows` begins with them.
    """

    number: int
    attempt: int
    started: float
    missing: int
    rows: Rows
    done: frozenset[tuple[str, float | None]]
    future: "Future[_OpenShard]" = field(default_factory=Future)
    errors: Rows = field(default_factory=list)


class Replica:
    """Certifies shards of a plan.

    Data or models that cannot be loaded fail each `submit`, with the reason. An example that cannot be run becomes
    rows with status `error`; its neighbours are not touched.

    Args:
        work: what to do.
        on_ray: whether it lives in an actor: then it reports metrics, and an error of the device ends the process, so
            that Ray starts another one and hands its shards on.
    """

    def __init__(self, work: Work, on_ray: bool = False) -> None:
        self.work = work
        self.id = uuid.uuid4().hex[:12]
        self._on_ray = on_ray
        self._metrics = ReplicaMetrics(work.store) if on_ray else None
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
        except Exception as error:
            if not is_device_error(error):
                raise
            self._failure = self._retire(error)
            return
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def _load(self, work: Work) -> None:
        self._device = "cpu" if work.device == "cpu" else f"cuda: {torch.cuda.get_device_name()}"
        self._data = load_dataset(work.config.dataset, work.split)
        if work.data_digest and (found := self._data.digest()) != work.data_digest:
            raise ConfigError(
                f"dataset.{work.split}: {socket.gethostname()} has another data set than the driver (fingerprint "
                f"{found}, expected {work.data_digest}); give all machines the same files"
            )
        self._store = ShardStore(work.root, work.store)
        check_visible(work)
        plan = self._store.read_plan()
        if plan is None:
            raise ConfigError(f"the plan {self._store.plan_file!r} is gone")
        self._plan = plan
        self._engine = build_engine(work, self._data.num_classes, plan.batch_size)
        warm_up(self._engine, work, self._data)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Ray Data's way in: a batch of shard numbers -> one line of facts per committed shard.

        What no retry would mend is a line too: Ray would hand on its text alone.
        """
        for number in np.asarray(batch["shard"]).tolist():
            try:
                shard = await asyncio.wrap_future(await asyncio.to_thread(self.submit, int(number)))
                facts = await asyncio.to_thread(self.commit, shard)
            except DualRSError as error:
                facts = Facts(shard=int(number), failure=f"{type(error).__name__}: {error}")
            except OSError as error:
                facts = Facts(shard=int(number), failure=f"DataError: storage failed on {_node()}: {error}")
            except Exception as error:
                _log.exception("shard %d", number)
                facts = Facts(
                    shard=int(number), failure=f"ModelError: failed on {_node()}: {type(error).__name__}: {error}"
                )
            yield {key: np.array([value]) for key, value in asdict(facts).items()}

    def submit(self, number: int) -> "Future[_OpenShard]":
        """Give a shard to the engine; the future holds it when all its rows are there. Several may be in flight."""
        if self._failure is not None:
            raise self._failure
        before = self._store.read_shard(number)
        attempt = self._store.begin(number, self.id) if before is None else 1
        kept = [] if before is None else [row for row in before.to_pylist() if row["status"] == OK]
        done = frozenset((row["example_id"], row["sigma"] if self.work.levels != (None,) else None) for row in kept)
        missing = len(self._plan.members(number)) * self.work.rows_per_example - len(kept)
        shard = _OpenShard(number, attempt, time.monotonic(), missing, kept, done)
        if not missing:  # another replica had committed it before Ray heard of it
            shard.future.set_result(shard)
            return shard.future
        if attempt > self.work.config.compute.max_attempts:
            raise ModelError(
                f"shard {number} of {self.work.store} was begun {attempt - 1} times and never finished: something in "
                "it ends the replicas (see the logs of their nodes), or machines are lost faster than a shard takes; "
                f"to try on: compute.max_attempts={2 * attempt}"
            )
        with self._lock:  # a shard is either seen by the engine's last words or refused here
            if self._failure is not None:
                raise self._failure
            self._inbox.put(shard)
        return shard.future

    def commit(self, shard: _OpenShard) -> Facts:
        """Write a finished shard and say what it took."""
        examples = len(self._plan.members(shard.number))
        fresh = len(shard.rows) > len(shard.done)
        if fresh:
            shard.rows.sort(key=lambda row: (row["example_id"], row["sigma"] or 0.0))
            self._store.commit(shard.number, shard.rows, self.work.schema, self._made_on(), shard.errors)
        draws = sum(row["num_draws"] for row in shard.rows) if fresh else 0
        failed = {row["example_id"] for row in shard.errors}
        if self._metrics is not None:
            seconds = time.monotonic() - shard.started
            self._metrics.committed(examples, draws, len(failed), shard.attempt > 1, seconds)
        first = shard.errors[0] if shard.errors else None
        return Facts(
            shard=shard.number,
            examples=examples,
            draws=draws,
            errors=len(failed),
            attempt=shard.attempt,
            replica=self.id,
            first_error=f"{first['example_id']}: {first['message']}" if first else "",
        )

    def _made_on(self) -> str:
        """The device, and the micro-batch where a whole batch did not fit: the shape may have touched a vote."""
        rows, most = self._engine.micro_batch, self._engine.batch_size
        return self._device if rows == most else f"{self._device} (micro-batch {rows} of {most})"

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
                shard, index, sigma = finished.key
                if finished.error is not None:
                    self._fail(shard, index, sigma, finished.error)
                else:
                    self._add(shard, make_row(self._data, index, finished.result))
        except BaseException as cause:  # handed to whoever waits, and to all who come later
            error = self._retire(cause) if is_device_error(cause) and self._on_ray else cause
            with self._lock:
                self._failure = error
                waiting = [*self._open, *self._drain()]
            for shard in waiting:
                shard.future.set_exception(error)

    def _add(self, shard: _OpenShard, row: dict[str, Any]) -> None:
        shard.rows.append(row)
        shard.missing -= 1
        if not shard.missing:
            self._open.discard(shard)
            shard.future.set_result(shard)

    def _fail(self, shard: _OpenShard, index: int, sigma: float | None, error: Exception) -> None:
        """Note that an example could not be run."""
        example_id, label = self._data.example_ids[index], int(self._data.labels[index])
        shard.errors.append(
            {
                "example_id": example_id,
                "sigma": sigma,
                "error": type(error).__name__,
                "message": str(error),
                "traceback": "".join(traceback.format_exception(error)),
                "node": _node(),
                "time": datetime.now(UTC),
            }
        )
        self._add(shard, error_row(self.work.schema, example_id, label, sigma, self.work.sampling.alpha))

    def _retire(self, error: BaseException) -> ModelError:
        """End this process when its device has failed: a fresh one may get another, and Ray hands its shards on.

        Returns:
            What to fail with instead, when too many replicas have ended so in this call of the driver.
        """
        message = f"{type(error).__name__}: {error}"
        notes = [file for file in retired(self.work).files() if file.modified > self.work.started]
        if not self._on_ray or len(notes) >= self.work.config.compute.max_attempts:
            return ModelError(
                f"the device of {_node()} failed ({message}), after {len(notes)} others in this run; if it is too "
                "small: a smaller compute.batch_size (in a new run), or fewer replicas on a device"
            )
        _log.error("replica %s on %s gives up its device: %s", self.id, _node(), message)
        note = {"replica": self.id, "node": _node(), "error": message, "time": time.time()}
        try:
            retired(self.work).write(f"{self.id}.json", json.dumps(note).encode())
        finally:
            os._exit(1)

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
            for index in self._plan.members(shard.number).tolist():
                for sigma, procedure in zip(self.work.levels, procedures(self.work), strict=True):
                    if (self._data.example_ids[index], sigma) in shard.done:
                        continue
                    try:
                        task = make_task((shard, index, sigma), self._data, index, procedure)
                    except Exception as error:  # an image that cannot be read
                        self._fail(shard, index, sigma, error)
                    else:
                        yield task


def is_device_error(error: BaseException) -> bool:
    """Whether the device, and not an input, is to blame."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError))


def retired(work: Work) -> Folder:
    """Where replicas note that their device has failed."""
    return work.root / "errors" / "replicas"


def _node() -> str:
    return socket.gethostname()
