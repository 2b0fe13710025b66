"""What the report says of Multiscale: level by level."""

from dataclasses import dataclass

import numpy as np

from core.errors import DataError
from core.report import Floats, Ints, MethodRows, ReportData
from core.report.pages import NONE, Block, Heading, Table, Text

__all__ = ["MultiscaleRows"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MultiscaleRows(MethodRows):
    """Certificates of Multiscale, the cascade over Sigma.

    Attributes:
        sigma: float64 ``(N,)``, the noise level that decided, nan where abstaining.
        sigma_bound: float64 ``(N,)``, the level that bounds the radius, nan where abstaining.
        num_levels: int64 ``(N,)``, levels that were asked, the largest sigma first.
        alpha_levels: what it spends where each level of Sigma decides, ``(K,)``.
    """

    name: str = "Multiscale"
    sigma: Floats
    sigma_bound: Floats
    num_levels: Ints
    alpha_levels: tuple[float, ...]

    def __post_init__(self) -> None:
        MethodRows.__post_init__(self)
        self.check_columns("sigma", "sigma_bound", "num_levels")
        if not (np.array_equal(np.isnan(self.sigma), self.abstained) and np.all(self.num_levels >= 0)):
            raise DataError("Multiscale: sigma must be nan exactly where nothing is certified, num_levels at least 0")

    def level_counts(self, sigmas: Floats) -> tuple[Ints, Ints, Ints]:
        """Examples per sigma, ``(K,)``: asked, certified there, and of these bounded by a level above."""
        above = sigmas.size - 1 - np.arange(sigmas.size)  # levels that come before each one
        asked = (self.num_levels[:, None] > above).sum(axis=0)
        decided = self.sigma[:, None] == sigmas
        capped = decided & (self.sigma_bound > self.sigma)[:, None]
        return asked.astype(np.int64), decided.sum(axis=0).astype(np.int64), capped.sum(axis=0).astype(np.int64)

    def summary(self, data: ReportData) -> str:
        """What it spends."""
        levels = ", ".join(f"{a:g} at {s:g}" for s, a in zip(data.sigmas, self.alpha_levels, strict=True))
        return f"Multiscale spends what the sigma that decides allows: {levels}; the claim holds at alpha."

    def blocks(self, data: ReportData) -> list[Block]:
        """How far down the cascade went."""
        levels = zip(data.sigmas, *self.level_counts(data.sigmas), strict=True)
        lines = [(f"{s:g}", f"{a:,}", f"{d:,}", f"{c:,}") for s, a, d, c in levels][::-1]
        lines.append(("none", NONE, f"{self.abstained.sum():,} abstained", NONE))
        text = (
            "The cascade asks the largest sigma first and goes on where that does not decide. Where a smaller sigma "
            "decides, a level above may bound the radius: it must not decide for another class anywhere in the ball. "
            "All draws of a level are taken, whatever certify.budget says."
        )
        header = ("sigma", "Examples asked", "Decided and certified", "of these bounded by a level above")
        return [Heading("Multiscale, level by level"), Text(text), Table(header, tuple(lines))]
