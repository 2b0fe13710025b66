"""Rates of a run's steps on this machine, each over a few seconds of the real code at the configured batch shape.

Networks that the run does not hold yet are stood in for by untrained ones of the same architecture: the time of a
forward pass does not depend on the weights.
"""

import math
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from core.config import Config
from core.data import Dataset, Split
from core.errors import ConfigError, DualRSError, ModelError
from core.machine.cpu import settle
from core.machine.network import Denoiser
from core.models.checkpoints import load_model
from core.models.denoiser import OneShotDenoiser
from core.models.features import FeatureRouter
from core.procedures.smoothing import certificate, certify, estimate
from core.records import CLASSIFIER, ESTIMATOR, Certificate, Draws, Phase, Procedure, Sampling, is_paired
from core.training.base_networks import base_objective
from core.training.classifier import copies_of
from core.training.estimator import EstimatorObjective, new_estimator
from core.training.finetune import FinetuneObjective, choose_sigma
from core.training.loop import Objective, Schedule, Training
from distributed.checks.estimate import DENOISER, TRAINING, Part
from distributed.checks.published import published_data
from distributed.cluster.cluster import connected, replica_pool
from distributed.execution.launch import step_of, stores, work_of
from distributed.execution.work import Work, build_engine, make_task, warm_up
from distributed.files.datasets import absolute
from distributed.files.storage import Folder
from distributed.methods.dual import Dual
from distributed.methods.method import Kind
from distributed.methods.rows import certificate_row
from distributed.store.run_directory import RunDirectory
from distributed.store.sources import base_model, local_models

__all__ = ["measure_on_worker", "measure_parts"]

_PATIENCE_S, _BRIEF_S = 20.0, 5.0
"""A forward pass of the configured batch that would take longer is measured in a batch that takes about so long."""


def measure_parts(
    directory: RunDirectory,
    parts: Sequence[Part],
    data: Mapping[Split, Dataset],
    device: str,
    seconds: float,
    absent: Collection[str] = (),
) -> list[str]:
    """Measure the rate of each kind of pass that each part makes, and set it there.

    Args:
        directory: the run; nothing is written into it.
        parts: what is to be measured.
        data: the splits that they read.
        device: `cpu` or `cuda`.
        seconds: that each measurement takes.
        absent: keys of networks whose files are missing: random weights in their place, where their architecture is
            known without.

    Returns:
        What is to be known of the numbers: which batches were smaller, and what could not be measured.
    """
    notes: list[str] = []
    known: dict[tuple[Any, ...], tuple[float, float]] = {}
    with _stand_in(directory, next(iter(data.values())), absent) as (run, there):
        for part in parts:
            if not part.num_copies:
                continue
            needed = {name for name, num in part.rows.items() if num}
            needed |= {CLASSIFIER} if part.name.startswith("finetune") else set()
            if lacking := needed - there:
                notes.append(f"{part.name}: not measured, its {', '.join(sorted(lacking))} is not known")
                continue
            if TRAINING in part.copies:
                if run.config.compute.train_device == "cuda" and not torch.cuda.is_available():
                    notes.append(f"{part.name}: not measured, compute.train_device is cuda and there is no GPU here")
                else:
                    part.rates[TRAINING] = _Training(run, data["train"], seconds, notes).rate(part.name)
                continue
            store = next((store for store in stores() if step_of(store) == part.name), "certificates/dual-base")
            work = replace(work_of(run, store)[0], device=device)
            for kind, num in part.copies.items():
                draws = run.config.finetune.num_sigma_draws if part.name not in map(step_of, stores()) else 0
                key = (kind, draws, work.sampling.num_selection, work.sampling.num_estimation)
                if num and key not in known and kind not in known:
                    measured = _engine_rate(work, data, kind, draws, seconds, notes)
                    known[kind if measured[0] * seconds < 1 else key] = measured  # of one image, it is the networks'
                if num:
                    part.rates[kind], start_s = known.get(key) or known[kind]
                    part.start_s = max(part.start_s, start_s)
    return notes


def measure_on_worker(
    directory: RunDirectory,
    parts: list[Part],
    splits: Sequence[Split],
    seconds: float,
    absent: Collection[str] = (),
) -> list[str]:
    """`measure_parts` where a replica of the cluster would run, as soon as there is one: the driver's machine is none.

    Args:
        directory: the run, which the worker sees too.
        parts: replaced by measured ones.
        splits: that they read.
        seconds: that each measurement takes.
        absent: see `measure_parts`; and `dataset.train` or `dataset.test`.

    Raises:
        DualRSError: what the worker raises; as `replica_pool`.
    """
    config = directory.config.model_copy(update={"dataset": absolute(directory.config.dataset)})
    with connected(config.compute):
        import ray

        pool = replica_pool(config.compute)
        print(f"waiting for a replica to measure on: {pool.describe()}", flush=True)
        measure = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)(_measured)
        try:
            measured, notes, where = ray.get(
                measure.remote(directory.folder, config, parts, tuple(splits), pool.device, seconds, tuple(absent))
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, DualRSError) else error from None
    parts[:] = measured
    return [f"measured on {where}, {seconds:g} s each", *notes]


def _measured(
    root: Folder,
    config: Config,
    parts: list[Part],
    splits: Sequence[Split],
    device: str,
    seconds: float,
    absent: Collection[str],
) -> tuple[list[Part], list[str], str]:
    run = RunDirectory(root, config, "dry")
    data: dict[Split, Dataset] = {}
    for split in splits:
        standing = published_data(config, split) if f"dataset.{split}" in absent else None
        data[split] = standing or run.data(split)
    notes = measure_parts(run, parts, data, device, seconds, absent)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return parts, notes, f"{name} of {socket.gethostname()}"


@contextmanager
def _stand_in(
    directory: RunDirectory, data: Dataset, absent: Collection[str]
) -> Iterator[tuple[RunDirectory, set[str]]]:
    """A temporary run directory that holds all models: the run's own as far as they are there; and which of `denoiser`,
    `estimator` and `classifier` are whole, where an absent file may be all that says what it is.
    """
    config, shape = directory.config, data.shape
    with tempfile.TemporaryDirectory(prefix="dual-rs-") as aside:
        run = RunDirectory(aside, config)
        (Path(aside) / "models").mkdir()
        written = {name for step in directory.manifest["steps"].values() for name in step["wrote"]}

        def base(role: str) -> nn.Module:
            return base_model(directory, role, shape, data.num_classes, data.class_names, absent)

        makers: dict[str, Callable[[], nn.Module]] = {
            **{name: partial(base, name) for name in config.denoisers},
            "estimator": lambda: new_estimator(local_models(directory, "estimator", absent), shape, base),
            **{role: partial(base, role) for role in config.classifiers},
        }
        tuned = {name: role for role, name in config.certified.items() if name not in makers}
        wrote: dict[str, str] = {}
        there = {DENOISER, ESTIMATOR, CLASSIFIER}
        for name in (*makers, *tuned):
            if name in written:
                wrote |= directory.model_hashes([name])
                run.model(name).symlink_to(directory.model(name).absolute())
            elif name in makers:
                try:
                    wrote[name] = run.save_model(name, makers[name]())
                except ModelError:
                    if not absent:
                        raise
                    there.discard(name.partition("-")[0])  # an expert of many: none is measured
            elif tuned[name] in wrote:
                wrote[name] = wrote[tuned[name]]
                run.model(name).symlink_to(run.model(tuned[name]))
        run.finish("train_base", read={}, wrote=wrote, facts={})
        yield run, there


def _engine_rate(
    work: Work, data: Mapping[Split, Dataset], kind: Kind, sigma_draws: int, seconds: float, notes: list[str]
) -> tuple[float, float]:
    """Noisy copies per second of an engine that does nothing else, and the seconds that it took to start."""
    split = data[work.split] if work.split in data else next(iter(data.values()))
    start = time.perf_counter()
    try:
        engine = build_engine(work, split.num_classes, work.config.compute.training_batch_size)
        one_row_s = _one_row_s(engine.network, split, work, kind)
        if one_row_s * engine.batch_size > _PATIENCE_S:
            batch, engine.batch_size = engine.batch_size, max(1, int(_BRIEF_S / one_row_s))
            notes.append(
                f"{work.store}, {' and '.join(kind)}: measured in "
                + (f"batches of {engine.batch_size}" if one_row_s <= seconds else "two passes of one image")
                + f" instead of batches of {batch}: one image takes {one_row_s:.2g} s"
            )
        if one_row_s > seconds:  # what surrounds the networks is nothing beside that
            return 1 / one_row_s, time.perf_counter() - start
        warm_up(engine, work, split)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"compute.batch_size: {work.config.compute.batch_size} rows do not fit into the memory of this machine's "
            f"{work.device} ({str(error).partition('.')[0]}); lower it"
        ) from error
    start_s = time.perf_counter() - start
    watch = _Stopwatch(engine.network, seconds, engine.batch_size)
    engine.network = cast(Any, watch)

    def tasks() -> Iterator[Any]:
        for number in count():
            for procedure in _procedures(work, kind, sigma_draws):
                yield make_task((number,), split, number % len(split), procedure)

    try:
        for finished in engine.run(tasks()):
            if isinstance(finished.result, Certificate):
                certificate_row(split.example_ids[0], 0, finished.result)
    except _TimeIsUpError:
        return watch.rate, start_s
    raise AssertionError("the tasks have an end")


class _TimeIsUpError(Exception):
    pass


class _Stopwatch:
    """A network that counts rows and ends the run when the time is up."""

    def __init__(self, network: Any, seconds: float, batch_size: int) -> None:
        self._network, self._seconds, self._batch_size = network, seconds, batch_size
        self._start, self._rows, self.rate = 0.0, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any) -> Any:
        now = time.perf_counter()
        if not self._rows:
            self._start = now
        elif now - self._start >= self._seconds and self._rows >= 3 * self._batch_size:
            if self._network.device.type == "cuda":
                torch.cuda.synchronize()
            self.rate = self._rows / (time.perf_counter() - self._start)
            raise _TimeIsUpError
        self._rows += self._batch_size
        return self._network(*args)


def _procedures(work: Work, kind: Kind, sigma_draws: int) -> Iterator[Callable[[], Procedure[Any]]]:
    """Makers of certificates that make only this kind of pass, at the levels of the work."""
    config, sigma_e, stage = work.config, work.config.estimator_sigma, work.method.stage(work.terms)
    if sigma_draws:
        yield partial(choose_sigma, config.sigmas, sigma_e, sigma_draws)
        return
    heads = tuple(name for name in kind if not is_paired(name))
    if heads != kind:
        stage = replace(stage, num_selection=1, num_reference=stage.num_estimation)
    else:
        stage = replace(stage, num_reference=0)
    if heads == (CLASSIFIER,):
        for sigma in config.sigmas:
            yield partial(certify, sigma, stage)
    elif heads == (ESTIMATOR,):
        yield partial(certify, sigma_e, stage, head=ESTIMATOR)
    else:
        yield partial(_shared, sigma_e, stage)


def _shared(sigma_e: float, stage: Sampling) -> Procedure[Certificate]:
    selection = yield Draws(sigma_e, stage.num_selection, Dual.heads, Phase.SELECTION)
    found = yield from estimate(sigma_e, stage, Dual.heads)
    certificate(selection[CLASSIFIER], found[CLASSIFIER].counts, sigma_e, stage, found[CLASSIFIER])
    return certificate(selection[ESTIMATOR], found[ESTIMATOR].counts, sigma_e, stage, found[ESTIMATOR])


def _one_row_s(network: Any, data: Dataset, work: Work, kind: Kind) -> float:
    """Seconds of a forward pass of one noisy copy through the networks of a kind: the faster of two, for the first may
    read the weights from the disk.
    """
    sigma = work.config.estimator_sigma if ESTIMATOR in kind else work.config.sigmas[-1]
    lane = network.lane(Draws(sigma, 1, kind, Phase.ESTIMATION))
    seconds = math.inf
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            row = torch.zeros((1, *data.shape), device=network.device)
            for logits in network(lane, row, torch.full((1,), sigma, device=network.device)).values():
                logits.sum().item()
            seconds = min(seconds, time.perf_counter() - start)
    return seconds


class _Training:
    """Rates of the trainings, on a few batches of the training split."""

    def __init__(self, run: RunDirectory, train: Dataset, seconds: float, notes: list[str]) -> None:
        self._run, self._config, self._train, self._seconds, self._notes = run, run.config, train, seconds, notes
        self._device, self._code = run.config.compute.train_device, run.config.own_code.values()
        settle(run.config.compute.train_threads)

    def _load(self, name: str) -> nn.Module:
        return load_model(self._run.model(name), self._code).to(self._device)

    def rate(self, name: str) -> float:
        """Noisy copies per second of a part."""
        loaded = [self._load(each) for each in self._config.denoisers if self._run.model(each).exists()]  # if known
        denoiser = cast(OneShotDenoiser, loaded[0]) if loaded else None
        step, _, role = name.partition(", ")
        return self._of_base(name, role, denoiser) if step == "train_base" else self._on_pixels(name, denoiser)

    def _of_base(self, name: str, role: str, denoiser: OneShotDenoiser | None) -> float:
        config, train = self._config, self._config.training_of(role)
        assert train is not None, "trained here"
        model = self._load(role)
        made = cast(OneShotDenoiser, model) if role == DENOISER else None
        front, behind = (made, nn.Identity()) if made else (denoiser, model)
        one_s = _one_image_s(front, behind, self._train, max(config.sigmas), self._device) * copies_of(train)
        part, batch = self._part(name, train.batch_size, one_s)
        objective = base_objective(config, role, part, None if made else denoiser)
        copies = len(part) * copies_of(train)

        def begin(num: int) -> None:
            update = {"batch_size": batch, "compile": False}
            objective.schedule = Schedule(objective.schedule.config.model_copy(update=update), num)
            for _ in Training(model, objective).run():
                pass

        return self._timed(begin, copies)

    def _on_pixels(self, name: str, denoiser: OneShotDenoiser | None) -> float:
        estimator, finetune, sigma_e = self._config.estimator, self._config.finetune, self._config.estimator_sigma
        learns = name == "train_estimator"
        model = self._load("estimator" if learns else next(iter(self._run.config.classifiers)))
        router = model if isinstance(model, FeatureRouter) else None
        if router is not None:  # of random weights, float16 would not hold them
            router.extractor.register_forward_hook(lambda _, __, features: features.nan_to_num().clamp(-1, 1))
        front: Denoiser | None = denoiser if estimator.denoiser or not learns else None
        batch = estimator.batch_size if learns else finetune.batch_size
        each = (estimator.num_copies if router is None else estimator.feature_copies) if learns else 1
        one_s = _one_image_s(front, model, self._train, sigma_e, self._device) * each
        if router is None:
            part, batch = self._part(name, batch, one_s)
        else:  # each copy is computed once, and then there is little left to do
            part, _ = self._part(name, 4, one_s)
        copies = len(part) * each
        radii = np.random.default_rng(0).random((len(part), len(self._config.sigmas)))
        sigma, seed = np.full(len(part), sigma_e), self._config.seed

        def train(num: int) -> None:
            objective: Objective
            if learns:
                settings = estimator.model_copy(update={"epochs": num, "holdout": 0.0, "batch_size": batch})
                extractor = None if router is None else router.extractor
                objective = EstimatorObjective(part, radii, sigma_e, front, settings, seed, extractor=extractor)
            else:
                tuned = finetune.model_copy(update={"epochs": num, "batch_size": batch})
                objective = FinetuneObjective(part, np.arange(len(part)), sigma, front, tuned, seed)
            for _ in Training(model if router is None else router.head, objective).run():
                pass

        def begin(num: int) -> None:
            for _ in range(num):
                train(1)

        return self._timed(train if router is None else begin, copies)

    def _part(self, name: str, batch: int, one_s: float) -> tuple[Dataset, int]:
        """Images of four batches, and the batch; of a smaller one, where an image takes too long, a single one."""
        small = batch
        if one_s * batch > _PATIENCE_S:
            small = min(batch, max(2, int(_BRIEF_S / one_s)))  # of one alone a batch norm may have no variance
            self._notes.append(f"{name}: measured in batches of {small} images instead of {batch}")
        return self._train.take(range(min(len(self._train), 4 * batch if small == batch else small))), small

    def _timed(self, train: Callable[[int], object], copies: int) -> float:
        """Copies per second of so many epochs (or steps) that it takes about the time that is given."""
        num = 1
        start = time.perf_counter()
        train(num)  # warm
        num = 3 if time.perf_counter() - start < self._seconds else 1
        while True:
            start = time.perf_counter()
            train(num)
            took = time.perf_counter() - start
            if took >= self._seconds / 2:
                return num * copies / took
            num = max(2 * num, math.ceil(num * self._seconds / took))


def _one_image_s(denoiser: Denoiser | None, model: nn.Module, data: Dataset, sigma: float, device: str) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        image = torch.zeros((1, *data.shape), device=device)
        model(image if denoiser is None else denoiser(image, torch.full((1,), sigma, device=device))).sum().item()
    return time.perf_counter() - start
