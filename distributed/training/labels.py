"""What the estimator learns from: the radii of the dataset's shards, by Ray Data where training is on Ray."""

from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.config import Config
from core.data import Dataset
from core.errors import DataError
from core.training.estimator import label_radii, shrunk_radii
from distributed.cluster.cluster import quiet_ray_data, train_cluster
from distributed.files.storage import file_system
from distributed.methods.rows import ERROR
from distributed.methods.standard import grid, stacked
from distributed.store.imported_labels import imported_radii
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["training_radii"]

_COLUMNS = (
    "example_id", "label", "sigma", "radius", "correct", "counts_selection", "counts_estimation", "num_selection",
    "num_estimation", "status",
)  # fmt: skip


def training_radii(directory: RunDirectory, train: Dataset) -> NDArray[np.float64]:
    """The radii R_c(x, sigma_i) of the dataset as the estimator's training wants them, ``(N, K)`` in `train`'s order.

    An example with an error at any sigma has radius 0 at all of them: training drops it, its best sigma is unknown.
    Votes, by far the most of a file, do not leave the worker (or the file's turn) that reads it.

    Radii that were imported (`jobs.import_labels`) are taken as they are.

    Raises:
        DataError: when the dataset does not hold exactly the training split, or a file is not of this run.
    """
    if (imported := imported_radii(directory)) is not None:
        return imported
    config, store = directory.config, ShardStore(directory.folder, "dataset")
    files = store.files()
    if not files:
        raise DataError(f"no shards in {str(store.folder)!r}: the job that writes them has not run")
    if config.compute.train_workers:
        store.check_files()  # Ray Data reads past the store
        parts = _by_ray_data(config, store, files)
    else:
        parts = [_radii(config, store.read_file(name)) for name in files]
    table = pa.concat_tables(parts).sort_by([("example_id", "ascending"), ("sigma", "ascending")])
    ids = grid(table, "example_id", config.sigmas)[:, 0].tolist()
    if ids != sorted(train.example_ids):
        raise DataError(f"the dataset holds {len(ids)} examples, not the {len(train)} of the training split")
    failed = grid(table, "failed", config.sigmas).any(axis=1, keepdims=True)
    if config.estimator.label_radius == "shrunk":
        votes, num = (grid(table, name, config.sigmas) for name in ("votes", "num_draws"))
        radii = shrunk_radii(
            votes,
            np.where(failed, 0, num),
            np.array(config.sigmas),
            config.certify.num_estimation,
            config.stage_alphas[1],
            config.law,
        )
    else:
        radii = np.where(failed, 0.0, grid(table, "radius", config.sigmas))
    order = {example_id: row for row, example_id in enumerate(ids)}
    return radii[[order[example_id] for example_id in train.example_ids]]


def _by_ray_data(config: Config, store: ShardStore, files: list[str]) -> list[pa.Table]:
    with train_cluster(config.compute):
        import ray.data

        quiet_ray_data()
        system, path = file_system(store.folder.uri)
        shards = ray.data.read_parquet([f"{path}/{name}" for name in files], filesystem=system)
        rows = shards.select_columns(list(_COLUMNS)).map_batches(
            partial(_radii, config), batch_format="pyarrow", batch_size=10_000
        )
        return [_plain(block) for block in ray.get(rows.to_arrow_refs())]


def _plain(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata()


def _radii(config: Config, table: pa.Table) -> pa.Table:
    """Of some rows: example_id, sigma, radius (0 where the class is wrong), failed; votes of the true class in all
    draws, and their number.
    """
    column = {name: table.column(name) for name in _COLUMNS}
    selection, votes = (stacked(column[f"counts_{phase}"].to_numpy()) for phase in ("selection", "estimation"))
    top, label = selection.argmax(axis=1), column["label"].to_numpy()[:, None]
    sigma = column["sigma"].to_numpy()
    radii = label_radii(
        radius=column["radius"].to_numpy()[None],
        correct=column["correct"].to_numpy()[None],
        votes=np.take_along_axis(votes, top[:, None], axis=1).T,
        num_estimation=np.maximum(column["num_estimation"].to_numpy(), 1)[None],
        sigmas=sigma,
        alpha=config.labels.alpha,
        mode=config.estimator.label_radius,
        law=config.law,
    )[0]
    failed = np.array([status == ERROR for status in column["status"].to_pylist()], np.bool_)
    return pa.table(
        {
            "example_id": column["example_id"],
            "sigma": sigma,
            "radius": radii,
            "failed": failed,
            "votes": np.take_along_axis(selection + votes, label, axis=1)[:, 0],
            "num_draws": column["num_selection"].to_numpy() + column["num_estimation"].to_numpy(),
        }
    )
