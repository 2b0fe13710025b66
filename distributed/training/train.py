"""Training in this process, or on the workers of Ray Train: the same loop, checkpoints, curves and progress."""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.data import Dataset
from core.errors import ConfigError, DualRSError, ModelError
from core.machine.cpu import settle
from core.models.checkpoints import load_model
from core.training.loop import Record, Training
from distributed.cluster.cluster import train_cluster, train_device, train_resources, trainings_at_once
from distributed.cluster.joining import joins
from distributed.execution.metrics import Gauges
from distributed.execution.work import check_visible
from distributed.files.datasets import load_dataset
from distributed.store.progress import StepProgress
from distributed.store.run_directory import RunDirectory, model_bytes
from distributed.store.track import Tracker, tracked
from distributed.training.checkpoints import Checkpoints, Curves
from distributed.training.lesson import Lesson

__all__ = ["Member", "forget", "train"]

_START = "start"

_LAST_S = 10.0
"""How long the workers may take to end after one has said why it cannot go on: others may wait for it."""
_REPORT_S = 10.0
"""Seconds between two reports to Ray Train, at least."""


@dataclass(frozen=True)
class Sign:
    """How far a training is: samples seen, of how many in all; the record of an epoch that has just ended; whether the
    workers (or this process) have only just begun.
    """

    done: int
    total: int
    record: Record | None = None
    begins: bool = False


@dataclass(frozen=True)
class Member:
    """One of the trainings of a step.

    Attributes:
        lesson: what it learns.
        model: on the CPU; trained in place, ends there, in evaluation mode.
        what: what progress lines call it.
    """

    lesson: Lesson
    model: nn.Module
    what: str


def train(directory: RunDirectory, members: Sequence[Member]) -> list[list[Record]]:
    """Train each from the last checkpoint of its training on, if there is one.

    In this process, one after the other; or with `compute.train_workers` on workers of Ray Train, as many trainings
    side by side as the cluster has room for. Same configuration, data and machine: same weights to the bit, however
    often it was interrupted; for another number of workers see `core.training.loop`. The checkpoints stay until
    `forget`.

    Returns:
        For each the record of each epoch.

    Raises:
        ConfigError: when there is no device for it.
        DataError: for an image that cannot be read, a damaged checkpoint.
        ModelError: when the loss is not finite.
        LimitError: when the run's device hours are spent.
    """
    compute = directory.config.compute
    histories: list[list[Record]] = [[] for _ in members]
    waiting = deque(enumerate(members))
    running: dict[int, Generator[None, None, list[Record]]] = {}
    with train_cluster(compute), tracked(directory) as tracker, ExitStack() as stack:
        at_once = trainings_at_once(compute)
        while waiting or running:
            while waiting and len(running) < at_once:
                place, member = waiting.popleft()
                running[place] = stack.enter_context(closing(_training(directory, member, 0.5 / at_once, tracker)))
            for place, training in list(running.items()):
                try:
                    next(training)
                except StopIteration as ended:
                    histories[place] = ended.value
                    del running[place]
    return histories


def _training(
    directory: RunDirectory, member: Member, patience_s: float, tracker: Tracker
) -> Generator[None, None, list[Record]]:
    """One training, told of as it goes on; yields now and then, and at the latest every `patience_s` on workers."""
    lesson, model, what = member.lesson, member.model, member.what
    compute = lesson.config.compute
    checkpoints = Checkpoints(lesson.folder, lesson.identity(model))
    signs = (
        _on_workers(lesson, model, what, patience_s)
        if compute.train_workers
        else _in_process(directory.data("train"), lesson, model, checkpoints)
    )
    with ExitStack() as stack:
        stack.enter_context(closing(signs))
        curves = stack.enter_context(Curves(lesson.folder / "tensorboard"))
        progress, epoch, note = None, 0, ""
        for sign in signs:
            if sign is None:
                yield
                continue
            if progress is None:
                progress = stack.enter_context(
                    StepProgress(lesson.folder, compute, sign.total, what, "samples", done=sign.done)
                )
            elif sign.begins:
                print(f"{what}: a worker was lost, all go on from {sign.done:,} samples", flush=True)
            if sign.record is not None and sign.record["epoch"] > epoch:  # after a lost worker some come again
                epoch, loss = int(sign.record["epoch"]), sign.record["loss"]
                curves.add(sign.record)
                values = {
                    f"{lesson.folder.name}/{name}": value for name, value in sign.record.items() if name != "epoch"
                }
                tracker.log_metrics(values, epoch)
                note = f"epoch {epoch}, loss {loss:.4f}"
                if "held_out" in sign.record:
                    note += f", held-out radius {sign.record['held_out']:.4f}"
            progress.update(max(0, sign.done - progress.done), note)
            yield
    state = checkpoints.read()
    assert state is not None, "every training ends with a checkpoint"
    model.cpu().load_state_dict(state["model"])
    model.eval()
    return [dict(record) for record in state["history"]]


def forget(lesson: Lesson) -> None:
    """Remove what only serves to go on: the step is recorded as finished."""
    Checkpoints(lesson.folder, "").forget()
    lesson.folder.remove(f"{_START}.safetensors")


def _in_process(data: Dataset, lesson: Lesson, model: nn.Module, checkpoints: Checkpoints) -> Generator[Sign | None]:
    compute = lesson.config.compute
    device = train_device(compute)
    settle(compute.train_threads)
    training = Training(model.to(device), lesson.objective(data, device, 1))
    yield from _advance(training, checkpoints, writes=True)


def _advance(training: Training, checkpoints: Checkpoints, *, writes: bool) -> Generator[Sign]:
    """Go on from the last checkpoint to the end, writing others."""
    if (state := checkpoints.read()) is not None:
        training.load_state(state)
    total, epochs = training.samples_total, training.objective.schedule.epochs
    yield Sign(training.samples_done, total, begins=True)
    for record in training.run():
        if writes:
            checkpoints.offer(training.state, epoch_ended=record is not None, ended=training.epoch == epochs)
        yield Sign(training.samples_done, total, record)


def _on_workers(lesson: Lesson, model: nn.Module, what: str, patience_s: float) -> Generator[Sign | None]:
    """What the first worker says, while Ray Train keeps all running; if one is lost, all go on from the checkpoint.

    None when it has said nothing for `patience_s`.
    """
    compute = lesson.config.compute
    start = _save_start(lesson, model)
    if joins():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # for the dashboard's page on trainings
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths stay what they are
    with tempfile.TemporaryDirectory() as aside:
        import ray.train  # not before: `connected` decides how Ray authenticates
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.queue import Empty, Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        resources = train_resources(compute)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        signs = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"lesson": lesson, "start": start, "identity": lesson.identity(model), "signs": signs},
            torch_config=TorchConfig(backend="nccl" if compute.train_device == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=compute.train_workers,
                use_gpu=compute.train_device == "cuda",
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=lesson.name,
                storage_path=aside,  # for Ray's own notes; what we need is in the run directory
                failure_config=ray.train.FailureConfig(max_failures=compute.train_retries),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        print(f"{what}: {compute.train_workers} workers of {_describe(resources)} each", flush=True)
        gauges = Gauges(
            lesson.name,
            training_epoch="epochs done",
            training_loss="mean loss of the last epoch",
            training_learning_rate="of the last epoch",
            training_samples_per_second="over the last epoch",
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread of its own: Ctrl-C and SIGTERM then end this process as they do elsewhere.
        fitting = threading.Thread(target=fit, name="ray-train", daemon=True)
        fitting.start()
        while True:
            alive = fitting.is_alive()  # before the look: what it said last is not missed
            try:
                sign = signs.get(timeout=patience_s)
            except Empty:
                if not alive:
                    break
                yield None
                continue
            if isinstance(sign, DualRSError):
                fitting.join(_LAST_S)
                raise sign
            if (record := sign.record) is not None:
                gauges.set(
                    training_epoch=record["epoch"],
                    training_loss=record["loss"],
                    training_learning_rate=record["lr"],
                    training_samples_per_second=record["samples_per_s"],
                )
            yield sign
        if failure:
            raise _explained(failure[0], compute.train_retries, what) from failure[0]


def _worker(given: Mapping[str, Any]) -> None:
    """What each worker of Ray Train runs. What no further try would mend (all workers, or a node that lacks something)
    is said to the driver.
    """
    try:
        _learn(given)
    except (ConfigError, ModelError) as error:
        given["signs"].put(error)


def _learn(given: Mapping[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    lesson: Lesson = given["lesson"]
    context, compute = ray.train.get_context(), lesson.config.compute
    rank = context.get_world_rank()
    check_visible(lesson.root)
    if compute.train_device == "cpu":
        settle(compute.train_threads)
    data = load_dataset(lesson.config.dataset, "train")
    if not data.matches(lesson.data_digest):
        raise ConfigError(
            f"dataset: this machine holds another training split than the driver (fingerprint {data.digest()}, "
            f"expected {lesson.data_digest}); give all machines the same files"
        )
    device = str(ray.train.torch.get_device())
    code = lesson.config.own_code.values()
    model = load_model(lesson.folder.fetch(f"{_START}.safetensors", given["start"]), code).to(device)
    objective = lesson.objective(data, device, context.get_local_world_size())
    training = Training(model, objective, rank, context.get_world_size())
    checkpoints = Checkpoints(lesson.folder, given["identity"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    said = reported = 0.0
    for sign in _advance(training, checkpoints, writes=rank == 0):
        if sign.record is not None:
            # A report waits for all workers and for Ray Train's next look at them, two seconds apart.
            due = time.monotonic() - reported >= _REPORT_S or sign.done == sign.total
            if _as_the_first_says(due, device):
                ray.train.report(sign.record)
                reported = time.monotonic()
        if rank == 0 and (sign.begins or sign.record is not None or time.monotonic() - said >= 1.0):
            given["signs"].put(sign)
            said = time.monotonic()


def _as_the_first_says(yes: bool, device: str) -> bool:
    """The first worker's answer, on all of them."""
    answer = torch.tensor(int(yes), device=device)
    torch.distributed.broadcast(answer, 0)
    return bool(answer.item())


def _save_start(lesson: Lesson, model: nn.Module) -> str:
    """The network that workers begin with, as a file that all of them see; returns its SHA-256."""
    content = model_bytes(model)
    lesson.folder.write(f"{_START}.safetensors", content)
    return hashlib.sha256(content).hexdigest()


def _describe(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _explained(error: BaseException, retries: int, what: str) -> BaseException:
    """Our own error among those of the workers, or one that says what Ray Train says."""
    failures = getattr(error, "worker_failures", {})
    for rank in sorted(failures):
        cause: BaseException | None = failures[rank]
        while cause is not None:
            if isinstance(cause, DualRSError):
                return cause
            cause = getattr(cause, "_base_exc", None) or cause.__cause__
    return ModelError(
        f"{what}: the training workers failed {retries + 1} times (compute.train_retries = {retries}); the same "
        f"command goes on from the last checkpoint. The last failure: {str(error).strip()[-2000:]}"
    )
