"""The noise level that the estimator picks for each training sample: in this process, or on Ray's workers; kept."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import Config
from core.data import Dataset
from core.errors import DataError
from core.machine.cpu import settle
from core.machine.engine import Engine, Task
from core.machine.noise import make_noise
from core.training.finetune import choose_sigma
from distributed.cluster.cluster import quiet_ray_data, train_cluster, train_device, train_resources
from distributed.execution.work import build_network, check_visible, make_task
from distributed.files.datasets import absolute, load_dataset
from distributed.files.storage import Folder
from distributed.store.progress import StepProgress
from distributed.store.run_directory import RunDirectory

__all__ = ["forget_sigmas", "training_sigmas"]

_FILE = "sigmas.json"


@dataclass(frozen=True)
class _Choice:
    """What a worker needs to know; small and picklable."""

    root: Folder
    models: Folder
    config: Config
    hashes: Mapping[str, str]


class _Chooser:
    """Estimator and denoiser, where there is one, on a device; in this process, or as an actor of Ray Data."""

    def __init__(self, choice: _Choice, device: str, data: Dataset | None = None) -> None:
        check_visible(choice.root)
        config = self._config = choice.config
        if device == "cpu" or data is not None:
            settle(config.compute.train_threads)
        self._data = load_dataset(config.dataset, "train") if data is None else data
        files = {role: choice.models.fetch(f"{role}.safetensors", digest) for role, digest in choice.hashes.items()}
        noise = make_noise(config.noise, config.seed, config.noise_version, config.compute.chunk_size)
        network = build_network(files, config, self._data.num_classes, device)
        self._engine = Engine(network, noise, batch_size=config.compute.training_batch_size)

    def chosen(self, places: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Place and sigma of each of these samples whose image can be read, in any order."""
        config = self._config
        procedure = partial(choose_sigma, config.sigmas, config.estimator_sigma, config.finetune.num_sigma_draws)

        def tasks() -> Iterator[Task[Any]]:
            for place in places:
                with suppress(DataError):
                    yield make_task(place, self._data, place, procedure)

        for finished in self._engine.run(tasks()):
            yield finished.key, finished.result

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        pairs = list(self.chosen(batch["place"].tolist()))
        places, sigmas = zip(*pairs, strict=True) if pairs else ((), ())
        return {"place": np.array(places, np.int64), "sigma": np.array(sigmas, np.float64)}


def training_sigmas(
    directory: RunDirectory, data: Dataset, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The noise level of each of these samples of the training split, by the majority of its noisy copies' votes.

    The levels do not depend on where they are chosen. They are kept in the run directory until `forget_sigmas`.

    Returns:
        Places of the samples whose image can be read, ascending, and their levels.
    """
    config, folder = directory.config, directory.folder / "training" / "finetune_classifier"
    config = config.model_copy(update={"dataset": absolute(config.dataset)})
    hashes = directory.model_hashes([*config.denoisers, "estimator"])
    choice = _Choice(directory.folder, directory.models, config, hashes)
    origin = {
        "fingerprint": config.fingerprint(),
        "models": hashes,
        "data": directory.manifest["data"]["train"]["digest"],
        "places": hashlib.sha256(places.tobytes()).hexdigest(),
    }
    known = _read(folder, origin)
    if known is None:
        known = {}
        if config.compute.train_workers:
            chosen = _on_ray(choice, places)
        else:
            chosen = _Chooser(choice, train_device(config.compute), data).chosen(places.tolist())
        with StepProgress(folder, config.compute, len(places), "sigma of each sample", "samples") as progress:
            for place, sigma in chosen:
                known[place] = sigma
                progress.update(1)
        content = {"origin": origin, "sigma": {str(place): known[place] for place in sorted(known)}}
        folder.write(_FILE, json.dumps(content).encode())
    found = np.array(sorted(known), np.int64)
    return found, np.array([known[place] for place in found.tolist()], np.float64)


def forget_sigmas(root: Folder) -> None:
    """Remove what was kept: the step is recorded as finished."""
    (root / "training" / "finetune_classifier").remove(_FILE)


def _read(folder: Folder, origin: Mapping[str, Any]) -> dict[int, float] | None:
    try:
        content = json.loads(folder.read(_FILE))
    except FileNotFoundError:
        return None
    if content["origin"] != origin:
        return None
    return {int(place): float(sigma) for place, sigma in content["sigma"].items()}


def _on_ray(choice: _Choice, places: NDArray[np.int64]) -> Iterator[tuple[int, float]]:
    """Ray Data feeds places to as many actors as there are training workers."""
    compute = choice.config.compute
    with train_cluster(compute):
        import ray.data

        quiet_ray_data()
        resources = train_resources(compute)
        workers = min(compute.train_workers, len(places))
        size = max(1, min(256, len(places) // (4 * workers)))
        blocks = min(2000, -(-len(places) // size))
        chosen = ray.data.from_items(
            [{"place": place} for place in places.tolist()], override_num_blocks=blocks
        ).map_batches(
            _Chooser,
            fn_constructor_args=(choice, compute.train_device),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=resources.get("CPU", 0.0),
            num_gpus=resources.get("GPU", 0.0),
        )
        for row in chosen.iter_rows():
            yield int(row["place"]), float(row["sigma"])
