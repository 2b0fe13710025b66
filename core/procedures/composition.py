"""The composition: a router and its experts, whatever proves their radii.

The router cannot pick expert j within E_j, expert j answers c within R_j: then the routed classifier answers c within

    T = min over j of max(E_j, R_j).

Nothing but radii in one norm goes into it, so that smoothed and deterministic experts and routers compose. Theorem,
proof, and why failure probabilities add along one pair (E_j, R_j) only: "Composition" in docs/guarantees.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.errors import ConfigError
from core.law import Norm
from core.records import ABSTAIN, Outcome

__all__ = ["Answer", "Composition", "Radius", "RoutedCertificate", "RouterCertificate", "Unasked", "compose", "route"]


@dataclass(frozen=True, slots=True)
class Radius:
    """A certified radius.

    Attributes:
        value: the claim holds in the open ball of it; 0.0 where nothing is shown, infinite where it always holds.
        norm: of the ball.
        alpha: probability that `value` is beyond the true radius; 0.0 for a deterministic one.
    """

    value: float
    norm: Norm
    alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class Composition:
    """What `compose` shows: with probability at least 1 - alpha, `radius` is not beyond the true T.

    Attributes:
        radius: min over j of max(E_j, R_j).
        norm: of the ball.
        alpha: the largest sum of the two failure probabilities of any one expert.
        binding: the first j that has `radius`.
    """

    radius: float
    norm: Norm
    alpha: float
    binding: int


def compose(excluded: Sequence[Radius], answered: Sequence[Radius]) -> Composition:
    """The certified radius of a routed classifier.

    The class, and whatever else these radii speak of, must be fixed before anything is drawn that a bound is made of.
    Nothing has to be independent.

    Args:
        excluded: E_j, within which the router does not pick expert j; 0 for the one that it picks.
        answered: R_j, within which expert j answers the class.

    Raises:
        ConfigError: for radii in different norms, below 0 or not a number, none, or unequal numbers of them.
    """
    if not excluded or len(excluded) != len(answered):
        raise ConfigError(
            f"got {len(excluded)} radii of the router and {len(answered)} of experts, expected one of each per expert"
        )
    norms = {radius.norm for radius in (*excluded, *answered)}
    if len(norms) > 1:
        raise ConfigError(
            f"got radii in the norms {', '.join(sorted(norms))}: certify the router and all experts in one norm"
        )
    for radius in (*excluded, *answered):
        if not (radius.value >= 0.0 and 0.0 <= radius.alpha < 1.0):
            raise ConfigError(f"a radius must be at least 0 and its alpha lie in [0, 1), got {radius}")
    reach = [max(e.value, r.value) for e, r in zip(excluded, answered, strict=True)]
    least = min(reach)
    alpha = max(_sum_up(e.alpha, r.alpha) for e, r in zip(excluded, answered, strict=True))
    return Composition(least, norms.pop(), alpha, reach.index(least))


def _sum_up(a: float, b: float) -> float:
    """A + b, rounded up where it is not exact."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)  # exactly what rounding took away (Knuth's two-sum)
    return math.nextafter(total, math.inf) if lost > 0 else total


class Answer(Protocol):
    """The certificate of one expert: `core.Certificate`, `core.LipschitzCertificate`, `Unasked`, or one of your own.

    With probability at least 1 - `alpha`, given what its class was chosen by, the expert answers `prediction` (unless
    that is ABSTAIN) everywhere in the open ball of `radius` in `norm`.
    """

    @property
    def prediction(self) -> int: ...  # noqa: D102
    @property
    def radius(self) -> float: ...  # noqa: D102
    @property
    def norm(self) -> Norm: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def num_draws(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Unasked:
    """Stands for an expert that was not asked, since its answer could not have raised the radius: it shows nothing.

    Attributes:
        alpha: what it would have spent: where what was seen decides who is asked, the probability of failure allows for
            its asking.
        norm: of the others.
    """

    alpha: float
    norm: Norm = "l2"
    prediction: int = ABSTAIN
    radius: float = 0.0
    num_draws: int = 0


@dataclass(frozen=True, slots=True)
class RouterCertificate:
    """How far a router is from picking each of its experts.

    Attributes:
        choice: the expert that it picks at the input; for a smoothed router the one that its selection draws name.
        excluded: E_j for every expert, each wrong with probability at most `alpha`; 0.0 for `choice`.
        norm: of these radii.
        alpha: failure probability; 0.0 for a deterministic router.
        num_draws: noisy copies spent.
    """

    choice: int
    excluded: tuple[float, ...]
    norm: Norm
    alpha: float = 0.0
    num_draws: int = 0


@dataclass(frozen=True, slots=True)
class RoutedCertificate(Outcome):
    """The outcome of `route` for one input.

    With probability at least 1 - alpha over all noise, if the prediction is not ABSTAIN, then for every x' in the open
    ball of `radius` the expert that the router picks at x' answers `prediction`. The router may pick another one there.

    Attributes:
        prediction: class index, or ABSTAIN.
        radius: min over the experts of max(`excluded`, `answered`); 0.0 where abstaining.
        norm: of the ball.
        alpha: failure probability: the router's and the expert's, for the expert where that is most.
        choice: the expert that the router's certificate names.
        binding: the expert that has `radius`; None where abstaining.
        excluded, answered: E_j and R_j of each expert.
        num_draws: noisy copies spent by the router and all experts that were asked.
    """

    prediction: int
    radius: float
    norm: Norm
    alpha: float
    choice: int
    binding: int | None
    excluded: tuple[float, ...]
    answered: tuple[float, ...]
    num_draws: int


def route(router: RouterCertificate, experts: Sequence[Answer]) -> RoutedCertificate:
    """Compose the certificates that a router and its experts have for one input.

    The class is the one that the chosen expert's certificate names; one for another class shows nothing of it.

    Args:
        router: of a deterministic router (`LipschitzCertificate.as_router`) or a smoothed one (`smoothed_router`).
        experts: a certificate from each expert for the same input, in the order of the router's outputs.

    Raises:
        ConfigError: as `compose`, and where the chosen expert was not asked.
    """
    if not 0 <= router.choice < len(experts):
        raise ConfigError(
            f"the router picks expert {router.choice} of {len(router.excluded)}, got {len(experts)} experts"
        )
    own = experts[router.choice]
    if isinstance(own, Unasked):
        raise ConfigError(f"expert {router.choice}, the one that the router picks, was not asked: certify it first")
    excluded = [
        Radius(0.0 if j == router.choice else value, router.norm, 0.0 if j == router.choice else router.alpha)
        for j, value in enumerate(router.excluded)
    ]
    answered = [
        Radius(expert.radius if expert.prediction == own.prediction != ABSTAIN else 0.0, expert.norm, expert.alpha)
        for expert in experts
    ]
    composed = compose(excluded, answered)
    return RoutedCertificate(
        prediction=own.prediction if composed.radius > 0.0 else ABSTAIN,
        radius=composed.radius,
        norm=composed.norm,
        alpha=composed.alpha,
        choice=router.choice,
        binding=composed.binding if composed.radius > 0.0 else None,
        excluded=tuple(radius.value for radius in excluded),
        answered=tuple(radius.value for radius in answered),
        num_draws=router.num_draws + sum(expert.num_draws for expert in experts),
    )
