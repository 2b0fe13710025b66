"""What a report is made of: the rows of each method, aligned by example, and the methods that they amount to.

`core.report.render` writes the report; `core.report.plots` alone imports matplotlib.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.evaluation import metrics
from core.evaluation.exchange import CertifyLog
from core.evaluation.metrics import Bools, Floats, Ints
from core.law import GAUSSIAN, Law
from core.records import Bound

if TYPE_CHECKING:
    from core.report.pages import Block

__all__ = [
    "Bools",
    "DualRows",
    "Floats",
    "Ints",
    "Kind",
    "Method",
    "MethodRows",
    "ReportData",
    "RoutedRows",
    "StandardRows",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodRows:
    """Certificates of one method, one for each of N examples. A method with more to show has a kind of its own.

    Attributes:
        name: of the method.
        correct: bool ``(N,)``, certified and the class is the label.
        radius: float64 ``(N,)``, certified l2 radius, 0 where abstaining.
        p_lower: float64 ``(N,)``, lower bound of the top class's probability, in [0, 1].
        abstained: bool ``(N,)``.
        num_draws: int64 ``(N,)``, noisy copies spent.

    Raises:
        DataError: for lengths that differ, values out of range, or an abstention with a radius or a right class.
    """

    name: str
    correct: Bools
    radius: Floats
    p_lower: Floats
    abstained: Bools
    num_draws: Ints

    def __post_init__(self) -> None:
        _check_rows(self)

    def summary(self, data: "ReportData") -> str:
        """What the report's summary says of it, a sentence or none."""
        return ""

    def blocks(self, data: "ReportData") -> "list[Block]":
        """Its own part of the report."""
        return []

    def check_columns(self, *names: str) -> None:
        """Raise `DataError` unless these are ``(N,)`` too."""
        for name in names:
            if (shape := getattr(self, name).shape) != self.correct.shape:
                raise DataError(f"{self.name}: {name} must have shape {self.correct.shape}, got {shape}")


@dataclass(frozen=True, eq=False, kw_only=True)
class StandardRows(MethodRows):
    """Certificates of standard RS at one noise level.

    Attributes:
        sigma: noise level, > 0, pixel scale [0, 1].
    """

    name: str = "Standard RS"
    sigma: float

    def __post_init__(self) -> None:
        if not self.sigma > 0.0:
            raise DataError(f"sigma must be > 0, got {self.sigma!r}")
        _check_rows(self, f"{self.name}, sigma = {self.sigma:g}")


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutedRows(MethodRows):
    """Certificates of Dual RS under either claim.

    Attributes:
        sigma: float64 ``(N,)``, the noise level at which the class was chosen; nan where the claim is that it stays and
            that was not certified.
        sigma_choice: int64 ``(N,)``, index into Sigma that the estimator's selection draws chose, also where it
            abstained.
    """

    sigma: Floats
    sigma_choice: Ints

    @property
    def estimator_abstained(self) -> Bools:
        """Where no noise level was certified though the claim is about it, bool ``(N,)``."""
        return np.isnan(self.sigma)

    @property
    def capped(self) -> Bools:
        """Where the estimator bounds the radius of a certificate, bool ``(N,)``."""
        raise NotImplementedError

    def slack(self) -> Floats:
        """What there is of R_sigma - R_c; nothing where no single R_sigma is claimed."""
        return np.zeros(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class DualRows(RoutedRows):
    """Certificates of Dual RS as published.

    Attributes:
        radius_sigma: float64 ``(N,)``, R_sigma, 0 where the estimator abstained.
        radius_class: float64 ``(N,)``, R_c, 0 where the classifier abstained or was not run.
        bounded_by: ``(N,)`` strings, values of `core.records.Bound`: "sigma", "class", or "none" where abstaining.
    """

    name: str = "Dual RS"
    radius_sigma: Floats
    radius_class: Floats
    bounded_by: NDArray[np.str_]

    def __post_init__(self) -> None:
        _check_rows(self)
        self.check_columns("radius_sigma", "radius_class", "sigma", "bounded_by", "sigma_choice")
        if unknown := set(self.bounded_by.tolist()) - {str(bound) for bound in Bound}:
            raise DataError(f"Dual RS: bounded_by must be one of {[str(b) for b in Bound]}, got {sorted(unknown)}")
        if np.any(np.isnan(self.sigma) & ~self.abstained):
            raise DataError("Dual RS: sigma is nan (the estimator abstained) on rows that claim a certificate")

    @property
    def capped(self) -> Bools:
        """Where R_sigma is the radius."""
        return np.asarray(self.bounded_by == str(Bound.SIGMA))

    def slack(self) -> Floats:
        """Delta R_sigma = R_sigma - R_c over the examples that both stages certify; negative: the estimator caps."""
        return (self.radius_sigma - self.radius_class)[~self.abstained]


class Kind(StrEnum):
    """What a row of the certified-accuracy table is."""

    STANDARD = "standard"
    DUAL = "dual"
    OTHER = "other"
    ORACLE = "oracle"
    BASELINE = "baseline"
    IMPORTED = "imported"


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One row of the tables and one curve of the plots. `index` is the position in Sigma (0 where there is none).

    The oracle has no p_lower, no abstentions and no draws of its own: these are None. `strict` counts radius > r,
    otherwise radius >= r.
    """

    name: str
    kind: Kind
    index: int
    correct: Bools
    radius: Floats
    p_lower: Floats | None
    abstained: Bools | None
    num_draws: Ints | None
    strict: bool

    @property
    def is_certificate(self) -> bool:
        """False for the oracle, which picks the noise level with the label in hand, and for imported logs: nothing of
        them was checked, and their examples, draws and alpha may be others. Neither is ever the best.
        """
        return self.kind not in (Kind.ORACLE, Kind.IMPORTED)

    @property
    def num_examples(self) -> int:
        """Of this method: imported ones may have other examples than the run."""
        return self.correct.size

    def accuracy(self, radii: Floats) -> Floats:
        """Certified accuracy at each of `radii`."""
        return metrics.certified_accuracy(self.correct, self.radius, radii, self.strict)

    def intervals(self, radii: Floats) -> list[tuple[float, ...]]:
        """For each of `radii`: itself, the certified accuracy, and both ends of its exact 95% interval."""
        accuracy = self.accuracy(radii)
        columns = (radii, accuracy, *metrics.clopper_pearson_interval(accuracy, self.num_examples))
        return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ReportData:
    """Everything that a report shows. All rows but the imported ones are aligned: entry i is the same example.

    Attributes:
        title: heading of the report.
        labels: name of the data set.
        radii: float64 ``(R,)``, columns of the tables, ascending, >= 0.
        standard: standard RS with the classifier of Dual RS, one per noise level of Sigma, in the order of Sigma.
        dual: Dual RS under the run's claim, None when it was not run.
        standard_at_dual_alpha: float64 ``(N, K)``, R_c(x, sigma_i) at the classifier's share of alpha, 0 for a wrong
            class; None when it was not measured.
        baseline: standard RS with the off-the-shelf classifier.
        others: further methods that were run.
        experts: whether each noise level has a classifier of its own.
        imported: logs of others, by name; shown beside the rest as they are, unchecked, and never called the best.
        strict: whether a certificate counts at r when its radius is > r (else >= r).
        law: of the noise; says the norm of all radii.
        alpha: failure probability per example.
        alpha_stages: what Dual RS spends on the noise level and on the class.
        num_selection, num_estimation: draws of each certificate (n0 and n).
        reach: what no radius of this run exceeds; None where that is `largest_radius` of these.
        notes: sentences to show below the summary.
        manifest: configuration, versions, seed; shown as JSON.

    Raises:
        DataError: for rows that are not aligned, nothing to report, or noise levels that do not match Sigma.
    """

    title: str
    labels: str
    radii: Floats
    standard: tuple[StandardRows, ...]
    dual: RoutedRows | None
    standard_at_dual_alpha: Floats | None
    baseline: tuple[StandardRows, ...] = ()
    others: tuple[MethodRows, ...] = ()
    experts: bool = False
    imported: Mapping[str, CertifyLog] = field(default_factory=dict)
    strict: bool = True
    law: Law = GAUSSIAN
    alpha: float
    alpha_stages: tuple[float, float]
    num_selection: int
    num_estimation: int
    reach: float | None = None
    notes: tuple[str, ...] = ()
    manifest: Mapping[str, object]

    def __post_init__(self) -> None:
        rows = (*self.standard, *self.baseline, self.dual, *self.others)
        sizes = {r.correct.size for r in rows if r is not None}
        if not self.standard or len(sizes) != 1:
            raise DataError(
                f"a report needs standard RS at one noise level or more, and every method on the same examples; "
                f"got {len(self.standard)} noise levels and {sorted(sizes)} examples"
            )
        if self.radii.ndim != 1 or self.radii.size == 0 or self.radii[0] < 0.0 or np.any(np.diff(self.radii) <= 0.0):
            raise DataError(f"radii must be ascending numbers >= 0, at least one, got {self.radii!r}")
        shape = (self.num_examples, len(self.standard))
        if self.standard_at_dual_alpha is not None and self.standard_at_dual_alpha.shape != shape:
            raise DataError(f"standard_at_dual_alpha must be (N, K) = {shape}, got {self.standard_at_dual_alpha.shape}")
        if self.dual is not None:
            _check_choice(self.dual, self.sigmas)

    @property
    def num_examples(self) -> int:
        """N."""
        return self.standard[0].correct.size

    @property
    def sigmas(self) -> Floats:
        """Sigma, float64 ``(K,)``."""
        return np.array([rows.sigma for rows in self.standard])

    @property
    def oracle(self) -> tuple[Ints, Floats]:
        """Best index into Sigma and its radius per example (`metrics.oracle` over the standard rows)."""
        columns = (np.stack([r.correct for r in self.standard], 1), np.stack([r.radius for r in self.standard], 1))
        return metrics.oracle(*columns)

    def methods(self) -> tuple[Method, ...]:
        """The rows of the tables in the order in which they are shown."""

        def method(rows: MethodRows, kind: Kind, index: int = 0, name: str = "") -> Method:
            columns = (rows.correct, rows.radius, rows.p_lower, rows.abstained, rows.num_draws)
            return Method(name or rows.name, kind, index, *columns, self.strict)

        def at_levels(levels: Sequence[StandardRows], kind: Kind, which: str = "") -> list[Method]:
            names = ["Expert" if self.experts else rows.name for rows in levels]
            return [method(r, kind, i, f"{names[i]}{which}, sigma = {r.sigma:g}") for i, r in enumerate(levels)]

        _, best = self.oracle
        shown = at_levels(self.standard, Kind.STANDARD)
        shown += [method(rows, Kind.OTHER, i) for i, rows in enumerate(self.others)]
        shown += [method(self.dual, Kind.DUAL)] if self.dual is not None else []
        oracle = ("Oracle over Sigma (not a certificate)", Kind.ORACLE, 0, best > 0.0, best, None, None, None)
        shown += [Method(*oracle, self.strict), *at_levels(self.baseline, Kind.BASELINE, " off the shelf")]
        for i, (name, log) in enumerate(self.imported.items()):
            claims = (log.correct, log.radius, None, log.abstained, None)
            shown.append(Method(f"Imported: {name}", Kind.IMPORTED, i, *claims, self.strict))
        return tuple(shown)

    def leaders(self) -> list[list[Method]]:
        """Per radius the certified methods with the highest accuracy, several on a tie, none where that is 0."""
        methods = [m for m in self.methods() if m.is_certificate]
        values = np.stack([m.accuracy(self.radii) for m in methods], axis=1)
        return [[m for m, v in zip(methods, row, strict=True) if v == row.max() > 0.0] for row in values]

    def lost_radius(self) -> Floats:
        """Delta R_c over the examples that some sigma certifies (R_c* > 0); empty where it was not measured."""
        if self.dual is None or (radius := self.standard_at_dual_alpha) is None:
            return np.zeros(0)
        return np.asarray(self.lost_by_example()[radius.max(axis=1) > 0.0], np.float64)

    def lost_by_example(self) -> Floats:
        """Delta R_c = R_c* - R_c, ``(N,)``: what the best level certifies of the right class beyond the chosen one, at
        the classifier's share of alpha; above 0 the example was routed wrong. 0 where no level certifies it, and
        throughout where it was not measured.
        """
        if self.dual is None or (radius := self.standard_at_dual_alpha) is None:
            return np.zeros(self.num_examples)
        return np.asarray(radius.max(axis=1) - radius[np.arange(len(radius)), self.dual.sigma_choice], np.float64)

    def choice_counts(self) -> tuple[Ints, Ints, Ints]:
        """Examples per sigma, ``(K,)``: chosen by the estimator, certified by it, best for the oracle (radius > 0)."""
        if self.dual is None:
            raise DataError("Dual RS was not run, so there is no choice of sigma to count")
        (index, best), choice = self.oracle, self.dual.sigma_choice
        chosen, certified, ideal = (
            np.bincount(x, minlength=self.sigmas.size).astype(np.int64)
            for x in (choice, choice[~self.dual.estimator_abstained], index[best > 0.0])
        )
        return chosen, certified, ideal

    def choice_agreement(self) -> float:
        """Share of the examples with an oracle radius > 0 on which the estimator chose its sigma; nan without any."""
        index, best = self.oracle
        same = (index == (-1 if self.dual is None else self.dual.sigma_choice))[best > 0.0]
        return float(same.mean()) if same.size else float("nan")


def _check_rows(rows: MethodRows, name: str = "") -> None:
    name = name or rows.name
    shape = rows.correct.shape
    for column in ("correct", "radius", "p_lower", "abstained", "num_draws"):
        value = getattr(rows, column)
        if value.shape != shape or len(shape) != 1 or shape == (0,):
            raise DataError(f"{name}: {column} must be a vector as long as correct {shape}, got {value.shape}")
        if (value.dtype == np.bool_) != (column in ("correct", "abstained")):
            raise DataError(f"{name}: {column} has the wrong type, got {value.dtype}")
    if np.any(rows.abstained & (rows.correct | (rows.radius != 0.0))):
        raise DataError(f"{name}: an abstention has radius 0 and is never correct; got rows that say otherwise")
    if not np.all((rows.p_lower >= 0.0) & (rows.p_lower <= 1.0)):
        raise DataError(f"{name}: p_lower must lie in [0, 1], got {rows.p_lower!r}")


def _check_choice(dual: RoutedRows, sigmas: Floats) -> None:
    if np.any((dual.sigma_choice < 0) | (dual.sigma_choice >= sigmas.size)):
        raise DataError(f"sigma_choice must index the {sigmas.size} levels of Sigma, got {dual.sigma_choice!r}")
    certified = ~dual.estimator_abstained
    if not np.allclose(dual.sigma[certified], sigmas[dual.sigma_choice[certified]], rtol=1e-6, atol=0.0):
        raise DataError(
            f"certified noise levels differ from Sigma[sigma_choice], got Sigma = {sigmas}: check its order"
        )
