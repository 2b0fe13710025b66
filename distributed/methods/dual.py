"""Dual RS: the estimator's votes and the classifier's, a row for every example."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from core.errors import ConfigError
from core.procedures.dual import join_stages, selection_heads
from core.procedures.sequential import beyond, conclude, dual_procedure, second_targets, skipped, stage_order, tie_of
from core.procedures.smoothing import certificate
from core.records import (
    CLASSIFIER,
    ESTIMATOR,
    Bound,
    Certificate,
    DualCertificate,
    Procedure,
    Sampling,
    Stop,
    divided,
    stage_sampling,
)
from core.report import DualRows
from distributed.methods.method import (
    Copies,
    Method,
    Row,
    RunRows,
    Terms,
    column,
    common_columns,
    estimation_copies,
    estimation_of,
    votes_of,
)
from distributed.methods.rows import CERTIFICATE_SCHEMA, COUNTS, ERROR, result_row, stage_columns

__all__ = ["Dual", "dual_copies"]

_ENDING = {ESTIMATOR: "_sigma", CLASSIFIER: ""}
_CLASSIFIER_COLUMNS = ("counts_selection", "counts_estimation", "num_estimation", "stop_reason")
_ITS_REFERENCE = ("counts_missed", "num_reference")


class Dual(Method):
    """DUAL-CERTIFY (arXiv 2512.01782)."""

    title = "Dual RS"
    schema = pa.schema(
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
            ("counts_selection_sigma", COUNTS),
            ("counts_estimation_sigma", COUNTS),
        ]
    )
    """Unmarked counts are the classifier's (empty when it was not run), `_sigma` the estimator's. `sigma` is null when
    the estimator abstained; `sigma_index` is its selection draws' choice all the same."""
    heads = (ESTIMATOR, CLASSIFIER)
    endings = ("", "_sigma")
    may_skip = True
    any_bound = True
    empty: ClassVar[Row] = {
        "stop_reason_sigma": Stop.SKIPPED.value,
        "target_sigma": None,
        "bounded_by": Bound.NONE.value,
    }

    def procedures(self, terms: Terms) -> Sequence[Callable[[], Procedure[DualCertificate]]]:
        """One."""
        return [
            partial(
                dual_procedure,
                terms.budget,
                terms.sigmas,
                terms.sigma_e,
                terms.sampling,
                terms.rule,
                terms.radii,
                terms.split,
            )
        ]

    def row(self, example_id: str, label: int, result: DualCertificate) -> dict[str, Any]:
        """A row of its schema."""
        level, label_stage = result.sigma_stage, result.class_stage
        return result_row(
            example_id,
            label,
            result,
            **stage_columns(level, "_sigma"),
            **stage_columns(label_stage or level, ran=label_stage is not None),
            num_selection=level.num_selection,
            sigma_e=level.sigma,
            sigma_index=level.top_class,
            radius_sigma=result.radius_sigma,
            radius_class=result.radius_class,
            bounded_by=result.bounded_by.value,
            alpha_sigma=result.alpha_sigma,
            alpha_class=result.alpha_class,
            num_shared=result.num_shared,
        )

    def recompute(self, row: Row, terms: Terms) -> DualCertificate:
        """Both stages, in the order in which they were run."""
        stage = _stages(terms)
        selection = {head: votes_of(row, "selection", _ENDING[head]) for head in self.heads}
        estimation = {head: votes_of(row, "estimation", _ENDING[head]) for head in self.heads}
        level = {ESTIMATOR: terms.sigma_e, CLASSIFIER: terms.sigmas[int(selection[ESTIMATOR].argmax())]}
        if terms.budget == "fixed":

            def made(head: str) -> Certificate:
                more = estimation_of(row, terms, level[head], _ENDING[head])
                return certificate(selection[head], estimation[head], level[head], stage[head], more)

            first = made(ESTIMATOR)
            label = None if first.abstained else made(CLASSIFIER)
            joined = join_stages(first, label, terms.sigmas, terms.sampling.alpha)
            return replace(joined, alpha_class=stage[CLASSIFIER].alpha)  # though it was not run
        stages: dict[str, Certificate] = {}
        order = stage_order(selection, level, terms.sampling.law)
        for head in order:
            if stages and stages[order[0]].abstained:
                stages[head] = skipped(level[head], selection[head], stage[head])
                continue
            stages[head] = conclude(
                level[head],
                second_targets(terms.radii, stages[order[0]].radius) if stages else beyond(terms.radii),
                selection[head],
                estimation[head],
                row[f"num_estimation{_ENDING[head]}"],
                stage[head],
                terms.rule.early_share,
                Stop(row[f"stop_reason{_ENDING[head]}"]),
                grid=terms.budget == "grid",
            )
        return join_stages(stages[ESTIMATOR], stages[CLASSIFIER], terms.sigmas, terms.sampling.alpha, tie_of(order[0]))

    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """The most where the estimator picks another level than sigma_e and does not abstain."""
        always = terms.sigmas == (terms.sigma_e,)  # there is nothing else to pick
        return dual_copies(terms, shared=always, class_stage=True), always and terms.budget == "fixed"

    def stage(self, terms: Terms) -> Sampling:
        """Of either stage."""
        return stage_sampling(terms.sampling, terms.split)

    def spent(self, row: Row, terms: Terms) -> float:
        """By the split: what both stages spend, or the larger of the two."""
        parts = (row["alpha_sigma"], row["alpha_class"])
        return float(max(parts) if terms.split == "full" else sum(parts))

    def rederived(
        self, stored: Sequence[Row], run: RunRows, sigmas: Sequence[float], terms: Terms
    ) -> Iterator[dict[str, Any]]:
        """Where the estimator's choice moves, the classifier's votes come from standard RS: the same noise gave them.

        Draws that the estimator gave to a level that is left out count for no level.
        """
        restricted = [self._restricted(row, run["standard"], sigmas, terms) for row in stored]
        return super().rederived(restricted, run, sigmas, terms)

    def _restricted(
        self, row: Row, standard: Mapping[tuple[str, float | None], Row], sigmas: Sequence[float], terms: Terms
    ) -> Row:
        """A row with the estimator's votes for the subset, and the classifier's at the level it then picks."""
        if row["status"] == ERROR:
            return row
        new = dict(row)
        for phase in ("selection", "estimation"):
            votes = row[f"counts_{phase}_sigma"]
            new[f"counts_{phase}_sigma"] = [votes[sigmas.index(sigma)] for sigma in terms.sigmas]
        if terms.sampling.num_reference:
            new["counts_missed_sigma"] = [row["counts_missed_sigma"][sigmas.index(sigma)] for sigma in terms.sigmas]
        choice = new["counts_selection_sigma"]
        sigma = terms.sigmas[choice.index(max(choice))]
        if sigma != sigmas[row["sigma_index"]] or not row["counts_selection"]:
            if terms.budget != "fixed":
                raise ConfigError("a subset of Sigma that moves the estimator's choice needs budget: fixed")
            others = standard[row["example_id"], sigma]
            new |= {key: others[key] for key in (*_CLASSIFIER_COLUMNS, *_ITS_REFERENCE) if key in others}
        return new

    def shown(self, table: pa.Table, terms: Terms) -> DualRows:
        """With both radii and the estimator's choice."""
        skip = np.array(table.column("stop_reason_sigma").to_pylist()) == Stop.SKIPPED.value
        choice = column(table, "sigma_index")
        return DualRows(
            name=self.title,
            **common_columns(table),
            radius_sigma=column(table, "radius_sigma"),
            radius_class=column(table, "radius_class"),
            # nan where the estimator abstained; its choice where it was not asked any further
            sigma=np.where(skip, np.asarray(terms.sigmas)[choice], column(table, "sigma")),
            bounded_by=np.array(table.column("bounded_by").to_pylist()),
            sigma_choice=choice,
        )


def dual_copies(terms: Terms, *, shared: bool, class_stage: bool) -> Copies:
    """Noisy copies of one DUAL-CERTIFY (`core.procedures.dual.dual_certify`).

    Args:
        terms: draws of each stage, Sigma, and the estimator's level.
        shared: whether it picks sigma_e: then both heads read the same copies.
        class_stage: whether the classifier is run at another level: it is not where the estimator abstains.
    """
    sampling = terms.sampling
    copies = Counter({selection_heads(terms.sigmas, terms.sigma_e): sampling.num_selection})
    copies += estimation_copies(Dual.heads if shared else (ESTIMATOR,), sampling.at(terms.sigma_e))
    if class_stage and not shared:
        most = sampling.at(max(terms.sigmas))
        copies += Counter({(CLASSIFIER,): sampling.num_selection}) + estimation_copies((CLASSIFIER,), most)
    return copies


def _stages(terms: Terms) -> dict[str, Sampling]:
    """Draws and failure probability of each stage."""
    if terms.split == "full":
        return {ESTIMATOR: terms.sampling, CLASSIFIER: terms.sampling}
    return divided(terms.sampling, terms.sigma_share)
