"""Rows of certificates: the columns that all methods share, and those of an example that could not be run."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from core.records import ABSTAIN, Certificate, Sampling, Stop

__all__ = [
    "CERTIFICATE_SCHEMA",
    "COUNTS",
    "ERROR",
    "ERROR_SCHEMA",
    "OK",
    "certificate_row",
    "error_row",
    "optional_columns",
    "result_row",
    "stage_columns",
]

OK: Final = "ok"
ERROR: Final = "error"
"""Status of a row: certified (or abstained), or not certified because the example could not be run."""

COUNTS = pa.list_(pa.int64())
"""Votes per class."""

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
        ("counts_selection", COUNTS),
        ("counts_estimation", COUNTS),
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


def optional_columns(sampling: Sampling, endings: Sequence[str]) -> pa.Schema:
    """Columns that rows have besides, where they are certificates for the reference or their bound is randomised.

    For each stage, of the estimation draws that the reference saw too: how many; by class, those that voted for it
    while the reference did not; and the upper bound of the probability of that for the top class. `uniform`: of the
    randomised bound. See `core.records.Certificate`.
    """
    fields: list[tuple[str, pa.DataType]] = []
    for ending in endings if sampling.num_reference else ():
        fields += [(f"num_reference{ending}", pa.int64()), (f"counts_missed{ending}", COUNTS)]
        fields += [(f"disagreement_upper{ending}", pa.float64())]
    if sampling.bound == "randomized":
        fields += [(f"uniform{ending}", pa.float64()) for ending in endings]
    return pa.schema(fields)


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


_OF_ALL: Final = ("sigma", "prediction", "radius", "alpha", "abstained", "num_draws")
_NOT_RUN: Final[Mapping[str, Any]] = {
    "p_lower": 0.0,
    "num_estimation": 0,
    "counts_selection": [],
    "counts_estimation": [],
    "stop_reason": Stop.SKIPPED.value,
    "alpha_early": 0.0,
    "target": None,
    "num_reference": 0,
    "counts_missed": [],
    "disagreement_upper": 0.0,
    "uniform": None,
}
"""The columns of a stage that was not run."""


def result_row(example_id: str, label: int, result: Any, **columns: Any) -> dict[str, Any]:
    """A row: what every method's result says, and `columns`."""
    said = {name: getattr(result, name) for name in _OF_ALL}
    shared = {"example_id": example_id, "label": label, "correct": result.prediction == label, "status": OK}
    return shared | said | columns


def stage_columns(certificate: Certificate, ending: str = "", *, ran: bool = True) -> dict[str, Any]:
    """The columns of a stage; those of one that did not run, where `certificate` is another one's."""
    c = certificate
    values = {
        "p_lower": c.p_lower,
        "num_estimation": c.num_estimation,
        "counts_selection": c.counts_selection,
        "counts_estimation": c.counts_estimation,
        "stop_reason": c.stop.value,
        "alpha_early": c.alpha_early,
        "target": c.target,
    }
    if c.counts_missed is not None:
        values |= {
            "num_reference": c.num_reference,
            "counts_missed": c.counts_missed,
            "disagreement_upper": c.disagreement_upper,
        }
    if c.uniform is not None:
        values["uniform"] = c.uniform
    return {name + ending: value if ran else _NOT_RUN[name] for name, value in values.items()}


def certificate_row(example_id: str, label: int, certificate: Certificate) -> dict[str, Any]:
    """One row of `CERTIFICATE_SCHEMA`."""
    stage = stage_columns(certificate)
    return result_row(example_id, label, certificate, num_selection=certificate.num_selection, **stage)


def error_row(
    schema: pa.Schema, empty: Mapping[str, Any], example_id: str, label: int, sigma: float | None, alpha: float
) -> dict[str, Any]:
    """The row of an example that could not be run: nothing was drawn, so nothing is claimed.

    `empty`: columns that are neither 0 nor empty there; `sigma`: None where the draws pick it; `alpha`: that a
    certificate would have spent.
    """
    plain = {pa.string(): "", pa.int64(): 0, pa.float64(): 0.0, pa.bool_(): False}
    row: dict[str, Any] = {f.name: [] if pa.types.is_list(f.type) else plain[f.type] for f in schema}
    row |= {"example_id": example_id, "label": label, "sigma": sigma, "prediction": ABSTAIN, "abstained": True}
    row |= {"alpha": alpha, "stop_reason": Stop.SKIPPED.value, "target": None, "status": ERROR, "image_hash": None}
    return row | dict(empty)
