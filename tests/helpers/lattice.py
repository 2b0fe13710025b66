"""Exact probabilities of what a sequential certificate does: dynamic programming over (draws, successes).

Two kinds of code go through the same walk: the real generator (`decisions`) and plain crossing rules (`crossing`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from core.procedures.sequential import climb, conclude
from core.records import CLASSIFIER, Certificate, Counts, Rule, Sampling, Stop

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

JUST_BELOW = 1 - 1e-9
"""What a true probability is taken to lie below a bound; far above the rounding of the bounds, far below their gaps."""


def counts(*values: int) -> Counts:
    return np.array(values, np.int64)


def looks(most: int, every: int) -> list[int]:
    """Numbers of draws at which the votes are looked at; the last look is at `most`."""
    return [*range(every, most, every), most]


def walk(p: float, at: Sequence[int], stops: Callable[[int], Bools]) -> Iterator[tuple[int, Floats]]:
    """The number of successes of independent draws, each a success with probability p, stopped at looks.

    Args:
        p: probability of a success.
        at: looks, ascending.
        stops: for a look, which numbers of successes 0 .. num end the walk.

    Yields:
        For each look the number of draws and the probability of ending there with 0 .. num successes; the last look
        ends what is left.
    """
    alive, num = np.ones(1), 0
    for look in at:
        alive = np.convolve(alive, stats.binom.pmf(np.arange(look - num + 1), look - num, p))
        num = look
        ended = stops(num) if look != at[-1] else np.ones(num + 1, np.bool_)
        yield num, np.where(ended, alive, 0.0)
        alive = np.where(ended, 0.0, alive)


def crossing(p: float, at: Sequence[int], claims: Callable[[Counts, int], Bools]) -> float:
    """Probability that a rule claims something at one look or another."""
    verdicts = {num: claims(np.arange(num + 1), num) for num in at}
    return sum(float(mass[verdicts[num]].sum()) for num, mass in walk(p, at, lambda num: verdicts[num]))


@dataclass(frozen=True)
class Setting:
    """Arguments of `climb`."""

    sigma: float
    targets: tuple[float, ...]
    sampling: Sampling
    rule: Rule
    grid: bool = False


def first_step(setting: Setting, rule: Rule, successes: int, num: int) -> Certificate | None:
    """The real `climb`, sent the votes of its first look: its certificate if it ends there, None if it goes on.

    Its decision at a look depends on the votes so far alone, so a first look of `num` draws stands for any look there
    (`test_climb_on_random_paths_decides_as_the_lattice` checks that).
    """
    selection = counts(0, setting.sampling.num_selection)
    args = (setting.sigma, setting.targets, selection, setting.sampling, replace(rule, look_every=num), CLASSIFIER)
    procedure = climb(*args, grid=setting.grid)
    next(procedure)
    try:
        procedure.send({CLASSIFIER: counts(num - successes, successes)})
    except StopIteration as stop:
        certificate: Certificate = stop.value
        return certificate
    return None


Decisions = dict[int, list[Certificate | None]]


def decisions(setting: Setting) -> Decisions:
    """For every look and every reachable number of successes the certificate that ends there, or None."""
    table: Decisions = {}
    alive, last = np.ones(1, np.bool_), 0
    for num in looks(setting.sampling.num_estimation, setting.rule.look_every):
        reachable = np.convolve(alive, np.ones(num - last + 1, np.int64)) > 0
        table[num] = [
            first_step(setting, setting.rule, successes, num) if reachable[successes] else None
            for successes in range(num + 1)
        ]
        alive = reachable & np.array([certificate is None for certificate in table[num]])
        last = num
    assert not alive.any()  # the last look ends everything
    return table


@dataclass(frozen=True)
class Outcomes:
    """The decisions as arrays, to be walked under many true probabilities."""

    setting: Setting
    ended: dict[int, Bools]
    radius: dict[int, Floats]
    reached: dict[int, Bools]

    def expected(self, p: float, value: Callable[[int], Floats]) -> float:
        """Expectation of a function of the state at which the walk ends."""
        return sum(float(mass @ value(num)) for num, mass in walk(p, list(self.ended), self.ended.__getitem__))

    def false_claim(self, p: float) -> float:
        """Probability that the certified radius exceeds the true one, sigma * Phi^-1(p)."""
        truth = max(0.0, self.setting.sigma * float(special.ndtri(p)))
        return self.expected(p, lambda num: (self.radius[num] > truth).astype(np.float64))

    def worst_false_claim(self) -> tuple[float, float]:
        """The largest probability of a false claim over true probabilities where it can peak, and where it peaks."""
        return max((self.false_claim(p), p) for p in self.suspects())

    def suspects(self) -> list[float]:
        """True probabilities just below what may be claimed: that of each radius, and 1/2 itself."""
        claimed = np.unique(np.concatenate(list(self.radius.values())))
        return [0.5, *(special.ndtr(claimed[claimed > 0.0] / self.setting.sigma) * JUST_BELOW).tolist()]

    def mean_draws(self, p: float) -> float:
        """Expected number of draws."""
        return self.expected(p, lambda num: np.full(num + 1, float(num)))

    def concluded_at(self, alpha: float) -> "Outcomes":
        """The same stops, certified for another failure probability from the votes alone."""
        s = self.setting
        sampling, selection = replace(s.sampling, alpha=alpha), counts(0, s.sampling.num_selection)

        def radius(successes: int, num: int) -> float:
            votes = counts(num - successes, successes)
            stop = Stop.FULL if num == sampling.num_estimation else Stop.REACHED
            args = (s.sigma, s.targets, selection, votes, num, sampling, s.rule.early_share, stop)
            return conclude(*args, grid=s.grid).radius

        radii = {
            num: np.array([radius(k, num) if ended[k] else 0.0 for k in range(num + 1)])
            for num, ended in self.ended.items()
        }
        return replace(self, setting=replace(s, sampling=sampling), radius=radii)


def outcomes(setting: Setting) -> Outcomes:
    table = decisions(setting)
    return Outcomes(
        setting,
        {num: np.array([c is not None for c in row]) for num, row in table.items()},
        {num: np.array([c.radius if c else 0.0 for c in row]) for num, row in table.items()},
        {num: np.array([c is not None and c.stop == Stop.REACHED for c in row]) for num, row in table.items()},
    )
