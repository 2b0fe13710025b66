"""What the pipeline asks of a certification method: one class, whose defaults fit a method with one row an example."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.agreement_records import Router
from core.config import Config
from core.machine.noise_key import auxiliary
from core.procedures.randomized import uniform_of
from core.procedures.sequential import Budget
from core.procedures.smoothing import Estimation
from core.records import CLASSIFIER, AlphaSplit, Counts, Phase, Procedure, Rule, Sampling, paired
from core.report import MethodRows
from distributed.methods.rows import CERTIFICATE_SCHEMA, ERROR, certificate_row, error_row, optional_columns

__all__ = [
    "Copies",
    "Kind",
    "Method",
    "Row",
    "RunRows",
    "Terms",
    "Votes",
    "column",
    "estimation_copies",
    "estimation_of",
    "keyed",
    "missing_votes",
    "votes_of",
]

Row = Mapping[str, Any]
"""A row of a shard, as Arrow gives it: lists, numbers, strings."""

RunRows = Mapping[str, Mapping[tuple[str, float | None], Row]]
"""The rows of a run by method, and by example and noise level: None where a method has one row an example."""

Kind = tuple[str, ...]
"""A kind of forward pass, by the heads that read the same noisy copy."""

Copies = Counter[Kind]
"""Noisy copies by kind."""


@dataclass(frozen=True)
class Terms:
    """What a row was certified under.

    Attributes:
        sampling: draws at most, and the total failure probability.
        budget: `fixed`, `sequential` or `grid`.
        rule: of a sequential budget.
        radii: the grid of `grid`, empty otherwise.
        sigmas: Sigma.
        sigma_e: the estimator's noise level.
        split: how Dual RS spends alpha.
        sigma_share: share of alpha that the estimator's stage spends, where it is divided.
        level_shares: shares of alpha by the level of Multiscale that decides, see `core.procedures.multiscale`.
        router: how the agreement claim's estimator picks a level.
        router_share: share of alpha that it spends.
        seed: of the run.
    """

    sampling: Sampling
    budget: Budget
    rule: Rule
    radii: tuple[float, ...]
    sigmas: tuple[float, ...]
    sigma_e: float
    split: AlphaSplit = "halves"
    sigma_share: float = 0.5
    level_shares: tuple[float, ...] = ()
    router: Router = "median"
    router_share: float = 0.5
    seed: int = 0

    @classmethod
    def of(cls, config: Config, sampling: Sampling, budget: Budget) -> "Terms":
        """The terms of a configuration."""
        certify = config.certify
        return cls(
            sampling=sampling,
            budget=budget,
            rule=Rule(certify.look_every, certify.early_share, certify.futility_z),
            radii=config.grid_radii if budget == "grid" else (),
            sigmas=config.sigmas,
            sigma_e=config.estimator_sigma,
            split=certify.alpha_split,
            level_shares=certify.level_shares,
            router=certify.router,
            router_share=certify.router_share,
            seed=config.seed,
        )


@dataclass(frozen=True)
class Votes:
    """The votes of a column of a row, and what they may be.

    Attributes:
        column: its name.
        counts: per class.
        draws: so many at most have voted.
        widths: how many classes there may be.
    """

    column: str
    counts: Sequence[int]
    draws: int
    widths: frozenset[int]


class Method(ABC):
    """A certification method: what it draws, what a row of it holds, what a stored row proves, and how it is shown.

    The rows follow from the votes: `again` is the row bit for bit, which the audit checks, and under other terms it is
    the row of `jobs.recertify`.
    """

    title: ClassVar[str]
    """In the report."""
    schema: ClassVar[pa.Schema] = CERTIFICATE_SCHEMA
    """Of its rows: CERTIFICATE_SCHEMA, and what it has beside that."""
    heads: ClassVar[tuple[str, ...]] = (CLASSIFIER,)
    """The networks that it asks."""
    per_level: ClassVar[bool] = False
    """Whether an example has a row for each level of Sigma, or one."""
    early: ClassVar[bool] = True
    """Whether it obeys certify.budget; otherwise it takes all draws."""
    any_bound: ClassVar[bool] = False
    """Whether it knows certify.reference and other bounds than Clopper-Pearson's."""
    endings: ClassVar[tuple[str, ...]] = ("",)
    """Of the columns of its stages: num_estimation, stop_reason, counts_selection and counts_estimation of each."""
    may_skip: ClassVar[bool] = False
    """Whether the classifier may not be asked: then its votes are empty."""
    empty: ClassVar[Row] = {}
    """Columns of a row with an error that are neither 0 nor empty."""

    def levels(self, sigmas: Sequence[float]) -> tuple[float | None, ...]:
        """Noise levels of an example's rows; (None,) where the draws pick it."""
        return tuple(sigmas) if self.per_level else (None,)

    def columns(self, terms: Terms) -> pa.Schema:
        """Of its rows under these terms: `schema`, and what a reference or a randomised bound adds."""
        return pa.schema([*self.schema, *optional_columns(terms.sampling, self.endings)])

    def schema_with(self, names: Sequence[str]) -> pa.Schema:
        """`schema`, and those of all columns that may be added that have these names."""
        added = optional_columns(Sampling(num_reference=1, bound="randomized"), self.endings) if self.any_bound else ()
        return pa.schema([*self.schema, *(field for field in added if field.name in names)])

    @abstractmethod
    def procedures(self, terms: Terms) -> Sequence[Callable[[], Procedure[Any]]]:
        """Makers of the generators that give an example's rows, in the order of `levels`."""

    def row(self, example_id: str, label: int, result: Any) -> dict[str, Any]:
        """The row, of `schema` but for `image_hash`, that a procedure's result gives; here a `Certificate`."""
        return certificate_row(example_id, label, result)

    @abstractmethod
    def recompute(self, row: Row, terms: Terms) -> Any:
        """The result that the votes of a row give under these terms.

        Raises:
            ValueError, LookupError, TypeError, ConfigError: for votes that no procedure can have been sent.
        """

    @abstractmethod
    def copies(self, terms: Terms) -> tuple[Copies, bool]:
        """Noisy copies of one example at most, and whether it always takes so many."""

    def again(self, row: Row, terms: Terms) -> dict[str, Any]:
        """A row as its votes give it under these terms; which image it was computed from, votes cannot say."""
        result = self.recompute(row, terms)
        return self.row(row["example_id"], row["label"], result) | {"image_hash": row["image_hash"]}

    def error_row(self, example_id: str, label: int, sigma: float | None, terms: Terms) -> dict[str, Any]:
        """The row of an example that could not be run."""
        return error_row(self.columns(terms), self.empty, example_id, label, sigma, terms.sampling.alpha)

    def stage(self, terms: Terms) -> Sampling:
        """What a certificate inside of it may spend."""
        return terms.sampling

    def votes(self, row: Row, terms: Terms, num_classes: int) -> Iterator[Votes]:
        """All votes of a row."""
        for ending in self.endings:
            widths = frozenset({len(terms.sigmas)} if ending else {num_classes, 0} if self.may_skip else {num_classes})
            columns = {f"counts_selection{ending}": "num_selection"}
            columns[f"counts_estimation{ending}"] = f"num_estimation{ending}"
            if terms.sampling.num_reference:
                columns[f"counts_missed{ending}"] = f"num_reference{ending}"
            for name, draws in columns.items():
                yield Votes(name, row[name], row[draws], widths)

    def ends(self, row: Row) -> Iterator[tuple[str, int]]:
        """Why each stage of a row ended, and after how many estimation draws."""
        for ending in self.endings:
            yield row[f"stop_reason{ending}"], row[f"num_estimation{ending}"]

    def spent(self, row: Row, terms: Terms) -> float:
        """Failure probability that a row says it spends."""
        return float(row["alpha"])

    def non_finite(self, table: pa.Table) -> int:
        """Draws that voted for no class, in all."""
        return sum(missing_votes(table, ending) for ending in self.endings)

    def rederived(
        self, stored: Sequence[Row], run: RunRows, sigmas: Sequence[float], terms: Terms
    ) -> Iterator[dict[str, Any]]:
        """Rows under other terms, from votes alone.

        Args:
            stored: its rows of the run, if it was run.
            run: those of all methods that were run.
            sigmas: Sigma of the run; that of `terms` is a subset.
            terms: the new ones.

        Raises:
            ConfigError: when the votes of the run are not enough.
        """
        for row in stored:
            if row["status"] == ERROR:
                yield self.error_row(row["example_id"], row["label"], row["sigma"], terms)
            else:
                yield self.again(row, terms)

    def shown(self, table: pa.Table, terms: Terms) -> MethodRows:
        """Its rows as the report wants them, `table` ordered by example."""
        return MethodRows(name=self.title, **common_columns(table))


def all_levels(terms: Terms) -> int:
    """Copies of both phases at all levels."""
    at = [terms.sampling.at(sigma) for sigma in terms.sigmas]
    return sum(each.num_selection + each.num_estimation for each in at)


def keyed(rows: Sequence[Row], per_level: bool) -> dict[tuple[str, float | None], Row]:
    """Rows of a method as `RunRows` has them."""
    return {(row["example_id"], row["sigma"] if per_level else None): row for row in rows}


def common_columns(table: pa.Table) -> dict[str, Any]:
    """The columns that every method shows."""
    return {name: column(table, name) for name in ("correct", "radius", "p_lower", "abstained", "num_draws")}


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column as an array of its own."""
    return np.array(table.column(name).to_numpy())


def votes_of(row: Row, phase: str, ending: str = "") -> Counts:
    """The votes of a phase."""
    return np.asarray(row[f"counts_{phase}{ending}"], np.int64)


def estimation_of(row: Row, terms: Terms, sigma: float, ending: str = "") -> Estimation:
    """What came of a stage's estimation draws. The uniform number is computed anew, whatever the row says it was."""
    sampling = terms.sampling
    number = auxiliary(terms.seed, row["example_id"], Phase.ESTIMATION, sigma)
    return Estimation(
        votes_of(row, "estimation", ending),
        np.asarray(row[f"counts_missed{ending}"], np.int64) if sampling.num_reference else None,
        uniform_of(number) if sampling.bound == "randomized" else None,
    )


def estimation_copies(kind: Kind, sampling: Sampling) -> Copies:
    """Noisy copies of a stage's estimation, those that the reference sees too among them."""
    num, seen = sampling.num_estimation, sampling.num_reference
    return +Counter({kind: num - seen, (*kind, *map(paired, kind)): seen})


def missing_votes(table: pa.Table, ending: str) -> int:
    """What the votes of a stage lack of its draws; a stage without selection votes was not run."""
    ran = np.asarray(pc.list_value_length(table.column(f"counts_selection{ending}"))) > 0
    missing = 0
    for phase in ("selection", "estimation"):
        draws = table.column(f"num_{phase}{ending if phase == 'estimation' else ''}").to_numpy()
        missing += int(draws[ran].sum()) - num_votes(table, f"counts_{phase}{ending}")
    return missing


def num_votes(table: pa.Table, name: str) -> int:
    """Sum of a column of votes."""
    return int(pc.sum(pc.list_flatten(table.column(name), recursive=True)).as_py() or 0)
