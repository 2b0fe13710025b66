"""Reading shards back as arrays for training and for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.confidence import certified_radius, clopper_pearson_lower
from core.config import Config
from core.data import Dataset
from core.errors import DataError
from core.records import Stop
from core.report import DualRows, ReportData, StandardRows
from core.training.estimator import label_radii
from distributed.exchange import imported_rows
from distributed.run_directory import RunDirectory
from distributed.shards import ERROR, ShardStore
from distributed.storage import Folder

__all__ = ["grid", "report_data", "training_radii"]


def grid(table: pa.Table, column: str, sigmas: Sequence[float]) -> NDArray[Any]:
    """A column of (example, sigma) rows, in the order of `ShardStore.read`, as ``(N, K)``.

    Raises:
        DataError: when the rows are not one per example and sigma.
    """
    levels = table.column("sigma").to_numpy()
    width = len(sigmas)
    if len(levels) % width or not np.array_equal(levels.reshape(-1, width), np.tile(sigmas, (len(levels) // width, 1))):
        raise DataError(f"expected one row per example for each sigma of {list(sigmas)}")
    values = table.column(column)
    array = _stacked(values.to_numpy()) if pa.types.is_list(values.type) else values.to_numpy()
    return np.asarray(array.reshape(-1, width, *array.shape[1:]))


def _stacked(lists: NDArray[Any]) -> NDArray[Any]:
    """Lists of one length as rows; zeros for the empty ones of rows with errors."""
    width = max(map(len, lists), default=0)
    return np.stack([values if len(values) else np.zeros(width, np.int64) for values in lists])


def training_radii(directory: RunDirectory, train: Dataset) -> NDArray[np.float64]:
    """The radii R_c(x, sigma_i) of the dataset as the estimator's training wants them, ``(N, K)`` in `train`'s order.

    An example with an error at any sigma has radius 0 at all of them: training drops it, its best sigma is unknown.

    Raises:
        DataError: when the dataset does not hold exactly the training split.
    """
    config = directory.config
    table = ShardStore(directory.folder, "dataset").read()
    ids = grid(table, "example_id", config.sigmas)[:, 0].tolist()
    if ids != sorted(train.example_ids):
        raise DataError(f"the dataset holds {len(ids)} examples, not the {len(train)} of the training split")
    order = {example_id: row for row, example_id in enumerate(ids)}
    votes = grid(table, "counts_estimation", config.sigmas)
    top = grid(table, "counts_selection", config.sigmas).argmax(axis=2)
    radii = label_radii(
        radius=grid(table, "radius", config.sigmas),
        correct=grid(table, "correct", config.sigmas),
        votes=np.take_along_axis(votes, top[:, :, None], axis=2)[:, :, 0],
        num_estimation=np.maximum(grid(table, "num_estimation", config.sigmas), 1),
        sigmas=np.asarray(config.sigmas),
        alpha=config.labels.alpha,
        mode=config.estimator.label_radius,
    )
    radii[(grid(table, "status", config.sigmas) == ERROR).any(axis=1)] = 0.0
    return radii[[order[example_id] for example_id in train.example_ids]]


def report_data(
    config: Config, root: Folder, manifest: Mapping[str, Any], *, sigma_share: float = 0.5, notes: tuple[str, ...] = ()
) -> ReportData:
    """The certificates of a run, aligned by example, as the report wants them.

    Args:
        config: the run's configuration (Sigma, alpha, radii).
        root: folder that holds certificates/.
        manifest: to be shown.
        sigma_share: share of alpha that Dual RS spent on the noise level.
        notes: sentences to show below the summary.

    Raises:
        DataError: when standard certificates are missing, or methods cover different examples.
    """
    alpha = config.certify.alpha
    full = config.certify.alpha_split == "full"
    stages = (alpha, alpha) if full else (alpha * sigma_share, alpha * (1 - sigma_share))
    table = ShardStore(root, "certificates/standard").read()
    standard = _standard_rows(table, config.sigmas)
    baseline_store = ShardStore(root, "certificates/standard-base")
    baseline = _standard_rows(baseline_store.read(), config.sigmas) if baseline_store.committed() else ()
    dual_store = ShardStore(root, "certificates/dual")
    dual = None
    failed = _failed(table)
    if dual_store.committed():
        rows = dual_store.read()
        failed |= _failed(rows)
        if rows.column("example_id").to_pylist() != grid(table, "example_id", config.sigmas)[:, 0].tolist():
            raise DataError("certificates/standard and certificates/dual cover different examples")
        dual = DualRows(
            correct=_column(rows, "correct"),
            radius=_column(rows, "radius"),
            radius_sigma=_column(rows, "radius_sigma"),
            radius_class=_column(rows, "radius_class"),
            sigma=_certified_sigma(rows, config.sigmas),
            bounded_by=np.array(rows.column("bounded_by").to_pylist(), dtype=np.str_),
            abstained=_column(rows, "abstained"),
            num_draws=_column(rows, "num_draws"),
            p_lower=_column(rows, "p_lower"),
            sigma_choice=_column(rows, "sigma_index"),
        )
    if failed:
        notes += (f"{len(failed)} examples could not be run and count as not certified, first {min(failed)!r}.",)
    return ReportData(
        title=f"Certified accuracy on {config.dataset.name}",
        labels=config.dataset.name,
        radii=np.asarray(config.report.radii),
        strict=config.report.strict,
        standard=standard,
        baseline=baseline,
        imported=imported_rows(root),
        dual=dual,
        standard_at_dual_alpha=_radii_at(table, config.sigmas, stages[1]),
        alpha=config.certify.alpha,
        alpha_stages=stages,
        num_selection=config.certify.num_selection,
        num_estimation=config.certify.num_estimation,
        manifest=manifest,
        notes=notes,
    )


def _failed(table: pa.Table) -> set[str]:
    """Examples with an error."""
    return set(table.filter(pc.equal(table.column("status"), ERROR)).column("example_id").to_pylist())


def _certified_sigma(rows: pa.Table, sigmas: Sequence[float]) -> NDArray[np.float64]:
    """The noise level, nan where the estimator abstained; its choice where it was not asked any further."""
    skipped = np.array(rows.column("stop_reason_sigma").to_pylist()) == Stop.SKIPPED.value
    return np.where(skipped, np.asarray(sigmas)[_column(rows, "sigma_index")], _column(rows, "sigma"))


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array(table.column(name).to_numpy())


def _standard_rows(table: pa.Table, sigmas: Sequence[float]) -> tuple[StandardRows, ...]:
    names = ("correct", "radius", "p_lower", "abstained", "num_draws")
    columns = {name: grid(table, name, sigmas) for name in names}
    return tuple(
        StandardRows(sigma=sigma, **{name: values[:, index] for name, values in columns.items()})
        for index, sigma in enumerate(sigmas)
    )


def _radii_at(table: pa.Table, sigmas: Sequence[float], alpha: float) -> NDArray[np.float64]:
    """R_c(x, sigma_i) at another alpha, from the stored counts: ``(N, K)``, 0 for a wrong class."""
    top = grid(table, "counts_selection", sigmas).argmax(axis=2)
    votes = np.take_along_axis(grid(table, "counts_estimation", sigmas), top[:, :, None], axis=2)[:, :, 0]
    draws = np.maximum(grid(table, "num_estimation", sigmas), 1)  # 0 where an example could not be run
    p_lower = clopper_pearson_lower(votes, draws, alpha)
    radius = certified_radius(p_lower, np.asarray(sigmas)[None, :])
    return np.where(top == grid(table, "label", sigmas), radius, 0.0)
