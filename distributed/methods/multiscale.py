"""Multiscale, the cascade over Sigma: the votes of every level that was asked, a row for every example."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from core.procedures.multiscale import MultiscaleCertificate, level_alphas, multiscale_certify
from core.records import CLASSIFIER, Counts, Phase, Procedure
from core.report.multiscale import MultiscaleRows
from distributed.methods.method import (
    Copies,
    Method,
    Row,
    RunRows,
    Terms,
    Votes,
    all_levels,
    column,
    common_columns,
    num_votes,
)
from distributed.methods.rows import CERTIFICATE_SCHEMA, COUNTS, ERROR, result_row, stage_columns

__all__ = ["Multiscale"]

_PHASES = (Phase.SELECTION, Phase.ESTIMATION)
_BY_LEVEL = pa.list_(COUNTS)


class Multiscale(Method):
    """CERTIFY of the cascade (Jeong & Shin 2023, made rigorous in `core.procedures.multiscale`)."""

    title = "Multiscale"
    schema = pa.schema(
        [
            *CERTIFICATE_SCHEMA,
            ("num_levels", pa.int64()),
            ("radius_level", pa.float64()),
            ("radius_above", pa.float64()),
            ("sigma_bound", pa.float64()),
            ("alpha_level", pa.float64()),
            ("counts_selection_above", _BY_LEVEL),
            ("counts_estimation_above", _BY_LEVEL),
        ]
    )
    """`sigma`, the level that decided, is null where it abstained. Unmarked counts and `p_lower` are of the last of
    `num_levels` levels that were asked, the largest sigma first; `_above` holds those before it, in that order.
    `alpha_level` is what each of its bounds spends. See `MultiscaleCertificate`."""
    early = False
    empty: ClassVar[Row] = {"sigma_bound": None}

    def procedures(self, terms: Terms) -> Sequence[Callable[[], Procedure[MultiscaleCertificate]]]:
        """One."""
        return [partial(multiscale_certify, terms.sigmas, terms.sampling, terms.level_shares)]

    def row(self, example_id: str, label: int, result: MultiscaleCertificate) -> dict[str, Any]:
        """A row of its schema."""
        last, above = result.levels[-1], result.levels[:-1]
        return result_row(
            example_id,
            label,
            result,
            **stage_columns(last),
            num_selection=last.num_selection,
            num_levels=len(result.levels),
            radius_level=result.radius_level,
            radius_above=result.radius_above,
            sigma_bound=result.sigma_bound,
            alpha_level=last.alpha,
            counts_selection_above=[level.counts_selection for level in above],
            counts_estimation_above=[level.counts_estimation for level in above],
        )

    def recompute(self, row: Row, terms: Terms) -> MultiscaleCertificate:
        """The cascade again, level by level."""
        votes = {}
        for phase in _PHASES:
            levels = [*row[f"counts_{phase.value}_above"], row[f"counts_{phase.value}"]]
            for sigma, counts in zip(reversed(terms.sigmas), levels, strict=False):
                votes[sigma, phase] = np.asarray(counts, np.int64)
        return _cascade(votes, terms)

    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """The most where no level above the smallest decides."""
        return Counter({(CLASSIFIER,): all_levels(terms)}), len(terms.sigmas) == 1

    def votes(self, row: Row, terms: Terms, num_classes: int) -> Iterator[Votes]:
        """Of all levels that were asked."""
        for last in super().votes(row, terms, num_classes):
            yield last
            for counts in row[f"{last.column}_above"]:
                yield Votes(f"{last.column}_above", counts, last.draws, last.widths)

    def non_finite(self, table: pa.Table) -> int:
        """The levels above drew as much as the last one."""
        missing, above = super().non_finite(table), table.column("num_levels").to_numpy() - 1
        for phase in _PHASES:
            drawn = int((table.column(f"num_{phase.value}").to_numpy() * above).sum())
            missing += drawn - num_votes(table, f"counts_{phase.value}_above")
        return missing

    def rederived(
        self, stored: Sequence[Row], run: RunRows, sigmas: Sequence[float], terms: Terms
    ) -> Iterator[dict[str, Any]]:
        """From the votes of standard RS, whether it was run or not: the same noise gave them. Needs all draws."""
        standard = run["standard"]
        for example_id in dict.fromkeys(example_id for example_id, _ in standard) if terms.budget == "fixed" else ():
            rows = {sigma: standard[example_id, sigma] for sigma in terms.sigmas}
            first = next(iter(rows.values()))
            label = first["label"]
            if any(row["status"] == ERROR for row in rows.values()):
                yield self.error_row(example_id, label, None, terms)
                continue
            votes = {
                (sigma, phase): np.asarray(row[f"counts_{phase.value}"], np.int64)
                for sigma, row in rows.items()
                for phase in _PHASES
            }
            yield self.row(example_id, label, _cascade(votes, terms)) | {"image_hash": first["image_hash"]}

    def shown(self, table: pa.Table, terms: Terms) -> MultiscaleRows:
        """With the level that decided and the one that bounds."""
        return MultiscaleRows(
            name=self.title,
            **common_columns(table),
            **{name: column(table, name) for name in ("sigma", "sigma_bound", "num_levels")},
            alpha_levels=level_alphas(terms.sampling.alpha, len(terms.sigmas), terms.level_shares),
        )


def _cascade(votes: Mapping[tuple[float, Phase], Counts], terms: Terms) -> MultiscaleCertificate:
    """The certificate of the cascade over `terms.sigmas`, from each level's votes.

    Raises:
        ValueError: when the cascade asks for a level that has none.
    """
    procedure = multiscale_certify(terms.sigmas, terms.sampling, terms.level_shares)
    draws = next(procedure)
    while True:
        if (draws.sigma, draws.phase) not in votes:
            raise ValueError(f"the cascade goes on to sigma {draws.sigma:g}, which has no votes")
        try:
            draws = procedure.send({CLASSIFIER: votes[draws.sigma, draws.phase]})
        except StopIteration as stop:
            result: MultiscaleCertificate = stop.value
            return result
