"""The agreement certificate: the votes, what they show of each level, and what is claimed (docs/guarantees.md)."""

from dataclasses import dataclass
from typing import Literal

from core.records import Counts, Outcome, Prediction, Record, Stop

__all__ = [
    "AgreementCertificate",
    "AgreementLevel",
    "AgreementPrediction",
    "AgreementVotes",
    "Claim",
    "Router",
    "StageVotes",
]

Claim = Literal["constant", "agreement"]
"""What a dual certificate says of its ball: the level stays too (as published), or only the class does."""

Router = Literal["median", "plurality"]
"""Which level the smoothed estimator picks at x, with q_j = P[it votes for level j].

`median`: the first level j (in the order of Sigma, ascending) with q_1 + ... + q_j >= 1/2; the last one where there is
none. `plurality`: the level with the largest q_j, as published.
"""


@dataclass(frozen=True, slots=True, eq=False)
class StageVotes(Record):
    """Estimation votes of one stage: int64 per output, without draws whose logits were not finite, of `num` draws, and
    why they ended.
    """

    counts: Counts
    num: int
    stop: Stop


@dataclass(frozen=True, slots=True, eq=False)
class AgreementVotes(Record):
    """All votes of one certificate, which is a function of them.

    Attributes:
        router_selection: the estimator's selection votes; they choose the level m.
        class_selection: the classifier's at m; they choose the class c.
        router: the estimator's estimation votes; SKIPPED where the class was not certified at m.
        classes: the classifier's estimation votes at each level of Sigma, in its order; None where it was not asked.
    """

    router_selection: Counts
    class_selection: Counts
    router: StageVotes
    classes: tuple[StageVotes | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AgreementLevel(Record):
    """What is shown of one level: it does not matter within `radius`.

    Attributes:
        sigma: the level.
        radius_excluded: E, within which the router does not pick it; 0.0 for the level that was chosen.
        radius_class: R, within which the classifier smoothed at it answers the class of the certificate; 0.0 where
            that was not asked or not shown.
        p_lower: lower bound of the class's probability at it.
    """

    sigma: float
    radius_excluded: float
    radius_class: float
    p_lower: float

    @property
    def radius(self) -> float:
        """max(E, R)."""
        return max(self.radius_excluded, self.radius_class)

    @property
    def by(self) -> Literal["router", "class", "nothing"]:
        """What gives `radius`: the router, which is too far from the level, or the class at it."""
        if not self.radius:
            return "nothing"
        return "class" if self.radius_class >= self.radius_excluded else "router"


@dataclass(frozen=True, slots=True, eq=False)
class AgreementCertificate(Outcome):
    """The outcome of `core.procedures.agreement.agreement_certify` for one input.

    With probability at least 1 - alpha over the noise of all stages, if the prediction is not ABSTAIN, then for every
    x' in the open l2 ball of `radius` the classifier smoothed at the level that the router picks at x' predicts
    `prediction`. The level may change inside the ball.

    Attributes:
        prediction: class index, or ABSTAIN.
        radius: the smallest `radius` of `levels`; 0.0 where abstaining.
        radius_constant: what the same votes show of Dual RS's claim, that besides the router picks `sigma` throughout;
            never above `radius`. Each of the two holds with probability 1 - alpha on its own.
        level: m, the level that the selection draws chose, an index into Sigma.
        binding: the level that has `radius`, an index into Sigma; of several the one that was asked first, with a fixed
            budget the chosen one; None where abstaining.
        levels: what is shown of each level, in the order of Sigma.
        router: the rule by which the estimator's votes pick a level.
        sigma_e: noise level of the estimator.
        alpha, alpha_router, alpha_class: total failure probability and its split.
        num_selection: selection draws of each stage.
        num_shared: copies that the estimator and the classifier both read (counted once in `num_draws`).
        votes: what all of this follows from.
    """

    prediction: int
    radius: float
    radius_constant: float
    level: int
    binding: int | None
    levels: tuple[AgreementLevel, ...]
    router: Router
    sigma_e: float
    alpha: float
    alpha_router: float
    alpha_class: float
    num_selection: int
    num_shared: int
    votes: AgreementVotes

    @property
    def sigma(self) -> float:
        """The level that was chosen; the router picks it at the input unless its selection draws were unlucky."""
        return self.levels[self.level].sigma

    @property
    def num_draws(self) -> int:
        """Noisy copies spent on all stages; those that both heads read count once."""
        estimation = self.votes.router.num + sum(stage.num for stage in self.votes.classes if stage)
        return 2 * self.num_selection + estimation - self.num_shared


@dataclass(frozen=True, slots=True, eq=False)
class AgreementPrediction(Record):
    """PREDICT for the routed classifier: the class that every level answers that the router may pick at the input.

    Attributes:
        prediction: class index, or ABSTAIN.
        alpha: failure probability.
        router_counts: the estimator's votes.
        candidates: levels that they do not exclude, indices into Sigma.
        stages: predictions of the candidates in their order, up to the first that does not agree.
    """

    prediction: int
    alpha: float
    router_counts: Counts
    candidates: tuple[int, ...]
    stages: tuple[Prediction, ...]
