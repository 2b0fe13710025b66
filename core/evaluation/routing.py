"""What a linear router of noise levels is worth under Gaussian noise once its choice is certified, without a draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from core.agreement_records import Claim, Router
from core.evaluation.metrics import Floats, Ints
from core.law import GAUSSIAN
from core.procedures.confidence import certified_radius, lower_bounds

__all__ = ["Price", "route"]


@dataclass(frozen=True)
class Price:
    """What the choice costs: draws and failure probability of the router's stage. Under the claim `constant` the level
    stays within R_sigma; under `agreement`, by the rule `router`, each other level is excluded within a radius of its
    own.
    """

    num: int
    alpha: float
    claim: Claim = "constant"
    router: Router = "median"


def route(scores: Floats, norms: Floats, levels: Sequence[int], sigmas: Floats, price: Price) -> tuple[Ints, Floats]:
    """The levels that a linear router picks, and how far it excludes each, smoothed at sigma_e = max of the subset.

    The level i with the highest score keeps it against j unless the noise moves the image by d_j = (s_i - s_j) /
    ||w_i - w_j|| along one direction, so that the smoothed router answers j with probability at most Phi(-d_j /
    sigma_e), and i with at least 1 - sum_j of these (a union bound). The radius is what that share of `num` votes
    certifies. R_sigma never exceeds sigma_e Phi^-1(alpha^(1/num)).

    Args:
        scores: ``(N, K)`` of all levels.
        norms: ``(K, K)``, ||w_i - w_j||.
        levels: the subset, places in Sigma.
        sigmas: ``(K,)`` all levels.
        price: what is claimed, and the router's stage.

    Returns:
        ``(N,)`` places in Sigma; ``(N, L)`` float64, for each level of the subset: within what the router does not pick
        it (under `constant`: within what it picks no other one), 0 for the chosen level and where nothing is shown.
    """
    chosen = np.array(levels)
    part = scores[:, chosen]
    best, rows = part.argmax(axis=1), np.arange(len(part))
    gap = part[rows, best][:, None] - part
    slope = norms[np.ix_(chosen, chosen)][best]
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(slope > 0.0, gap / slope, np.inf)
    distance[rows, best] = np.inf
    sigma_e = float(sigmas[chosen].max())
    missed = special.ndtr(-distance / sigma_e)
    whole = missed.sum(axis=1, keepdims=True)
    if price.claim == "constant":
        away = np.broadcast_to(whole, missed.shape)
    elif price.router == "median":  # j is not picked as long as more than half of the votes are on the side of i
        upwards, place = missed[:, ::-1].cumsum(axis=1)[:, ::-1], np.arange(chosen.size)
        away = np.where(place > best[:, None], upwards, missed.cumsum(axis=1))
    else:
        both = (_quantile(whole, price), _quantile(missed, price))
        radius = np.maximum(0.0, float(GAUSSIAN.scale(sigma_e)) / 2 * (both[0] + both[1]))
        radius[rows, best] = 0.0
        return chosen[best], radius
    votes = np.rint(np.maximum(1.0 - away, 0.0) * price.num).astype(np.int64)
    radius = certified_radius(lower_bounds(price.num, price.alpha)[votes], sigma_e)
    radius[rows, best] = 0.0
    return chosen[best], radius


def _quantile(missed: Floats, price: Price) -> Floats:
    """Phi^-1 of the lower bound that this share of misses leaves, at half of alpha: two bounds exclude a level."""
    votes = np.rint(np.maximum(1.0 - missed, 0.0) * price.num).astype(np.int64)
    return np.asarray(special.ndtri(lower_bounds(price.num, price.alpha / 2)[votes]), np.float64)
