"""Standard randomized smoothing: a certificate, and so a row, for every noise level."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.errors import DataError
from core.procedures.sequential import beyond, conclude, standard_procedure
from core.procedures.smoothing import certificate
from core.records import CLASSIFIER, Certificate, Procedure, Stop
from distributed.methods.method import Copies, Method, Row, RunRows, Terms, estimation_copies, estimation_of, votes_of

__all__ = ["Standard", "grid", "stacked"]


class Standard(Method):
    """CERTIFY (Cohen et al. 2019) at each level of Sigma, all of alpha for each."""

    title = "Standard RS"
    per_level = True
    any_bound = True

    def procedures(self, terms: Terms) -> Sequence[Callable[[], Procedure[Certificate]]]:
        """One for each level."""
        return [
            partial(standard_procedure, terms.budget, sigma, terms.sampling, terms.rule, terms.radii)
            for sigma in terms.sigmas
        ]

    def recompute(self, row: Row, terms: Terms) -> Certificate:
        """The certificate of its noise level."""
        selection, estimation = votes_of(row, "selection"), votes_of(row, "estimation")
        if terms.budget == "fixed":
            more = estimation_of(row, terms, row["sigma"])
            return certificate(selection, estimation, row["sigma"], terms.sampling, more)
        return conclude(
            row["sigma"],
            beyond(terms.radii),
            selection,
            estimation,
            row["num_estimation"],
            terms.sampling,
            terms.rule.early_share,
            Stop(row["stop_reason"]),
            grid=terms.budget == "grid",
        )

    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """All draws at all levels, unless they stop early."""
        kind, copies = (CLASSIFIER,), Counter[tuple[str, ...]]()
        for sigma in terms.sigmas:
            copies += Counter({kind: terms.sampling.num_selection})
            copies += estimation_copies(kind, terms.sampling.at(sigma))
        return copies, terms.budget == "fixed"

    def rederived(
        self, stored: Sequence[Row], run: RunRows, sigmas: Sequence[float], terms: Terms
    ) -> Iterator[dict[str, Any]]:
        """The rows of the levels that are left."""
        kept = [row for row in stored if row["sigma"] in terms.sigmas]
        return super().rederived(kept, run, sigmas, terms)


def grid(table: pa.Table, name: str, sigmas: Sequence[float]) -> NDArray[Any]:
    """A column of (example, sigma) rows, in the order of `ShardStore.read`, as ``(N, K)``.

    Raises:
        DataError: when the rows are not one per example and sigma.
    """
    levels = table.column("sigma").to_numpy()
    width = len(sigmas)
    if len(levels) % width or not np.array_equal(levels.reshape(-1, width), np.tile(sigmas, (len(levels) // width, 1))):
        raise DataError(f"expected one row per example for each sigma of {list(sigmas)}")
    values = table.column(name)
    array = stacked(values.to_numpy()) if pa.types.is_list(values.type) else values.to_numpy()
    return np.asarray(array.reshape(-1, width, *array.shape[1:]))


def stacked(lists: NDArray[Any]) -> NDArray[Any]:
    """Lists of one length as rows; zeros for the empty ones of rows with errors."""
    width = max(map(len, lists))
    return np.stack([values if len(values) else np.zeros(width, np.int64) for values in lists])
