"""Labels of the authors' own format in place of the dataset's rows: radii alone, without the votes behind them."""

import io
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.data import Dataset
from core.errors import ConfigError, DataError
from core.law import GAUSSIAN, Law
from core.procedures.confidence import largest_radius
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["import_labels", "imported_radii", "parse_labels", "refuse_imported"]

_STEP: Final = "build_dataset"
_FILE: Final = "labels.npy"
_DRAWS: Final = 1_000_000
"""More than anybody draws for labels."""

Floats = NDArray[np.float64]


def parse_labels(content: bytes, sigmas: Sequence[float], source: str, law: Law = GAUSSIAN) -> Floats:
    """The radii ``(N, K)`` of a file with K + 2 columns: radii in Sigma's order, the largest, the index of the best.

    Args:
        content: of the .npy file. Nothing in it is run.
        sigmas: Sigma of the run.
        source: named in messages.
        law: of the run's noise.

    Raises:
        DataError: for another shape or type, values that no radius has, columns that contradict each other, or radii
            beyond what their sigma can certify (columns in another order).
    """
    try:
        rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{source} is no .npy file of numbers ({error}); give the authors' label file") from error
    width = len(sigmas) + 2
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype.kind not in "fiu":
        raise DataError(
            f"{source} holds {rows.dtype} of shape {rows.shape}, expected numbers of shape (N, {width}): a radius for "
            f"each of sigmas = {list(sigmas)}, the largest, the index of the best; set sigmas to those of the file"
        )
    rows = rows.astype(np.float64)
    radii, largest, best = rows[:, :-2], rows[:, -2], rows[:, -1]

    def refuse(wrong: Any, what: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{source}: row {row} is {rows[row].tolist()}: {what}")

    refuse(~np.isfinite(rows).all(axis=1), "not all of it is finite")
    refuse((radii < 0).any(axis=1), "radii are at least 0")
    there = radii.max(axis=1, initial=0.0)
    refuse(~np.isclose(there, largest, rtol=1e-6, atol=0), f"column {width - 2} is not the largest of its radii")
    index = best.clip(0, len(sigmas) - 1).astype(np.int64)
    chosen = np.take_along_axis(radii, index[:, None], axis=1)[:, 0]
    wrong = (index != best) | ~np.isclose(chosen, there, rtol=1e-6, atol=0)
    refuse(wrong & (there > 0), f"column {width - 1} is not the index of its largest radius")
    for column, sigma in enumerate(sigmas):
        most = largest_radius(sigma, _DRAWS, 1e-6, law)
        refuse(
            radii[:, column] > most,
            f"column {column} is above {most:.3g}, which no number of draws that anybody takes certifies at sigma = "
            f"{sigma:g}: its columns have another order than sigmas = {list(sigmas)}, or they are other ones",
        )
    return radii


def import_labels(directory: RunDirectory, file: Path) -> Floats:
    """Check a label file and make it the labels of a run, whose base models are there; returns its radii.

    Row i of the file is the example i of the training split.

    Raises:
        ConfigError: for a run that has rows of its own, or whose estimator asks for votes.
        DataError: as `parse_labels`, for another number of rows, or an order that is not the file's.
    """
    config, data = directory.config, directory.data("train")
    if config.estimator.label_radius != "at_n":
        raise ConfigError(
            f"estimator.label_radius: {config.estimator.label_radius} is computed from votes, and imported labels have "
            "none; set it to at_n, which takes their radii as they are"
        )
    store = ShardStore(directory.folder, "dataset")
    if store.read_plan() is not None:
        raise ConfigError(f"{str(store.folder)!r} holds labels of the run's own; import into another --out")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from error
    radii = parse_labels(content, config.sigmas, repr(str(file)), config.law)
    _check_rows(radii, data, str(file), config.dataset.name == "cifar10" and config.dataset.layout == "parquet")
    (directory.folder / "imported").write(_FILE, content)
    facts = {"imported": str(file), "rows": radii.size, "shards": 0, "sha256": {_FILE: sha256(content).hexdigest()}}
    directory.finish(_STEP, read=directory.model_hashes(config.base_models), wrote={}, facts=facts)
    return radii


def _check_rows(radii: Floats, data: Dataset, file: str, reordered: bool) -> None:
    if len(radii) != len(data):
        raise DataError(
            f"{file!r} has {len(radii):,} rows, the training split {len(data):,} examples: rows have no id, so both "
            "are to be the whole split; look at dataset.train"
        )
    if reordered:
        raise DataError(
            f"{file!r} is in the order of CIFAR-10's pickles, which the Parquet files of the hub need not have; take "
            "dataset.layout=original"
        )


def imported_radii(directory: RunDirectory) -> Floats | None:
    """The radii ``(N, K)`` that were imported in place of the dataset, in its order; None for a run with its own rows.

    Raises:
        DataError: when the file is not the one that was imported.
    """
    record = directory.manifest["steps"].get(_STEP, {})
    if "imported" not in record:
        return None
    folder = directory.folder / "imported"
    content = folder.read(_FILE) if folder.exists(_FILE) else b""
    if sha256(content).hexdigest() != record["sha256"][_FILE]:
        raise DataError(
            f"{folder.where(_FILE)!r} is not the file that was imported ({record['imported']!r}): put it back, or run "
            "jobs.import_labels again"
        )
    return parse_labels(content, directory.config.sigmas, folder.where(_FILE), directory.config.law)


def refuse_imported(directory: RunDirectory, what: str) -> None:
    """Refuse what needs votes where the labels are imported ones.

    Raises:
        ConfigError: says so.
    """
    if "imported" in directory.manifest["steps"].get(_STEP, {}):
        raise ConfigError(
            f"{what} needs votes, and the labels of {str(directory.folder)!r} were imported (jobs.import_labels): they "
            "are radii alone; run jobs.build_dataset in another --out"
        )
