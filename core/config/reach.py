"""How far the draws of a run reach: radii that no certificate of it can exceed, whatever the networks do."""

import math
from contextlib import suppress
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.procedures.confidence import draws_needed, largest_radius
from core.procedures.smoothing import furthest

if TYPE_CHECKING:
    from core.config.run import Config

__all__ = ["check_radii", "more_draws", "reach_of", "stages_of", "uncut_sigma_e"]


def reach_of(config: "Config") -> float:
    """The radius below which all certificates of Dual RS stay, whatever the networks do."""
    return min(max(furthest(sigma, config.sampling(alpha)) for sigma, alpha in group) for group in _limits(config))


def check_radii(config: "Config", others: float = 0.0) -> None:
    """Refuse radii of the report that nothing on it reaches, neither the run nor its other curves (imported logs, up to
    `others`).

    Raises:
        ConfigError: says how many draws they would take.
    """
    asked, num = max(config.report.radii), config.certify.num_estimation
    if asked >= config.reach and asked > others:
        limit = min(max(config.law.limit(sigma) for sigma, _ in group) for group in _limits(config))
        if asked >= limit or config.law.exhaustive:
            raise ConfigError(
                f"report.radii: {asked:g} is asked for, and under noise={config.noise} these sigmas certify no radius"
                f" from {limit:.4g} on, with however many draws; lower report.radii, or raise sigmas"
            )
        where = f"sigma = {max(config.sigmas)}"
        if config.certify.claim == "agreement":
            where += f" and sigma_e = {config.estimator_sigma}"
        raise ConfigError(
            f"certify.num_estimation: {num} draws at {stages_of(config)} certify radii below "
            f"{config.reach:.3f} at {where}, but report.radii asks for {asked:g}; "
            f"{more_draws(config, asked)}, or lower report.radii"
        )


def more_draws(config: "Config", radius: float) -> str:
    """What to do for a `reach` that exceeds a radius."""
    if config.certify.reference:
        return "raise certify.reference.num_draws, and certify.num_estimation with it"
    law, capped = config.law, config.certify.bound == "randomized"  # at what all draws show with probability 1/2
    needed = 0
    for group in _limits(config):
        enough: list[int] = []
        for sigma, alpha in group:
            with suppress(ConfigError):
                enough.append(draws_needed(radius, sigma, 0.5 if capped else alpha, law))
        if not enough:
            return "no number of draws certifies it at these sigmas"
        needed = max(needed, min(enough))
    return f"set certify.num_estimation to at least {needed:,}"


def uncut_sigma_e(config: "Config") -> float | None:
    """The noise level from which on the router's draws cut no radius of claim `agreement`; None where they do not.

    A router that names one level for all images loses what lies between its reach and the class's.
    """
    if config.certify.claim != "agreement" or len(config.sigmas) == 1:
        return None
    num, (router, label) = config.certify.num_estimation, config.stage_alphas
    wanted = largest_radius(max(config.sigmas), num, label, config.law) / largest_radius(1.0, num, router, config.law)
    return None if config.estimator_sigma >= wanted else math.ceil(100 * wanted) / 100


def stages_of(config: "Config") -> str:
    """What the stages of Dual RS spend of alpha, in words."""
    router, label = config.stage_alphas
    return f"{label:g} a stage" if router == label else f"{router:g} (router) and {label:g} (class)"


def _limits(config: "Config") -> tuple[tuple[tuple[float, float], ...], ...]:
    """Stages, as (noise level, alpha), that limit the radius of Dual RS: of each group the furthest one.

    Under claim `agreement` it is min_j max(E_j, R_j) with E_m = 0 for the level m that is picked. R_m is furthest
    at the largest level, and there the smallest one, whose R_j is least, has to be excluded or to answer the same.
    """
    router, label = config.stage_alphas
    top = (max(config.sigmas), label)
    if config.certify.claim == "constant":
        return ((top,),)
    parts = 2 if config.certify.router == "plurality" else 1  # two bounds exclude a level
    return (top,), ((config.estimator_sigma, router / parts), (min(config.sigmas), label))
