"""What is to be certified, and its parts on this machine: networks, engine, procedures, tasks and rows.

Small things that replicas, the audit and measurements share; `distributed.execution.replica` puts them to work.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from core.config import Config
from core.data import Dataset, Split, image_hash
from core.errors import ConfigError, ModelError
from core.law import law_of
from core.machine.batch_size import DeviceProbe, choose_batch_size
from core.machine.cpu import settle
from core.machine.engine import Engine, Task
from core.machine.network import Forward, Head, Network
from core.machine.noise import Noise, make_noise
from core.machine.noise_check import check_noise
from core.machine.reference import WithReference
from core.models.checkpoints import load_model
from core.models.denoiser import OneShotDenoiser
from core.procedures.sequential import Budget
from core.records import CLASSIFIER, ESTIMATOR, Draws, Phase, Sampling, paired
from distributed.files.datasets import load_dataset
from distributed.files.storage import Folder
from distributed.methods import method_of
from distributed.methods.method import Method, Terms
from distributed.store.origin import arithmetic_of
from distributed.store.plan import Plan

__all__ = [
    "Rows",
    "Work",
    "build_engine",
    "build_network",
    "check_visible",
    "hash_of",
    "make_task",
    "measure_rate",
    "probe_batch_size",
    "sound_noise",
    "warm_up",
]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What a replica does; small and picklable: names of files, not weights.

    Attributes:
        root: the run directory.
        store: folder of the shards inside it; says the method too.
        split: which examples.
        sampling: draws and failure probability of a certificate.
        budget: `fixed`, `sequential` or `grid`, as in `CertifyConfig`.
        models: by role (those of `Config.base_models` and, where it is asked, `estimator`): name in models/
            and SHA-256.
        config: the run's configuration.
        device: `cpu`, `cuda` or, before the cluster has been asked, `auto`.
        data_digest: `Dataset.digest` of the split; a replica that finds another one refuses it. Empty: not compared.
        networks: folder of the models, where it is not models/ in the run directory.
        started: when this call of the driver began, seconds since the epoch.
    """

    root: Folder
    store: str
    split: Split
    sampling: Sampling
    budget: Budget
    models: Mapping[str, tuple[str, str]]
    config: Config
    device: str
    data_digest: str = ""
    networks: Folder | None = None
    started: float = field(default_factory=time.time)

    @property
    def method(self) -> Method:
        """What is run on each example."""
        return method_of(self.store)

    @property
    def terms(self) -> Terms:
        """What its rows are certified under."""
        return Terms.of(self.config, self.sampling, self.budget)

    @property
    def rows_per_example(self) -> int:
        """Rows that an example gives."""
        return len(self.levels)

    @property
    def draws_per_example(self) -> int:
        """Noisy copies that an example takes, at most."""
        return self.method.copies(self.terms)[0].total()

    @property
    def levels(self) -> tuple[float | None, ...]:
        """Noise levels of an example's rows; (None,) where the draws pick it."""
        return self.method.levels(self.config.sigmas)

    def under(self, plan: Plan) -> "Work":
        """The same work with the arithmetic that a plan was begun with."""
        return replace(self, sampling=replace(self.sampling, law=law_of(self.config.noise, arithmetic_of(plan))))

    def model_files(self) -> dict[str, Path]:
        """The networks as files of this machine."""
        models = self.networks or self.root / "models"
        return {role: models.fetch(f"{name}.safetensors", digest) for role, (name, digest) in self.models.items()}


def build_network(models: Mapping[str, Path], config: Config, num_classes: int, device: str) -> Network:
    """Load denoiser and heads and check them against the configuration.

    `models`: files by role, see `Work`; the roles that are missing are left out.

    Raises:
        ModelError: for a file that cannot be loaded or a sigma beyond the denoiser's schedule.
    """
    code = config.own_code.values()
    denoiser = load_model(models["denoiser"], code) if "denoiser" in models else None
    if isinstance(denoiser, OneShotDenoiser):
        for sigma in {*config.sigmas, config.estimator_sigma}:
            denoiser.timestep(sigma)
    loaded = {role: load_model(file, code) for role, file in models.items() if role != "denoiser"}
    heads = {}
    if CLASSIFIER in loaded:
        heads[CLASSIFIER] = Head(loaded[CLASSIFIER], num_classes)
    elif experts := {sigma: loaded[role] for role, sigma in config.classifiers.items() if sigma and role in loaded}:
        heads[CLASSIFIER] = Head(experts, num_classes)
    if ESTIMATOR in loaded:
        heads[ESTIMATOR] = Head(loaded[ESTIMATOR], len(config.sigmas), config.estimator.denoiser)
    return Network(heads, cast("OneShotDenoiser | None", denoiser), device)


def sound_noise(config: Config, device: str) -> Noise:
    """The noise of a run, looked at on a device once in a process (`core.machine.noise_check`).

    Raises:
        NoiseError: when it is not what certificates assume.
    """
    levels = (*config.sigmas, config.estimator_sigma)
    return _sound(config.noise, config.seed, config.noise_version, config.compute.chunk_size, device, levels)


@lru_cache(maxsize=16)
def _sound(kind: str, seed: int, version: int, chunk_size: int, device: str, levels: tuple[float, ...]) -> Noise:
    noise = make_noise(kind, seed, version, chunk_size)
    check_noise(noise, device, levels)
    return noise


def build_engine(work: Work, num_classes: int, batch_size: int | None = None) -> Engine:
    """Network, noise and batch shape of a work; sets the CPU threads of this process.

    `batch_size`: the plan's; None takes the configured one (a plan from before plans kept it).

    Raises:
        ConfigError: without a number, from the plan or the configuration.
        NoiseError: when this machine's noise is not what certificates assume.
    """
    config, compute = work.config, work.config.compute
    rows = batch_size or compute.batch_size
    if rows == "auto":
        raise ConfigError(f"the plan of {work.store} does not say what compute.batch_size=auto came to; use a number")
    noise = sound_noise(config, work.device)
    return Engine(_load_network(work, num_classes), noise, batch_size=rows)


def _load_network(work: Work, num_classes: int, compiled: bool = True) -> Network:
    compute, reference = work.config.compute, work.config.certify.reference
    if work.device == "cpu":
        settle(compute.threads_per_replica)
    plain = build_network(work.model_files(), work.config, num_classes, work.device)
    forward = Forward(compute.precision, compute.channels_last, compiled and compute.compile)
    network = Network(plain.heads, plain.denoiser, plain.device, forward)
    if reference is None or not work.sampling.num_reference:
        return network
    second = Forward(reference.precision, compute.channels_last, compiled and reference.compile)
    return WithReference(network, second, reference.batch_size)


def _requests(work: Work, network: Network) -> list[Draws]:
    """One of each kind that the procedures of a work make: of every network, at the highest level that it sees."""
    experts = isinstance(network.heads[CLASSIFIER].module, Mapping)
    levels = work.config.sigmas if experts else work.config.sigmas[-1:]
    requests = [Draws(level, 1, (CLASSIFIER,), Phase.ESTIMATION) for level in levels]
    if ESTIMATOR in work.method.heads:
        requests.append(Draws(work.config.estimator_sigma, 1, (ESTIMATOR,), Phase.ESTIMATION))
    if work.sampling.num_reference:
        requests += [replace(each, heads=(*each.heads, *map(paired, each.heads))) for each in requests]
    return requests


def warm_up(engine: Engine, work: Work, data: Dataset) -> float:
    """One forward pass of every network of a work; returns the seconds of one, on average."""
    return engine.warm_up(data.shape, _requests(work, engine.network))


def check_visible(root: Folder) -> None:
    """Refuse to work where the run directory is another one.

    Raises:
        ConfigError: when this machine does not see the driver's files.
    """
    if not root.exists("manifest.json"):
        raise ConfigError(
            f"{str(root)!r} cannot be seen on {socket.gethostname()}, or its manifest.json is gone: replicas and "
            "training workers on other machines need a run directory on a shared file system or an object store "
            "(s3://, gs://)"
        )


def probe_batch_size(work: Work) -> int:
    """What `compute.batch_size: auto` comes to on this device (`core.machine.batch_size.choose_batch_size`).

    Uncompiled where `compute.compile` is set: every size that is tried would be compiled anew, for minutes each.

    Raises:
        ModelError: when the device is too small for a single row.
    """
    check_visible(work.root)
    data, compute = load_dataset(work.config.dataset, work.split), work.config.compute
    network = _load_network(work, data.num_classes, compiled=False)
    replicas_here = max(1, (os.cpu_count() or 1) // compute.threads_per_replica)
    share = min(1.0, compute.gpus_per_replica) if work.device == "cuda" else 1 / replicas_here
    try:
        return choose_batch_size(DeviceProbe(network, data.shape, _requests(work, network), share))
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"not even one row fits on {work.device} of {socket.gethostname()}: use a larger device ({error})"
        ) from error


def measure_rate(work: Work, batch_size: int | None = None, seconds: float = 2.0) -> float:
    """Rows per second of the bare forward passes of a work at its batch shape, on this device."""
    check_visible(work.root)
    data = load_dataset(work.config.dataset, work.split)
    engine = build_engine(work, data.num_classes, batch_size)
    start, took = time.monotonic(), warm_up(engine, work, data)
    while time.monotonic() - start < seconds:
        took = min(took, warm_up(engine, work, data))
    return engine.batch_size / took


def make_task(
    key: Any, data: Dataset, index: int, procedure: Callable[[], Any], image: torch.Tensor | None = None
) -> Task[Any]:
    """The engine's task for one procedure on one example; `image` spares reading it again."""
    if image is None:
        image = torch.from_numpy(data.image(index)).float().div_(255.0)
    return Task(key, data.example_ids[index], image, procedure())


def hash_of(task: Task[Any]) -> str:
    """`core.data.image_hash` of the 8-bit image that a task certifies."""
    return image_hash((task.image * 255.0).round_().to(torch.uint8).numpy())
