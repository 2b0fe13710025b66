"""Reading shards back as arrays, for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.config import Config
from core.errors import DataError
from core.law import Law
from core.procedures.confidence import certified_radius, lower_bound
from core.procedures.smoothing import furthest
from core.report import ReportData, RoutedRows, StandardRows
from core.report.agreement import CONSTANT, AgreementRows
from distributed.files.storage import Folder
from distributed.methods import METHODS, method_named
from distributed.methods.method import Terms, common_columns, keyed
from distributed.methods.rows import ERROR
from distributed.methods.standard import grid
from distributed.store.shards import ShardStore
from distributed.views.exchange import imported_logs

__all__ = ["failed_examples", "radii_at", "report_data", "run_tables"]


def report_data(
    config: Config,
    root: Folder,
    manifest: Mapping[str, Any],
    *,
    sigma_share: float = 0.5,
    notes: tuple[str, ...] = (),
    ending: str = "",
    tables: Mapping[str, pa.Table] | None = None,
) -> ReportData:
    """The certificates of a run, aligned by example, as the report wants them.

    Args:
        config: the run's configuration (Sigma, alpha, radii).
        root: folder that holds certificates/.
        manifest: to be shown.
        sigma_share: share of alpha that Dual RS spent on the noise level.
        notes: sentences to show below the summary.
        ending: of the stores: `-base` for the certificates of the classifier as it was before fine-tuning.
        tables: what `run_tables` gives, where it is at hand.

    Raises:
        DataError: as `run_tables`.
    """
    certify = config.certify
    alpha, full = config.alpha, certify.alpha_split == "full"
    stages = (alpha, alpha) if full else (alpha * sigma_share, alpha * (1 - sigma_share))
    sampling, terms = config.sampling(), _terms(config)
    tables = run_tables(config, root, ending) if tables is None else tables
    table = tables["standard"]
    standard = _standard_rows(table, config.sigmas)
    baseline_store = ShardStore(root, "certificates/standard-base")
    baseline: tuple[StandardRows, ...] = ()
    if baseline_store.committed() and not ending:
        baseline = _standard_rows(_read(baseline_store, config), config.sigmas)
    failed = set[str]().union(*map(failed_examples, tables.values()))
    if "agreement" in tables and not ShardStore(root, f"certificates/agreement{ending}").committed():
        notes += ("The agreement claim was not certified by itself: it follows from the votes of the other rows.",)
    shown = {name: method_named(name).shown(rows, terms) for name, rows in tables.items() if name != "standard"}
    dual = shown.pop(certify.routed, None)
    assert dual is None or isinstance(dual, RoutedRows)
    if isinstance(dual, AgreementRows):
        dual = replace(dual, name="Dual RS")
        shown["dual"] = replace(shown.get("dual", dual.constant_level()), name=CONSTANT)
    notes += _bound_notes(config)
    if failed:
        notes += (f"{len(failed)} examples could not be run and count as not certified, first {min(failed)!r}.",)
    return ReportData(
        title=f"Certified accuracy on {config.dataset.name}",
        labels=config.dataset.name,
        radii=np.asarray(config.report.radii),
        strict=config.report.strict,
        law=config.law,
        standard=standard,
        baseline=baseline,
        imported=imported_logs(root),
        dual=dual,
        others=tuple(shown.values()),
        experts=config.has_experts,
        standard_at_dual_alpha=radii_at(table, config.sigmas, stages[1], config.law) if sampling.plain else None,
        reach=furthest(max(config.sigmas), sampling),
        alpha=config.alpha,
        alpha_stages=stages,
        num_selection=config.certify.num_selection,
        num_estimation=config.certify.num_estimation,
        manifest=manifest,
        notes=notes,
    )


def _bound_notes(config: Config) -> tuple[str, ...]:
    """Whose certificates these are, and by which bound, where it is not what everybody expects."""
    certify, notes = config.certify, []
    if (reference := certify.reference) is not None:
        notes.append(
            f"Certificates hold for {config.holds_for}, not for the {config.compute.precision} network that votes: it "
            f"saw {reference.num_draws:,} of the {certify.num_estimation:,} draws of each stage, and radii are less "
            f"what the two may disagree by (at {reference.alpha_share:g} of alpha)."
        )
    if certify.bound == "randomized":
        notes.append("Bounds are randomised Clopper-Pearson bounds, with the random number that each row's key gives.")
    return tuple(notes)


def run_tables(config: Config, root: Folder, ending: str = "") -> dict[str, pa.Table]:
    """The rows of each method, ordered by example; those of the agreement claim also where they follow from others.

    Raises:
        DataError: when standard certificates are missing, methods cover different examples, or rows were certified
            under other settings than the configuration's.
    """
    standard = _read(ShardStore(root, f"certificates/standard{ending}"), config)
    tables = {"standard": standard}
    for name in METHODS:
        store = ShardStore(root, f"certificates/{name}{ending}")
        if name != "standard" and store.committed():
            tables[name] = _read(store, config)
            _check_same_examples(tables[name], standard, config.sigmas, store.name)
        elif name == "agreement" and "dual" in tables and config.certify.budget == "fixed" and config.sampling().plain:
            tables[name] = _agreement(tables["dual"], standard, _terms(config))
    return tables


def _terms(config: Config) -> Terms:
    return Terms.of(config, config.sampling(), config.certify.budget)


def _read(store: ShardStore, config: Config) -> pa.Table:
    """The rows of a store.

    Raises:
        DataError: for rows that were not certified under the settings of the configuration, which a report states.
    """
    rows, name = store.read(), store.name
    certify, made = config.certify, rows.filter(pc.not_equal(rows.column("status"), ERROR))
    stated: dict[str, Any] = {"alpha": config.alpha, "num_selection": certify.num_selection}
    if certify.budget == "fixed" and not config.law.exhaustive:
        stated["num_estimation"] = certify.num_estimation
    if "sigma_e" in made.column_names:
        stated["sigma_e"] = config.estimator_sigma
    if "router" in made.column_names:
        stated["router"] = certify.router
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
    return rows


def _agreement(dual: pa.Table, standard: pa.Table, terms: Terms) -> pa.Table:
    """The agreement claim from the votes of Dual RS and of standard RS, a thousand examples at a time."""
    method, width, parts, step = method_named("agreement"), len(terms.sigmas), [], 1000
    for start in range(0, len(dual), step):
        run = {
            "dual": keyed(dual.slice(start, step).to_pylist(), per_level=False),
            "standard": keyed(standard.slice(start * width, step * width).to_pylist(), per_level=True),
        }
        parts.append(pa.Table.from_pylist(list(method.rederived([], run, terms.sigmas, terms)), schema=method.schema))
    return pa.concat_tables(parts)


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


def failed_examples(table: pa.Table) -> set[str]:
    """Ids of the examples that could not be run."""
    return set(table.filter(pc.equal(table.column("status"), ERROR)).column("example_id").to_pylist())


def _standard_rows(table: pa.Table, sigmas: Sequence[float]) -> tuple[StandardRows, ...]:
    return tuple(
        StandardRows(sigma=sigma, **common_columns(table.filter(pc.equal(table.column("sigma"), sigma))))
        for sigma in sigmas
    )


def radii_at(table: pa.Table, sigmas: Sequence[float], alpha: float, law: Law) -> NDArray[np.float64]:
    """R_c(x, sigma_i) at another alpha, from the stored counts: ``(N, K)``, 0 for a wrong class."""
    top = grid(table, "counts_selection", sigmas).argmax(axis=2)
    votes = np.take_along_axis(grid(table, "counts_estimation", sigmas), top[:, :, None], axis=2)[:, :, 0]
    draws = np.maximum(grid(table, "num_estimation", sigmas), 1)  # 0 where an example could not be run
    radius = certified_radius(lower_bound(votes, draws, alpha, law), np.asarray(sigmas)[None, :], law)
    return np.where(top == grid(table, "label", sigmas), radius, 0.0)
