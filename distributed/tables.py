"""Reading shards back as arrays, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.confidence import certified_radius, clopper_pearson_lower
from core.config import Config
from core.errors import DataError
from core.multiscale import level_alphas
from core.records import Stop
from core.report import DualRows, MultiscaleRows, ReportData, StandardRows
from distributed.exchange import imported_rows
from distributed.rows import ERROR
from distributed.shards import ShardStore
from distributed.storage import Folder

__all__ = ["grid", "report_data", "stacked"]


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
    array = stacked(values.to_numpy()) if pa.types.is_list(values.type) else values.to_numpy()
    return np.asarray(array.reshape(-1, width, *array.shape[1:]))


def stacked(lists: NDArray[Any]) -> NDArray[Any]:
    """Lists of one length as rows; zeros for the empty ones of rows with errors."""
    width = max(map(len, lists), default=0)
    return np.stack([values if len(values) else np.zeros(width, np.int64) for values in lists])


def report_data(
    config: Config,
    root: Folder,
    manifest: Mapping[str, Any],
    *,
    sigma_share: float = 0.5,
    notes: tuple[str, ...] = (),
    ending: str = "",
) -> ReportData:
    """The certificates of a run, aligned by example, as the report wants them.

    Args:
        config: the run's configuration (Sigma, alpha, radii).
        root: folder that holds certificates/.
        manifest: to be shown.
        sigma_share: share of alpha that Dual RS spent on the noise level.
        notes: sentences to show below the summary.
        ending: of the stores: `-base` for the certificates of the classifier as it was before fine-tuning.

    Raises:
        DataError: when standard certificates are missing, or methods cover different examples.
    """
    alpha = config.certify.alpha
    full = config.certify.alpha_split == "full"
    stages = (alpha, alpha) if full else (alpha * sigma_share, alpha * (1 - sigma_share))
    table = ShardStore(root, f"certificates/standard{ending}").read()
    _check_terms(table, config, f"certificates/standard{ending}")
    standard = _standard_rows(table, config.sigmas)
    baseline_store = ShardStore(root, "certificates/standard-base")
    baseline: tuple[StandardRows, ...] = ()
    if baseline_store.committed() and not ending:
        rows = baseline_store.read()
        _check_terms(rows, config, baseline_store.name)
        baseline = _standard_rows(rows, config.sigmas)
    dual_store = ShardStore(root, f"certificates/dual{ending}")
    dual = None
    failed = _failed(table)
    if dual_store.committed():
        rows = dual_store.read()
        _check_terms(rows, config, dual_store.name)
        failed |= _failed(rows)
        _check_same_examples(rows, table, config.sigmas, dual_store.name)
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
    multiscale_store = ShardStore(root, "certificates/multiscale")
    multiscale = None
    if multiscale_store.committed():
        rows = multiscale_store.read()
        _check_terms(rows, config, multiscale_store.name)
        failed |= _failed(rows)
        _check_same_examples(rows, table, config.sigmas, multiscale_store.name)
        names = ("correct", "radius", "p_lower", "abstained", "num_draws", "sigma", "sigma_bound", "num_levels")
        multiscale = MultiscaleRows(**{name: _column(rows, name) for name in names})
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
        multiscale=multiscale,
        alpha_levels=level_alphas(alpha, len(config.sigmas), config.certify.level_shares),
        experts=config.has_experts,
        standard_at_dual_alpha=_radii_at(table, config.sigmas, stages[1]),
        alpha=config.certify.alpha,
        alpha_stages=stages,
        num_selection=config.certify.num_selection,
        num_estimation=config.certify.num_estimation,
        manifest=manifest,
        notes=notes,
    )


def _check_terms(rows: pa.Table, config: Config, name: str) -> None:
    """Refuse to state settings that rows were not certified under.

    Raises:
        DataError: names the column, what is there and what the configuration says.
    """
    certify, made = config.certify, rows.filter(pc.not_equal(rows.column("status"), ERROR))
    stated = {"alpha": certify.alpha, "num_selection": certify.num_selection}
    if certify.budget == "fixed":
        stated["num_estimation"] = certify.num_estimation
    if "sigma_e" in made.column_names:
        stated["sigma_e"] = config.estimator_sigma
    for column, value in stated.items():
        found = set(made.column(column).to_pylist())
        if column == "num_estimation" and "sigma_e" in made.column_names:
            found.discard(0)  # the classifier was not run
        if found - {value}:
            raise DataError(
                f"{name}: {column} is {min(found - {value})!r} in rows, the configuration says {value!r}: one of them "
                "was changed (jobs.audit says more); put it back"
            )
    if odd := set(made.column("sigma").to_pylist()) - {None, *config.sigmas}:
        raise DataError(f"{name}: rows at sigma {min(odd):g}, which is none of sigmas = {list(config.sigmas)}")


def _check_same_examples(rows: pa.Table, standard: pa.Table, sigmas: Sequence[float], name: str) -> None:
    ids = rows.column("example_id").to_pylist()
    if ids != grid(standard, "example_id", sigmas)[:, 0].tolist():
        raise DataError(f"certificates/standard and {name} cover different examples")
    pairs = zip(ids, rows.column("image_hash").to_pylist(), grid(standard, "image_hash", sigmas), strict=True)
    for example_id, one, others in pairs:
        if one is not None and {one, *others} - {one, None}:
            raise DataError(
                f"certificates/standard and {name} were computed from different images of {example_id!r}: it has "
                "changed in between; make one of them anew in another --out"
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
