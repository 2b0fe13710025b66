"""A replica: denoiser and heads loaded once on one device, and an engine that stays full across shards.

The engine runs in a thread of its own and takes examples from whichever shards are in flight, so the device does not
drain at a shard's end. A plain class: Ray wraps it at launch (`scheduler`), the local executor does not.
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
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from core.errors import ConfigError, DualRSError, ModelError
from core.machine.engine import Task
from distributed.execution.metrics import ReplicaMetrics
from distributed.execution.watch import Board, Pulse
from distributed.execution.work import Rows, Work, build_engine, check_visible, hash_of, make_task, warm_up
from distributed.files.datasets import load_dataset
from distributed.files.storage import Folder
from distributed.methods.rows import OK
from distributed.store.shards import ShardStore

__all__ = ["Facts", "Replica", "is_device_error", "retired"]

_log = logging.getLogger(__name__)

CLOSE_S = 10.0
"""How long `Replica.close` waits for a certificate."""


@dataclass(frozen=True)
class Facts:
    """What is said of a shard when it is committed, `seconds` after it came, or why it was not (`failure`,
    "Type: message").
    """

    shard: int
    examples: int = 0
    draws: int = 0
    errors: int = 0
    attempt: int = 1
    replica: str = ""
    first_error: str = ""
    failure: str = ""
    held_s: float = 0.0
    """Seconds since the replica began to load."""
    seconds: float = 0.0


@dataclass(eq=False)
class _OpenShard:
    """A shard whose examples are in the engine.

    `done` holds (example id, sigma) of rows that an earlier attempt has committed; `rows` begins with them. `hashes`
    are of the images, by their place in the data set.
    """

    number: int
    attempt: int
    started: float
    missing: int
    rows: Rows
    done: frozenset[tuple[str, float | None]]
    future: "Future[_OpenShard]" = field(default_factory=Future)
    errors: Rows = field(default_factory=list)
    hashes: dict[int, str] = field(default_factory=dict)


class Replica:
    """Certifies shards of a plan.

    Data or models that cannot be loaded fail each `submit`, with the reason. An example that cannot be run becomes
    rows with status `error`; its neighbours are not touched.

    Args:
        work: what to do.
        on_ray: whether it lives in an actor: then it reports metrics, and an error of the device ends the process, so
            that Ray starts another one and hands its shards on.
        board: where it signs that it lives (`distributed.execution.watch`); None: nowhere.
    """

    def __init__(self, work: Work, on_ray: bool = False, board: Board | str | None = None) -> None:
        self.work = work
        self._since = time.monotonic()
        self.id = uuid.uuid4().hex[:12]
        self._on_ray = on_ray
        self._metrics = ReplicaMetrics(work.store) if on_ray else None
        self._inbox: queue.SimpleQueue[_OpenShard | None] = queue.SimpleQueue()
        self._open: set[_OpenShard] = set()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._stage, self._steps = "loading", 0
        self._begun: dict[int, float] = {}
        self._pulse = None if board is None else Pulse(board, work.config.compute, self.id, self._state)
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
        finally:
            self._stage = "working"
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def _load(self, work: Work) -> None:
        self._device = "cpu" if work.device == "cpu" else f"cuda: {torch.cuda.get_device_name()}"
        self._data = load_dataset(work.config.dataset, work.split)
        if work.data_digest and not self._data.matches(work.data_digest):
            raise ConfigError(
                f"dataset.{work.split}: {socket.gethostname()} has another data set than the driver (fingerprint "
                f"{self._data.digest()}, expected {work.data_digest}); give all machines the same files"
            )
        self._steps += 1
        self._store = ShardStore(work.root, work.store)
        check_visible(work.root)
        plan = self._store.read_plan()
        if plan is None:
            raise ConfigError(f"the plan {self._store.plan_file!r} is gone")
        self._plan = plan
        self.work = work = work.under(plan)
        self._steps += 1
        self._engine = build_engine(work, self._data.num_classes, plan.batch_size)
        self._steps += 1
        warm_up(self._engine, work, self._data)

    def _state(self) -> tuple[str, int, dict[int, float]]:
        """Of `Pulse`: what it does, how much it has done, and since when it has had which shards."""
        batches = self._engine.rows_run if self._stage == "working" and hasattr(self, "_engine") else 0
        now = time.monotonic()
        return self._stage, self._steps + batches, {number: now - begun for number, begun in [*self._begun.items()]}

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
            self._begun.pop(int(number), None)
            yield {key: np.array([value]) for key, value in asdict(facts).items()}

    def submit(self, number: int) -> "Future[_OpenShard]":
        """Give a shard to the engine; the future holds it when all its rows are there. Several may be in flight."""
        if self._failure is not None:
            raise self._failure
        self._begun[number] = time.monotonic()
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
            check_visible(self.work.root)  # writing would make a folder anew that somebody has taken away
            shard.rows.sort(key=lambda row: (row["example_id"], row["sigma"] or 0.0))
            columns = self.work.method.columns(self.work.terms)
            self._store.commit(shard.number, shard.rows, columns, self._made_on(), shard.errors)
        draws = sum(row["num_draws"] for row in shard.rows) if fresh else 0
        failed = {row["example_id"] for row in shard.errors}
        seconds = time.monotonic() - shard.started
        self._steps += 1
        self._begun.pop(shard.number, None)
        if self._metrics is not None:
            retries = int(shard.attempt > 1)
            self._metrics.committed(seconds, examples=examples, draws=draws, errors=len(failed), retries=retries)
        first = shard.errors[0] if shard.errors else None
        return Facts(
            shard=shard.number,
            examples=examples,
            draws=draws,
            errors=len(failed),
            attempt=shard.attempt,
            replica=self.id,
            first_error=f"{first['example_id']}: {first['message']}" if first else "",
            held_s=time.monotonic() - self._since,
            seconds=seconds,
        )

    def _made_on(self) -> str:
        """The device, and the micro-batch where a whole batch did not fit: the shape may have touched a vote."""
        rows, most = self._engine.micro_batch, self._engine.batch_size
        return self._device if rows == most else f"{self._device} (micro-batch {rows} of {most})"

    def close(self) -> None:
        """End the engine's thread after the certificate at hand; shards that are not finished are given up.

        A network that hangs keeps nobody: after `CLOSE_S` seconds the thread is left to end with the process.
        """
        if self._pulse is not None:
            self._pulse.end()
        if self._thread is not None:
            self._closing.set()
            self._inbox.put(None)
            self._thread.join(CLOSE_S)

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
                    self._add(shard, self._row(index, finished.result, shard.hashes[index]))
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

    def _row(self, index: int, result: Any, image_hash: str) -> dict[str, Any]:
        row = self.work.method.row(self._data.example_ids[index], int(self._data.labels[index]), result)
        return row | {"image_hash": image_hash}

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
        self._add(shard, self.work.method.error_row(example_id, label, sigma, self.work.terms))

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
        procedures = self.work.method.procedures(self.work.terms)
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
                image = None  # read and decoded once for all levels
                for sigma, procedure in zip(self.work.levels, procedures, strict=True):
                    if (self._data.example_ids[index], sigma) in shard.done:
                        continue
                    try:
                        task = make_task((shard, index, sigma), self._data, index, procedure, image)
                    except Exception as error:  # an image that cannot be read
                        self._fail(shard, index, sigma, error)
                    else:
                        if image is None:
                            shard.hashes[index] = hash_of(task)
                        image = task.image
                        yield task


def is_device_error(error: BaseException) -> bool:
    """Whether the device, and not an input, is to blame."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError))


def retired(work: Work) -> Folder:
    """Where replicas note that their device has failed."""
    return work.root / "errors" / "replicas"


def _node() -> str:
    return socket.gethostname()
