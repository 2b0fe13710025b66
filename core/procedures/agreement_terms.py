"""The terms of an agreement certificate, and in which order its stages are asked."""

import math
from dataclasses import dataclass, field
from typing import get_args

from core.agreement_records import Router
from core.errors import ConfigError
from core.law import Law
from core.procedures.confidence import largest_radius
from core.procedures.ladder import Ladder
from core.procedures.routers import against
from core.procedures.sequential import Budget, ascending_grid, check_budget, second_targets
from core.records import CLASSIFIER, Counts, Rule, Sampling, divided

__all__ = ["Agreement", "Near", "others_of"]


@dataclass(frozen=True)
class Agreement:
    """The terms of an agreement certificate.

    Attributes:
        sigmas: Sigma, in the order of the estimator's outputs; ascending for the median router.
        sigma_e: noise level of the estimator; any.
        sampling: draws of each stage at most; alpha is the total failure probability.
        router: how the estimator's votes pick a level.
        budget: `fixed`, all draws of every stage that is asked; `sequential`, stop where nothing more is to be gained;
            `grid`, decide only which of `radii` the radius exceeds. The plurality router takes all of its draws.
        rule: when a budget other than `fixed` looks and gives up.
        radii: the grid, ascending.
        router_share: the part of alpha that the router spends, in (0, 1); the class spends the rest.

    Raises:
        ConfigError: for a router or a budget that there is not, levels that are not ascending under the median router,
            or a grid that is none.
    """

    sigmas: tuple[float, ...]
    sigma_e: float
    sampling: Sampling
    router: Router = "median"
    budget: Budget = "fixed"
    rule: Rule = field(default_factory=Rule)
    radii: tuple[float, ...] = ()
    router_share: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (("router", get_args(Router)), ("budget", get_args(Budget))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not 0.0 < self.router_share < 1.0:
            raise ConfigError(f"router_share must lie in (0, 1), got {self.router_share!r}")
        if self.router == "median" and list(self.sigmas) != sorted(set(self.sigmas)):
            raise ConfigError(
                f"the median router needs ascending sigmas, got {self.sigmas}; sort them, and the estimator's outputs "
                "with them, or use router 'plurality'"
            )
        check_budget(self.budget, self.sampling.law)
        if self.budget == "grid":
            ascending_grid(self.radii)

    @property
    def stages(self) -> dict[str, Sampling]:
        """What the router may spend, and what the class may."""
        return divided(self.sampling, self.router_share)

    def targets(self, reached: float, useful: float) -> tuple[float, ...]:
        """Radii that a stage may show early: it has only to show what was reached, beyond what is known anyway."""
        if self.budget == "fixed":
            return ()
        radii = self.radii if self.budget == "grid" else ()
        return tuple(target for target in second_targets(radii, reached) if target > useful)

    def ladder(self, head: str, sigma: float, targets: tuple[float, ...], useful: float = 0.0) -> Ladder:
        """What the votes of a stage show of the targets."""
        grid = self.budget == "grid"
        return Ladder(sigma, targets, self.stages[head], self.rule.early_share, grid=grid, useful=useful)


def others_of(chosen: int, num_levels: int) -> list[int]:
    """The levels but one, ascending."""
    return [place for place in range(num_levels) if place != chosen]


class Near:
    """What the selection votes say of the order of asking; no bound, and with a fixed budget or plurality nothing.

    Attributes:
        places: levels that the router is likely to pick within the radius that the class may reach.
        goal: that radius; infinite without such levels.
        likely: how far the router can be expected to stay off each level, at best.
        at_sigma_e: the level, likely to be asked, whose class reads the router's copies.
    """

    def __init__(self, terms: Agreement, chosen: int, router: Counts, classes: Counts) -> None:
        self.places, self.goal, self.likely = list[int](), math.inf, dict[int, float]()
        if terms.budget != "fixed" and terms.router == "median":
            sigma, stage = terms.sigmas[chosen], terms.stages[CLASSIFIER]
            most = largest_radius(sigma, stage.num_estimation, stage.alpha, stage.law)
            goal = min(most, _at_best(int(classes.max()), classes, sigma, stage.law))
            for place in others_of(chosen, len(terms.sigmas)):
                self.likely[place] = _at_best(against(router, chosen, place), router, terms.sigma_e, stage.law)
            self.places = [place for place, likely in self.likely.items() if likely < goal]
            self.goal = terms.targets(goal, 0.0)[-1] if self.places else math.inf
        alike = (place for place in (chosen, *self.places) if terms.sigmas[place] == terms.sigma_e)
        self.at_sigma_e = next(alike, None)


def _at_best(votes: int, counts: Counts, sigma: float, law: Law) -> float:
    """The radius of a share of votes and one standard deviation more."""
    num = int(counts.sum())
    p = (votes + 0.5) / (num + 1)
    best = min(1.0, p + math.sqrt(p * (1 - p) / max(1, num)))
    return max(0.0, float(law.scale(sigma) * law.quantile(best)))
