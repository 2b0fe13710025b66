"""Dual RS under the agreement claim: the votes of the router and of every level that was asked, a row an example."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from core.agreement_records import AgreementCertificate, AgreementVotes, StageVotes
from core.errors import ConfigError
from core.procedures.agreement import Agreement as AgreementTerms
from core.procedures.agreement import agreement_certify, agreement_from_votes, choose_level
from core.procedures.dual import selection_heads
from core.records import CLASSIFIER, ESTIMATOR, Counts, Procedure, Sampling, Stop
from core.report.agreement import AgreementRows
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
    votes_of,
)
from distributed.methods.rows import CERTIFICATE_SCHEMA, COUNTS, ERROR, result_row

__all__ = ["Agreement"]


class Agreement(Method):
    """CERTIFY of the routed classifier (`core.procedures.agreement`): the class stays, the level may change."""

    title = "Dual RS, agreement"
    schema = pa.schema(
        [
            *CERTIFICATE_SCHEMA,
            ("sigma_e", pa.float64()),
            ("router", pa.string()),
            ("sigma_index", pa.int64()),
            ("radius_constant", pa.float64()),
            ("binding", pa.int64()),
            ("num_shared", pa.int64()),
            ("counts_selection_sigma", COUNTS),
            ("counts_estimation_sigma", COUNTS),
            ("num_estimation_sigma", pa.int64()),
            ("stop_reason_sigma", pa.string()),
            ("radius_excluded", pa.list_(pa.float64())),
            ("radius_class", pa.list_(pa.float64())),
            ("p_lower_level", pa.list_(pa.float64())),
            ("counts_estimation_level", pa.list_(COUNTS)),
            ("num_estimation_level", pa.list_(pa.int64())),
            ("stop_reason_level", pa.list_(pa.string())),
        ]
    )
    """Unmarked votes and `p_lower` are the classifier's at `sigma`, the level `sigma_index` that the router's selection
    draws chose; `_sigma` are the router's. Lists have an entry for each level of Sigma; `_level` holds the votes at the
    other levels: empty, 0 and "skipped" for one that was not asked, and for the chosen one. `binding` is null where it
    abstained; `alpha_early` and `target` are null, each stage has its own. See
    `core.agreement_records.AgreementCertificate`."""
    heads = (ESTIMATOR, CLASSIFIER)
    endings = ("", "_sigma")
    empty: ClassVar[Row] = {"stop_reason_sigma": Stop.SKIPPED.value, "binding": None, "alpha_early": None}

    def procedures(self, terms: Terms) -> Sequence[Callable[[], Procedure[AgreementCertificate]]]:
        """One."""
        return [partial(agreement_certify, _terms(terms))]

    def row(self, example_id: str, label: int, result: AgreementCertificate) -> dict[str, Any]:
        """A row of its schema."""
        c, votes = result, result.votes
        own = votes.classes[c.level]
        assert own is not None, "the chosen level has votes, if none at all"
        others = [None if place == c.level else stage for place, stage in enumerate(votes.classes)]
        return result_row(
            example_id,
            label,
            c,
            p_lower=c.levels[c.level].p_lower,
            num_selection=c.num_selection,
            num_estimation=own.num,
            counts_selection=votes.class_selection,
            counts_estimation=own.counts,
            stop_reason=own.stop.value,
            alpha_early=None,
            target=None,
            sigma_e=c.sigma_e,
            router=c.router,
            sigma_index=c.level,
            radius_constant=c.radius_constant,
            binding=c.binding,
            num_shared=c.num_shared,
            counts_selection_sigma=votes.router_selection,
            counts_estimation_sigma=votes.router.counts,
            num_estimation_sigma=votes.router.num,
            stop_reason_sigma=votes.router.stop.value,
            radius_excluded=[level.radius_excluded for level in c.levels],
            radius_class=[level.radius_class for level in c.levels],
            p_lower_level=[level.p_lower for level in c.levels],
            counts_estimation_level=[stage.counts if stage else [] for stage in others],
            num_estimation_level=[stage.num if stage else 0 for stage in others],
            stop_reason_level=[(stage.stop if stage else Stop.SKIPPED).value for stage in others],
        )

    def recompute(self, row: Row, terms: Terms) -> AgreementCertificate:
        """What the votes of all stages show together."""
        return agreement_from_votes(_terms(terms), _votes(row, range(len(terms.sigmas))))

    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """The most where the router picks another level than sigma_e and every level has to be asked."""
        sampling, levels = terms.sampling, len(terms.sigmas)
        selection, estimation = sampling.num_selection, sampling.at(terms.sigma_e).num_estimation
        if terms.sigmas == (terms.sigma_e,):  # there is nothing else to pick
            return Counter({self.heads: selection + estimation}), terms.budget == "fixed"
        copies = Counter({selection_heads(terms.sigmas, terms.sigma_e): selection})
        copies[ESTIMATOR,] += estimation
        copies[CLASSIFIER,] += all_levels(terms) - (levels - 1) * selection
        return copies, False

    def stage(self, terms: Terms) -> Sampling:
        """Of the class at a level."""
        return _terms(terms).stages[CLASSIFIER]

    def votes(self, row: Row, terms: Terms, num_classes: int) -> Iterator[Votes]:
        """The classifier's at all levels that were asked, and the router's."""
        yield from super().votes(row, terms, num_classes)
        for counts, num in zip(row["counts_estimation_level"], row["num_estimation_level"], strict=True):
            yield Votes("counts_estimation_level", counts, num, frozenset({num_classes if num else 0}))

    def ends(self, row: Row) -> Iterator[tuple[str, int]]:
        """Those of the other levels too."""
        yield from super().ends(row)
        yield from zip(row["stop_reason_level"], row["num_estimation_level"], strict=True)

    def non_finite(self, table: pa.Table) -> int:
        """Of all stages."""
        others = num_votes(table, "num_estimation_level") - num_votes(table, "counts_estimation_level")
        return others + super().non_finite(table)

    def rederived(
        self, stored: Sequence[Row], run: RunRows, sigmas: Sequence[float], terms: Terms
    ) -> Iterator[dict[str, Any]]:
        """With a fixed budget from standard RS's votes at every level and the router's, those of Dual RS where it was
        run: the same noise gave them. With another one from its own rows alone.

        Draws that the router gave to a level that is left out count for no level.
        """
        places = [sigmas.index(sigma) for sigma in terms.sigmas]
        if terms.budget == "fixed":
            routers = {row["example_id"]: row for name in ("agreement", "dual") for row in run.get(name, {}).values()}
            rows = ((row, _joined(row, run["standard"], places, terms)) for row in routers.values())
        else:
            rows = ((row, None if row["status"] == ERROR else _votes(row, places)) for row in stored)
        for row, votes in rows:
            if votes is None:
                yield self.error_row(row["example_id"], row["label"], None, terms)
                continue
            level = terms.sigmas[choose_level(votes.router_selection, terms.router)]
            if terms.budget != "fixed" and level != row["sigma"]:
                raise ConfigError("a subset of Sigma that moves the router's choice needs budget: fixed")
            result = agreement_from_votes(_terms(terms), votes)
            yield self.row(row["example_id"], row["label"], result) | {"image_hash": row["image_hash"]}

    def shown(self, table: pa.Table, terms: Terms) -> AgreementRows:
        """With what each level shows, and what the draws went to."""
        columns = {name: table.column(name).to_pylist() for name in ("binding", "radius_excluded", "radius_class")}
        none = [0.0] * len(terms.sigmas)  # of a row with an error
        return AgreementRows(
            name=self.title,
            **common_columns(table),
            radius_constant=column(table, "radius_constant"),
            sigma=np.asarray(terms.sigmas)[column(table, "sigma_index")],
            sigma_choice=column(table, "sigma_index"),
            binding=np.array([-1 if place is None else place for place in columns["binding"]], np.int64),
            radius_excluded=np.array([radii or none for radii in columns["radius_excluded"]], np.float64),
            radius_class=np.array([radii or none for radii in columns["radius_class"]], np.float64),
            alpha_router=_terms(terms).stages[ESTIMATOR].alpha,
            draws_router=column(table, "num_estimation_sigma"),
            draws_class=column(table, "num_estimation"),
            draws_others=np.array([sum(nums) for nums in table.column("num_estimation_level").to_pylist()], np.int64),
        )


def _terms(terms: Terms) -> AgreementTerms:
    return AgreementTerms(**{each.name: getattr(terms, each.name) for each in fields(AgreementTerms)})


def _stage(counts: Sequence[int], num: int, stop: str) -> StageVotes:
    return StageVotes(np.asarray(counts, np.int64), num, Stop(stop))


def _router(row: Row, phase: str, places: Sequence[int]) -> Counts:
    """The router's votes for some of the levels; also from a row of Dual RS."""
    votes = row[f"counts_{phase}_sigma"]
    return np.array([votes[place] for place in places], np.int64)


def _votes(row: Row, places: Sequence[int]) -> AgreementVotes:
    """All votes of a row at some of the levels."""
    stages = zip(row["counts_estimation_level"], row["num_estimation_level"], row["stop_reason_level"], strict=True)
    classes = [_stage(counts, num, stop) if num else None for counts, num, stop in stages]
    classes[row["sigma_index"]] = _stage(row["counts_estimation"], row["num_estimation"], row["stop_reason"])
    return AgreementVotes(
        router_selection=_router(row, "selection", places),
        class_selection=votes_of(row, "selection"),
        router=_stage(
            _router(row, "estimation", places).tolist(), row["num_estimation_sigma"], row["stop_reason_sigma"]
        ),
        classes=tuple(classes[place] for place in places),
    )


def _joined(
    row: Row, standard: Mapping[tuple[str, float | None], Row], places: Sequence[int], terms: Terms
) -> AgreementVotes | None:
    """The router's votes of a row, and all that the classifier's would be; None where one of them has an error."""
    levels = [standard[row["example_id"], sigma] for sigma in terms.sigmas]
    if any(each["status"] == ERROR for each in (row, *levels)):
        return None
    asked = [_stage(each["counts_estimation"], each["num_estimation"], each["stop_reason"]) for each in levels]
    selection = _router(row, "selection", places)
    counts = _router(row, "estimation", places).tolist()
    return AgreementVotes(
        router_selection=selection,
        class_selection=votes_of(levels[choose_level(selection, terms.router)], "selection"),
        router=_stage(counts, row["num_estimation_sigma"], row["stop_reason_sigma"]),
        classes=tuple(asked),
    )
