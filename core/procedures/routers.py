"""Smoothed routers: which expert votes pick, and how far the router is from picking another one."""

from typing import get_args

import numpy as np

from core.agreement_records import Router
from core.errors import ConfigError
from core.law import Law
from core.procedures.composition import RouterCertificate
from core.procedures.confidence import bound_and_radius, radius_of_two_bounds
from core.records import Certificate, Counts, Stop

__all__ = ["against", "choose_level", "plurality_radius", "smoothed_router"]


def choose_level(votes: Counts, router: Router) -> int:
    """The level that selection votes name: the router's own rule, on those that are finite."""
    if router == "plurality":
        return int(votes.argmax())
    return int(np.searchsorted(2 * votes.cumsum(), votes.sum()))


def against(votes: Counts, chosen: int, place: int) -> int:
    """Votes that keep the median router off level `place`: below it, or above it, on the side of the chosen level.

    A draw without a vote is on neither side.
    """
    return int(votes[:place].sum() if chosen < place else votes[place + 1 :].sum())


def plurality_radius(votes: Counts, chosen: int, place: int, num: int, alpha: float, sigma: float, law: Law) -> float:
    """E of a level under the plurality router: `radius_of_two_bounds`, half of alpha each; a draw without a vote is one
    for it. For the chosen level, within what it stays: as if all others were one, no more than any of them alone.
    """
    own = int(votes[chosen])
    off = own if place == chosen else int(votes.sum() - votes[place])
    return radius_of_two_bounds(own, off, num, alpha / 2, sigma, law)


def smoothed_router(certificate: Certificate, router: Router = "median") -> RouterCertificate:
    """How far a smoothed router is from picking each expert, from the votes of its own certificate.

    Args:
        certificate: of `SmoothedClassifier(router, num_experts, sigma_e)`, all of its draws taken. Its selection draws
            name the choice, its estimation draws bound the others at its alpha.
        router: how its votes pick an expert; the median goes by the order of the experts, whatever that is.

    Raises:
        ConfigError: for a rule that there is not, a certificate that stopped early (its votes were looked at for
            another question), or one for a reference (its votes are those of another network).
    """
    if router not in get_args(Router):
        raise ConfigError(f"router must be one of {get_args(Router)}, got {router!r}")
    if certificate.alpha_early or certificate.stop is not Stop.FULL:
        raise ConfigError(
            "a router's certificate must have all of its draws (budget 'fixed'), got one made to stop early "
            f"(stop {certificate.stop.value!r})"
        )
    if certificate.num_reference:
        raise ConfigError("a router's certificate must be for the network that votes, got one for a reference")
    votes, num = certificate.counts_estimation, certificate.num_estimation
    alpha, sigma, law = certificate.alpha, certificate.sigma, certificate.law
    chosen = choose_level(certificate.counts_selection, router)

    def excluded(place: int) -> float:
        if router == "median":
            return bound_and_radius(against(votes, chosen, place), num, alpha, sigma, law)[1]
        return plurality_radius(votes, chosen, place, num, alpha, sigma, law)

    reach = tuple(0.0 if place == chosen else excluded(place) for place in range(len(votes)))
    return RouterCertificate(chosen, reach, law.norm, alpha, certificate.num_draws)
