"""What the report says of the agreement claim: which level binds and by what, and what it cost."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from core.errors import DataError
from core.report import Bools, Floats, Ints, MethodRows, ReportData, RoutedRows
from core.report.pages import NONE, Block, Heading, Table, Text, percent

__all__ = ["CONSTANT", "AgreementRows"]

CONSTANT: Final = "Dual RS, constant level"
"""The published claim, where it is not the one that the run makes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AgreementRows(RoutedRows):
    """Certificates of Dual RS under the agreement claim, min over the levels of max(E, R).

    Attributes:
        radius_constant: float64 ``(N,)``, what the same votes show of the published claim, that the level stays too;
            never above `radius`.
        binding: int64 ``(N,)``, the level that has `radius`, index into Sigma; -1 where abstaining.
        radius_excluded: float64 ``(N, K)``, E, within which the router does not pick each level; 0 for the chosen one.
        radius_class: float64 ``(N, K)``, R, within which the class at each level is the same; 0 where that was not
            asked or not shown.
        alpha_router: what the router spends of alpha.
        draws_router, draws_class, draws_others: int64 ``(N,)``, estimation draws of the router, of the classifier at
            the chosen level, and at the other ones.
    """

    name: str = "Dual RS, agreement"
    radius_constant: Floats
    binding: Ints
    radius_excluded: Floats
    radius_class: Floats
    alpha_router: float
    draws_router: Ints
    draws_class: Ints
    draws_others: Ints

    def __post_init__(self) -> None:
        RoutedRows.__post_init__(self)
        self.check_columns(
            "radius_constant", "sigma", "sigma_choice", "binding", "draws_router", "draws_class", "draws_others"
        )
        shape, num = self.radius_class.shape, self.radius.size
        if self.radius_excluded.shape != shape or len(shape) != 2 or shape[0] != num:
            raise DataError(f"{self.name}: radii by level must be (N, K), got {self.radius_excluded.shape} and {shape}")
        if not (np.array_equal(self.binding == -1, self.abstained) and np.all(self.binding < shape[1])):
            raise DataError(f"{self.name}: binding must be a level where something is certified, and -1 elsewhere")
        if np.any(self.radius_constant > self.radius):
            raise DataError(f"{self.name}: radius_constant is above radius, which no votes can give")

    @property
    def capped(self) -> Bools:
        """Where the router bounds the radius: what it excludes of the binding level reaches further than the class."""
        rows = np.arange(self.radius.size)
        by_router = self.radius_excluded[rows, self.binding] > self.radius_class[rows, self.binding]
        return np.asarray(~self.abstained & by_router)

    def constant_level(self) -> MethodRows:
        """The published claim for the same examples, from the same votes."""
        shown = self.radius_constant > 0.0
        return MethodRows(
            name=CONSTANT,
            correct=self.correct & shown,
            radius=self.radius_constant,
            p_lower=self.p_lower,
            abstained=~shown,
            num_draws=self.num_draws,
        )

    def summary(self, data: ReportData) -> str:
        """What is claimed."""
        return (
            f"{self.name} claims that the class stays, whatever noise level the router picks in the ball, and spends "
            f"{self.alpha_router:g} on the router and {data.alpha - self.alpha_router:g} on the class."
        )

    def blocks(self, data: ReportData) -> list[Block]:
        """Which level binds, by what, and the draws."""
        certified = int((~self.abstained).sum())
        other = self.binding != self.sigma_choice
        lines = []
        for place, sigma in enumerate(data.sigmas):
            here = self.binding == place
            hits = (self.sigma_choice == place, here, here & other, here & self.capped)
            lines.append((f"{sigma:g}", *(f"{hit.sum():,}" for hit in hits)))
        lines.append(("none", "0", f"{self.abstained.sum():,}", NONE, NONE))
        header = ("sigma", "Chosen by the router", "Binds the radius", "of these not the chosen one", "by the router")
        text = (
            "A level matters only within the distance at which the router may pick it, and then only if the classifier "
            f"at it answers otherwise. Of {certified:,} certificates the router binds {self.capped.sum():,}, the class "
            f"the others. The published claim, that the level stays too, has {self.radius_constant.mean():.4f} of the "
            f"mean radius {self.radius.mean():.4f}."
        )
        draws = Text(
            f"Estimation draws per example: {self.draws_router.mean():,.1f} of the router, "
            f"{self.draws_class.mean():,.1f} at the chosen level, {self.draws_others.mean():,.1f} at other levels, "
            f"asked for {percent(float((self.draws_others > 0).mean()))} of the examples."
        )
        return [Heading(f"{self.name}, level by level"), Text(text), Table(header, tuple(lines)), draws]
