"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from core.config import ComputeConfig, Config
from core.errors import ConfigError
from distributed.cluster.joining import check_cluster, joins, runtime_env

__all__ = [
    "Pool",
    "check_gpus",
    "connected",
    "device_here",
    "gpus_here",
    "placed",
    "quiet_ray_data",
    "replica_pool",
    "replicas_here",
    "train_cluster",
    "train_device",
    "train_resources",
    "training_place",
    "trainings_at_once",
]


_started_here = False
"""Whether Ray was started by `connected`, on this machine: it will not grow."""


@contextmanager
def connected(compute: ComputeConfig) -> Iterator[None]:
    """Be connected to a cluster inside the block.

    A connection that is already there is used and left alone. Under `ray job submit`, or with RAY_ADDRESS set, that
    cluster is joined. Otherwise Ray starts on this machine and is stopped at the end. Ray's ports listen on all
    interfaces whatever address it is given, so such a cluster asks for a token that only this process tree knows.
    """
    global _started_here
    if not joins() and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token for this cluster alone, never written down: Ray's own default leaves one in the home directory, which
        # later clusters would then ask for. Ray reads both when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    # Ray's own progress lines are for its developers: ours say what matters.
    if joins():
        check_cluster()
        try:
            ray.init(logging_level=logging.WARNING, runtime_env=runtime_env())
        except ConnectionError as error:
            raise ConfigError(f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}: {error}") from error
    else:
        ray.init(
            "local",  # never whatever cluster happens to run on this machine
            num_cpus=max(
                os.cpu_count() or 1,
                compute.max_replicas * compute.threads_per_replica,
                compute.train_workers * compute.train_threads,
            ),
            include_dashboard=False,
            logging_level=logging.WARNING,
            # Ray Train's helpers miss a dashboard every two seconds, and say so.
            log_to_driver=not compute.train_workers,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)  # Ray has put its own in its place
    _started_here = not joins()
    try:
        yield
    finally:
        _started_here = False
        ray.shutdown()


def gpus_here() -> int:
    """GPUs of this machine that PyTorch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_here(device: str) -> str:
    """What `auto` comes to in this process; any other device is itself."""
    return device if device != "auto" else "cuda" if gpus_here() else "cpu"


def check_gpus(compute: ComputeConfig) -> None:
    """Refuse replicas on GPUs that this machine does not have, where no cluster is joined.

    Raises:
        ConfigError: says how many there are, and the remedies.
    """
    local = compute.executor == "local"
    if compute.device != "cuda" or (joins() and not local):
        return
    gpus = gpus_here()
    share = compute.gpus_per_replica
    room = gpus if local else gpus * int(1 / share + 1e-9) if share < 1 else int(gpus / share + 1e-9)
    least = compute.min_replicas if compute.max_replicas and not local else 1
    if room < least:
        raise ConfigError(_too_few_gpus(gpus, least))


def _too_few_gpus(gpus: int, least: int) -> str:
    wanted = "a replica needs one" if least == 1 else f"compute.min_replicas = {least} of them do not fit"
    return (
        f"compute.device is 'cuda', but this machine has {gpus or 'no'} GPU{'s' if gpus > 1 else ''} that PyTorch can "
        f"use ({wanted}), and a Ray of its own does not grow; set compute.device=cpu, join a cluster (RAY_ADDRESS, "
        "`ray job submit`), or run it where the GPUs are (`nvidia-smi`)"
    )


def placed(config: Config) -> Config:
    """The configuration with a training worker where it asks for a GPU that the driver lacks and a cluster may have.

    The head of a cluster has none as a rule; Ray Train then puts the worker on a node that has one.
    """
    compute = config.compute
    joining = compute.executor == "ray" and joins()
    if compute.train_device != "cuda" or compute.train_workers or not joining or gpus_here():
        return config
    print("compute.train_workers=1: this machine has no GPU, so that a node of the cluster trains", flush=True)
    return config.model_copy(update={"compute": compute.model_copy(update={"train_workers": 1})})


def train_device(compute: ComputeConfig) -> str:
    """The device of training steps that run in the driver's process.

    Raises:
        ConfigError: when the driver sees no GPU and is to train on one.
    """
    if compute.train_device == "cuda" and not gpus_here():
        raise ConfigError(
            "compute.train_device is 'cuda', but this machine has no GPU that PyTorch can use: set "
            "compute.train_device=cpu, join a cluster that has one (RAY_ADDRESS, `ray job submit`), or run it where "
            "the GPUs are (`nvidia-smi`)"
        )
    return compute.train_device


def training_place(compute: ComputeConfig, here: bool) -> str:
    """Where the training steps will run, in words.

    `here`: whether this machine starts them, so that it needs the devices unless it joins a cluster.

    Raises:
        ConfigError: when they are not there, as far as it can be told without a cluster.
    """
    if not compute.train_workers:
        return f"in the driver's process, on its {train_device(compute) if here else compute.train_device}"
    if compute.train_device == "cpu":
        return f"{compute.train_workers} workers of Ray Train, {compute.train_threads} CPUs each"
    gpus = gpus_here()
    if here and gpus < compute.train_workers and not joins():
        raise ConfigError(
            f"compute.train_workers: {compute.train_workers} workers of a GPU each, but this machine has {gpus}; lower "
            "it, or submit the job to a cluster"
        )
    return f"{compute.train_workers} workers of Ray Train, a GPU each"


def train_resources(compute: ComputeConfig) -> dict[str, float]:
    """What Ray reserves for a training worker. Says so where they have to wait for room.

    Raises:
        ConfigError: when a cluster that cannot grow has no room for all of them.
    """
    import ray

    kind, each = _of_a_worker(compute)
    if _room(kind, each) < compute.train_workers:
        there = f"{ray.cluster_resources().get(kind, 0.0):g} {kind}s"
        if not joins():
            raise ConfigError(
                f"compute.train_workers: {compute.train_workers} workers of {each:g} {kind} each, but this machine has "
                f"{there}; lower it, or submit the job to a cluster"
            )
        print(f"waiting for room: {compute.train_workers} training workers, the cluster has {there} now", flush=True)
    return {kind: each}


def trainings_at_once(compute: ComputeConfig) -> int:
    """Trainings on `compute.train_workers` workers that the cluster has room for; 1 in the driver's process."""
    return max(1, _room(*_of_a_worker(compute)) // compute.train_workers) if compute.train_workers else 1


def _of_a_worker(compute: ComputeConfig) -> tuple[str, float]:
    return ("GPU", 1.0) if compute.train_device == "cuda" else ("CPU", float(compute.train_threads))


def quiet_ray_data() -> None:
    """Ray Data's progress bars and log lines are for its developers: ours say what matters."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it complains of the first line


def train_cluster(compute: ComputeConfig) -> AbstractContextManager[None]:
    """`connected` for a whole training step, where it needs a cluster at all."""
    return connected(compute) if compute.train_workers else nullcontext()


@dataclass(frozen=True)
class Pool:
    """Replicas of a step.

    Attributes:
        device: `cpu` or `cuda`.
        smallest, initial, largest: replicas at least, to begin with, and at most.
        num_cpus, num_gpus: what Ray reserves for one.
    """

    device: str
    smallest: int
    initial: int
    largest: int
    num_cpus: float
    num_gpus: float

    def describe(self) -> str:
        """In words."""
        number = f"{self.largest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
        each = f"{self.num_gpus:g} GPU" if self.num_gpus else f"{self.num_cpus:g} CPU"
        return f"{number} replicas of {each} each ({self.initial} to begin with)"


def replica_pool(compute: ComputeConfig) -> Pool:
    """The device that replicas take and how many of them there will be.

    Raises:
        ConfigError: when the cluster has no room for a replica and nothing says how many to wait for.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    device = compute.device if compute.device != "auto" else ("cuda" if gpus else "cpu")
    per_replica = compute.gpus_per_replica if device == "cuda" else float(compute.threads_per_replica)
    room = _room("GPU" if device == "cuda" else "CPU", per_replica)
    if not room and not compute.max_replicas:
        raise ConfigError(
            f"the cluster has room for no replica now ({gpus:g} GPUs, {cpus:g} CPUs; one takes {per_replica:g} "
            f"{'GPU' if device == 'cuda' else 'CPU'}); if it grows on demand, say what to wait for: "
            "compute.device=cuda compute.max_replicas=8"
        )
    if compute.device == "auto" and not gpus and compute.max_replicas > room:
        raise ConfigError(
            f"compute.device is 'auto', the cluster has no GPU now and room for {room} replicas on CPUs, and "
            f"compute.max_replicas = {compute.max_replicas} waits for it to grow; say with what: "
            "compute.device=cuda or compute.device=cpu"
        )
    largest = compute.max_replicas or room
    smallest = compute.min_replicas if compute.max_replicas else room
    if _started_here:
        if room < smallest:
            raise ConfigError(_too_few_gpus(int(gpus), smallest))
        largest = min(largest, room)
    return Pool(
        device=device,
        smallest=smallest,
        initial=max(smallest, min(room, largest)),
        largest=largest,
        num_cpus=0.0 if device == "cuda" else per_replica,
        num_gpus=per_replica if device == "cuda" else 0.0,
    )


def replicas_here(compute: ComputeConfig) -> tuple[str, int, str]:
    """Device and number of replicas as far as they can be told without asking a cluster, and a sentence on them."""
    import torch

    gpus, device = gpus_here(), device_here(compute.device)
    name = torch.cuda.get_device_name() if device == "cuda" and gpus else device
    if device == "cuda" and not gpus:
        name += ", of which this machine has none"
    if compute.executor == "local":
        return device, 1, f"{name}, one replica (compute.executor=local)"
    if compute.max_replicas:
        return device, compute.max_replicas, f"{name}, {compute.max_replicas} replicas (compute.max_replicas)"
    if joins() or (device == "cuda" and not gpus):
        return device, 1, f"{name}; counted with one replica, no cluster is asked: set compute.max_replicas"
    room = gpus / compute.gpus_per_replica if device == "cuda" else (os.cpu_count() or 1) / compute.threads_per_replica
    return device, max(1, int(room)), f"{name}, {max(1, int(room))} replicas (all of this machine)"


def _room(resource: str, per_replica: float) -> int:
    """Replicas that fit the nodes which are there; one that takes less than a device does not straddle two."""
    import ray

    sizes = [node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]]
    if per_replica < 1:
        return sum(int(size) for size in sizes) * int(1 / per_replica + 1e-9)
    return sum(int(size / per_replica + 1e-9) for size in sizes)
