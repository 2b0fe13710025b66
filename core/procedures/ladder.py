"""What votes show of a ladder of radii, looked at more than once; and the sampling between two looks.

The parts of which the budgets of `core.procedures.sequential` are made.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from core.errors import ConfigError
from core.procedures.confidence import certified_radius, log_e_value, lower_bounds, probability_of_radius
from core.records import Counts, Draws, Phase, Procedure, Sampling, Stop

__all__ = ["Ladder", "final_alpha", "sample"]

_E_SLACK = 1e-6
"""Added to the log threshold of the e-process: far above the rounding of its terms at a million draws."""


def sample(
    sigma: float,
    most: int,
    look_every: int,
    head: str,
    verdict: Callable[[Counts, int], Stop],
    *,
    ask: tuple[str, ...],
    given: Sequence[Counts] = (),
    others: list[Counts] | None = None,
) -> Procedure[tuple[Counts, int, Stop]]:
    """Estimation votes of one head, looked at every so many draws until `verdict` is not FULL or there are `most`.

    Args:
        sigma: noise level.
        most: the most that is drawn.
        look_every: draws between two looks.
        head: the network that votes.
        verdict: of the votes so far and their number.
        ask: heads to ask at each look, `head` among them; others' votes go to `others`.
        given: votes of looks that are known already (an earlier `others`); they are used before anything is asked.
        others: filled with the other head's votes, a look each.

    Returns:
        The votes, the number of draws, and the last verdict.
    """
    estimation, num, stop = np.zeros((), np.int64), 0, Stop.FULL
    waiting = list(reversed(given))
    while num < most and stop is Stop.FULL:
        step = min(look_every, most - num)
        if waiting:
            votes = waiting.pop()
        else:
            answer = yield Draws(sigma, step, ask, Phase.ESTIMATION, start=num)
            votes = answer[head]
            if others is not None:
                others.append(next(answer[name] for name in answer if name != head))
        estimation, num = estimation + votes, num + step
        stop = verdict(estimation, num)
    return estimation, num, stop


class Ladder:
    """What the successes of an event show of ascending target radii, alpha split between early looks and the last one.

    Args:
        sigma, targets, grid: as for `climb`.
        sampling: draws at most, and the failure probability.
        early_share: the part of it for early looks.
        useful: radius up to which showing anything is of no use: without a grid, what may end the sampling in vain.
    """

    def __init__(
        self,
        sigma: float,
        targets: tuple[float, ...],
        sampling: Sampling,
        early_share: float,
        *,
        grid: bool = False,
        useful: float = 0.0,
    ) -> None:
        if not sampling.plain:
            raise ConfigError("a reference, or the randomised bound, is for budget fixed and claim constant alone")
        sampling = sampling.at(sigma)
        self.sigma, self.targets, self.most, self.grid = sigma, targets, sampling.num_estimation, grid
        self.law = sampling.law
        self.alpha_early = sampling.alpha * early_share if targets else 0.0
        self.bounds = lower_bounds(self.most, final_alpha(sampling.alpha, self.alpha_early), self.law)
        self.p_targets = probability_of_radius(np.asarray(targets, np.float64), sigma, self.law)
        # Votes at the last draw that show each target, and that certify anything of use.
        self.needed = np.searchsorted(self.bounds, self.p_targets, side="left")
        self.certifying = int(np.searchsorted(self.bounds, self.law.cdf(useful / self.law.scale(sigma)), side="right"))

    def verdict(self, successes: int, num: int, z: float) -> Stop:
        """Whether the sampling may end at this look; FULL to go on. `z`: see `Rule.futility_z`."""
        left = self.most - num
        if self.targets and self.shown_early(successes, num) == len(self.targets):
            return Stop.REACHED
        if left and self.grid:
            return self.give_up(successes, num, z)
        return Stop.FUTILE if left and successes + left < self.certifying else Stop.FULL

    def result(self, successes: int, num: int) -> tuple[float, float, float | None]:
        """The lower bound, the radius and the target (see `Certificate`) that the votes show where they ended."""
        targets, shown, last = self.targets, self.shown_early(successes, num), num == self.most
        if self.grid:
            shown = max(shown, int((self.needed <= successes).sum())) if last else shown
            if not shown:
                return 0.0, 0.0, None
            return float(self.p_targets[shown - 1]), targets[shown - 1], targets[shown - 1]
        if targets and shown == len(targets):
            return float(self.p_targets[-1]), targets[-1], targets[-1]
        p_lower = float(self.bounds[successes]) if last else self.lower_bound_early(successes, num)
        radius = min(float(certified_radius(p_lower, self.sigma, self.law)), *targets, math.inf)
        return p_lower, radius, targets[-1] if targets else None

    def shown_early(self, successes: int, num: int) -> int:
        """How many targets, from the bottom and without a gap, the e-process shows."""
        shown = 0
        while shown < len(self.p_targets) and self._crosses(successes, num, shown):
            shown += 1
        return shown

    def lower_bound_early(self, successes: int, num: int) -> float:
        """The largest p0 (to within 1e-9) that the e-process shows; 0.0 if it does not show 1/2.

        Needs no target: the votes of a run that stopped for another alpha's sake certify what they certify.
        """
        if not self.alpha_early or not num or not self._shows(successes, num, 0.5):
            return 0.0
        low, high = 0.5, successes / num  # evidence against p0 falls as p0 rises, and is none at the share of votes
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self._shows(successes, num, middle) else (low, middle)
        return low

    def give_up(self, successes: int, num: int, z: float) -> Stop:
        """Whether the next target is out of reach, or so unlikely that the rule gives up; FULL to go on."""
        following, left = self.shown_early(successes, num), self.most - num
        at_best, needed = successes + left, int(self.needed[following])
        if at_best < needed and not self._crosses(at_best, self.most, following):
            return Stop.FUTILE
        # Normal approximation of the votes to come, a beta-binomial given those that came.
        p = (successes + 0.5) / (num + 1)
        deviation = math.sqrt(left * p * (1 - p) * (1 + left / num))
        return Stop.UNLIKELY if needed - (successes + left * p) > z * deviation else Stop.FULL

    def _crosses(self, successes: int, num: int, index: int) -> bool:
        """Whether the e-process shows p > p_targets[index]; one that rounds to 1 cannot be shown."""
        p0 = float(self.p_targets[index])
        return p0 < 1.0 and self._shows(successes, num, p0)

    def _shows(self, successes: int, num: int, p0: float) -> bool:
        return bool(log_e_value(successes, num, p0) >= math.log(1.0 / self.alpha_early) + _E_SLACK)


def final_alpha(alpha: float, alpha_early: float) -> float:
    """What is left for the look at the last draw; the sum of both never exceeds alpha."""
    return math.nextafter(alpha - alpha_early, 0.0) if alpha_early else alpha
