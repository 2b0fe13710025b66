"""What a choice of Sigma needs of a run: votes of the data set and of the test certificates, images as features."""

import numpy as np
from numpy.typing import NDArray

from core.data import Dataset
from core.errors import ConfigError, DataError
from core.evaluation.choice import Sample, expected, pooled
from core.evaluation.metrics import reached
from distributed.methods.rows import ERROR
from distributed.methods.standard import grid
from distributed.store.imported_labels import refuse_imported
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.tables import radii_at

__all__ = ["test_sample", "training_sample"]

_TEST_STORES = ("certificates/standard-base", "certificates/standard")


def training_sample(directory: RunDirectory, radii: NDArray[np.float64]) -> Sample:
    """The training split: what `certify.num_estimation` draws are expected to certify, given the votes of the labels.

    Both phases' votes count, and always those for the label: this is an estimate, not a certificate.

    Raises:
        ConfigError: when the run has no data set.
        DataError: when its rows cannot be read or are not those of the data set.
    """
    config = directory.config
    store = ShardStore(directory.folder, "dataset")
    if "build_dataset" not in directory.manifest["steps"]:
        raise ConfigError(f"{str(store.folder)!r} is not finished: run jobs.build_dataset with a wide Sigma first")
    refuse_imported(directory, "a choice of Sigma")
    table = store.read()
    label = grid(table, "label", config.sigmas)
    votes = grid(table, "counts_selection", config.sigmas) + grid(table, "counts_estimation", config.sigmas)
    right = np.take_along_axis(votes, label[:, :, None], axis=2)[:, :, 0]
    ok = (grid(table, "status", config.sigmas) != ERROR).all(axis=1)
    draws = config.labels.num_selection + config.labels.num_estimation
    certified = [
        expected(
            right[ok, place],
            draws,
            sigma,
            radii,
            num=config.certify.num_estimation,
            alpha=config.stage_alphas[1],
            strict=config.report.strict,
        )
        for place, sigma in enumerate(config.sigmas)
    ]
    ids = grid(table, "example_id", config.sigmas)[ok, 0].tolist()
    return Sample(_features(directory.data("train"), ids), np.stack(certified, axis=1))


def test_sample(directory: RunDirectory, radii: NDArray[np.float64]) -> tuple[str, Sample] | None:
    """The test split as it was certified by standard RS, and in which store; None where it was not.

    The certificates of the classifier as it was before fine-tuning, where both are there: labels are made with it.
    """
    config = directory.config
    name = next((name for name in _TEST_STORES if f"certify-{name[13:]}" in directory.manifest["steps"]), None)
    if name is None:
        return None
    table = ShardStore(directory.folder, name).read()
    if config.certify.budget == "fixed" and config.sampling().plain:  # at the classifier's share of alpha
        radius = radii_at(table, config.sigmas, config.stage_alphas[1], config.law)
    else:
        radius = np.where(grid(table, "correct", config.sigmas), grid(table, "radius", config.sigmas), 0.0)
    ok = (grid(table, "status", config.sigmas) != ERROR).all(axis=1)
    ids = grid(table, "example_id", config.sigmas)[ok, 0].tolist()
    certified = reached(radius[ok], radii, config.report.strict)
    return name, Sample(_features(directory.data("test"), ids), certified)


def _features(data: Dataset, example_ids: list[str]) -> NDArray[np.float64]:
    places = {example_id: place for place, example_id in enumerate(data.example_ids)}
    if unknown := [example_id for example_id in example_ids if example_id not in places]:
        raise DataError(f"{data.name} has no example {unknown[0]!r}, of which the run holds votes: is it another one?")
    return np.stack([pooled(data.image(places[example_id])) for example_id in example_ids])
