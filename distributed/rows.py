"""Rows of certificates: their columns, made from what the procedures return."""

from typing import Any, Final

import pyarrow as pa

from core.records import Bound, Certificate, DualCertificate, MultiscaleCertificate, Stop

__all__ = [
    "CERTIFICATE_SCHEMA",
    "DUAL_SCHEMA",
    "ERROR",
    "ERROR_SCHEMA",
    "MULTISCALE_SCHEMA",
    "OK",
    "certificate_row",
    "dual_row",
    "error_row",
    "multiscale_row",
]

OK: Final = "ok"
ERROR: Final = "error"
"""Status of a row: certified (or abstained), or not certified because the example could not be run."""

_COUNTS = pa.list_(pa.int64())

CERTIFICATE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("label", pa.int64()),
        ("sigma", pa.float64()),
        ("prediction", pa.int64()),
        ("correct", pa.bool_()),
        ("radius", pa.float64()),
        ("p_lower", pa.float64()),
        ("num_selection", pa.int64()),
        ("num_estimation", pa.int64()),
        ("counts_selection", _COUNTS),
        ("counts_estimation", _COUNTS),
        ("alpha", pa.float64()),
        ("abstained", pa.bool_()),
        ("num_draws", pa.int64()),
        ("stop_reason", pa.string()),
        ("alpha_early", pa.float64()),
        ("target", pa.float64()),
        ("status", pa.string()),
        ("image_hash", pa.string()),
    ]
)
"""A row per (example, sigma). `prediction` is -1 and `radius` 0 where it abstained; radii in the pixel scale [0, 1].
`stop_reason`, `alpha_early`, `target`: see `core.records.Certificate`. `num_estimation` is what was drawn. A row whose
`status` is `error` abstains without a draw, see `ERROR_SCHEMA`. `image_hash`: of the pixels that the row was computed
from, see `core.data.image_hash`; null where `status` is `error`, and in files from before rows had it."""

DUAL_SCHEMA = pa.schema(
    [
        *CERTIFICATE_SCHEMA,
        ("sigma_e", pa.float64()),
        ("sigma_index", pa.int64()),
        ("radius_sigma", pa.float64()),
        ("radius_class", pa.float64()),
        ("bounded_by", pa.string()),
        ("alpha_sigma", pa.float64()),
        ("alpha_class", pa.float64()),
        ("p_lower_sigma", pa.float64()),
        ("num_estimation_sigma", pa.int64()),
        ("stop_reason_sigma", pa.string()),
        ("alpha_early_sigma", pa.float64()),
        ("target_sigma", pa.float64()),
        ("num_shared", pa.int64()),
        ("counts_selection_sigma", _COUNTS),
        ("counts_estimation_sigma", _COUNTS),
    ]
)
"""A row per example. Unmarked counts are the classifier's (empty when it was not run), `_sigma` the estimator's.
`sigma` is null when the estimator abstained; `sigma_index` is its selection draws' choice all the same."""

_COUNTS_BY_LEVEL = pa.list_(_COUNTS)

MULTISCALE_SCHEMA = pa.schema(
    [
        *CERTIFICATE_SCHEMA,
        ("num_levels", pa.int64()),
        ("radius_level", pa.float64()),
        ("radius_above", pa.float64()),
        ("sigma_bound", pa.float64()),
        ("alpha_level", pa.float64()),
        ("counts_selection_above", _COUNTS_BY_LEVEL),
        ("counts_estimation_above", _COUNTS_BY_LEVEL),
    ]
)
"""A row per example; `sigma`, the level that decided, is null where it abstained. Unmarked counts and `p_lower` are of
the last of `num_levels` levels that were asked, the largest sigma first; `_above` holds those before it, in that order.
`alpha_level` is what each of its bounds spends. See `core.records.MultiscaleCertificate`."""

ERROR_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("sigma", pa.float64()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
        ("node", pa.string()),
        ("time", pa.timestamp("ms", tz="UTC")),
    ]
)
"""Why a row has status `error`; `sigma` is null for a row of Dual RS."""


def certificate_row(
    example_id: str, label: int, certificate: Certificate, image_hash: str | None = None
) -> dict[str, Any]:
    """One row of `CERTIFICATE_SCHEMA`."""
    c = certificate
    return {
        "example_id": example_id,
        "label": label,
        "sigma": c.sigma,
        "prediction": c.prediction,
        "correct": c.prediction == label,
        "radius": c.radius,
        "p_lower": c.p_lower,
        "num_selection": c.num_selection,
        "num_estimation": c.num_estimation,
        "counts_selection": c.counts_selection,
        "counts_estimation": c.counts_estimation,
        "alpha": c.alpha,
        "abstained": c.abstained,
        "num_draws": c.num_draws,
        "stop_reason": c.stop.value,
        "alpha_early": c.alpha_early,
        "target": c.target,
        "status": OK,
        "image_hash": image_hash,
    }


def dual_row(
    example_id: str, label: int, certificate: DualCertificate, image_hash: str | None = None
) -> dict[str, Any]:
    """One row of `DUAL_SCHEMA`."""
    c, level, label_stage = certificate, certificate.sigma_stage, certificate.class_stage
    return {
        "example_id": example_id,
        "label": label,
        "sigma": c.sigma,
        "prediction": c.prediction,
        "correct": c.prediction == label,
        "radius": c.radius,
        "p_lower": c.p_lower,
        "num_selection": level.num_selection,
        "num_estimation": label_stage.num_estimation if label_stage else 0,
        "counts_selection": c.counts_selection,
        "counts_estimation": c.counts_estimation,
        "alpha": c.alpha,
        "abstained": c.abstained,
        "num_draws": c.num_draws,
        "stop_reason": label_stage.stop.value if label_stage else Stop.SKIPPED.value,
        "alpha_early": label_stage.alpha_early if label_stage else 0.0,
        "target": label_stage.target if label_stage else None,
        "status": OK,
        "image_hash": image_hash,
        "sigma_e": level.sigma,
        "sigma_index": level.top_class,
        "radius_sigma": c.radius_sigma,
        "radius_class": c.radius_class,
        "bounded_by": c.bounded_by.value,
        "alpha_sigma": c.alpha_sigma,
        "alpha_class": c.alpha_class,
        "p_lower_sigma": level.p_lower,
        "num_estimation_sigma": level.num_estimation,
        "stop_reason_sigma": level.stop.value,
        "alpha_early_sigma": level.alpha_early,
        "target_sigma": level.target,
        "num_shared": c.num_shared,
        "counts_selection_sigma": level.counts_selection,
        "counts_estimation_sigma": level.counts_estimation,
    }


def multiscale_row(
    example_id: str, label: int, certificate: MultiscaleCertificate, image_hash: str | None = None
) -> dict[str, Any]:
    """One row of `MULTISCALE_SCHEMA`."""
    c, last, above = certificate, certificate.levels[-1], certificate.levels[:-1]
    return {
        **certificate_row(example_id, label, last, image_hash),
        "sigma": c.sigma,
        "prediction": c.prediction,
        "correct": c.prediction == label,
        "radius": c.radius,
        "alpha": c.alpha,
        "abstained": c.abstained,
        "num_draws": c.num_draws,
        "num_levels": len(c.levels),
        "radius_level": c.radius_level,
        "radius_above": c.radius_above,
        "sigma_bound": c.sigma_bound,
        "alpha_level": last.alpha,
        "counts_selection_above": [level.counts_selection for level in above],
        "counts_estimation_above": [level.counts_estimation for level in above],
    }


def error_row(schema: pa.Schema, example_id: str, label: int, sigma: float | None, alpha: float) -> dict[str, Any]:
    """The row of an example that could not be run: nothing was drawn, so nothing is claimed.

    Args:
        schema: CERTIFICATE_SCHEMA, DUAL_SCHEMA or MULTISCALE_SCHEMA.
        example_id: of the example.
        label: of the example.
        sigma: of the row; None for Dual RS and Multiscale.
        alpha: that a certificate would have spent.
    """
    empty = {pa.string(): "", pa.int64(): 0, pa.float64(): 0.0, pa.bool_(): False}
    row: dict[str, Any] = {f.name: [] if pa.types.is_list(f.type) else empty[f.type] for f in schema}
    row |= {"example_id": example_id, "label": label, "sigma": sigma, "prediction": -1, "abstained": True}
    row |= {"alpha": alpha, "stop_reason": Stop.SKIPPED.value, "target": None, "status": ERROR}
    row["image_hash"] = None
    if schema.equals(DUAL_SCHEMA):
        row |= {"stop_reason_sigma": Stop.SKIPPED.value, "target_sigma": None, "bounded_by": Bound.NONE.value}
    if schema.equals(MULTISCALE_SCHEMA):
        row["sigma_bound"] = None
    return row
