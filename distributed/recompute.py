"""Certificates from stored rows: the votes alone, the settings, and no network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.config import Config
from core.dual import join_stages
from core.multiscale import multiscale_certify
from core.records import (
    CLASSIFIER,
    ESTIMATOR,
    AlphaSplit,
    Certificate,
    Counts,
    DualCertificate,
    MultiscaleCertificate,
    Phase,
    Rule,
    Sampling,
    Stop,
)
from core.sequential import Budget, beyond, conclude, second_targets, skipped, stage_order, tie_of
from core.smoothing import certificate

__all__ = ["Terms", "dual_from_row", "multiscale_from_row", "multiscale_from_votes", "standard_from_row"]


@dataclass(frozen=True)
class Terms:
    """What a row was certified under.

    Attributes:
        sampling: draws at most, and the total failure probability.
        budget: `fixed`, `sequential` or `grid`.
        rule: of a sequential budget.
        radii: the grid of `grid`, empty otherwise.
        sigmas: Sigma.
        sigma_e: the estimator's noise level.
        split: how Dual RS spends alpha.
        sigma_share: share of alpha that the estimator's stage spends, where it is divided.
        level_shares: shares of alpha by the level of Multiscale that decides, see `core.multiscale.level_alphas`.
    """

    sampling: Sampling
    budget: Budget
    rule: Rule
    radii: tuple[float, ...]
    sigmas: tuple[float, ...]
    sigma_e: float
    split: AlphaSplit = "halves"
    sigma_share: float = 0.5
    level_shares: tuple[float, ...] = ()

    def stages(self) -> dict[str, Sampling]:
        """Draws and failure probability of each stage of Dual RS."""
        if self.split == "full":
            return {ESTIMATOR: self.sampling, CLASSIFIER: self.sampling}
        alpha = self.sampling.alpha
        level = alpha * self.sigma_share
        label = level if self.sigma_share == 0.5 else math.nextafter(alpha - level, 0.0)
        return {ESTIMATOR: replace(self.sampling, alpha=level), CLASSIFIER: replace(self.sampling, alpha=label)}

    @classmethod
    def of(cls, config: Config, sampling: Sampling, budget: Budget) -> "Terms":
        """The terms of a configuration."""
        certify = config.certify
        return cls(
            sampling=sampling,
            budget=budget,
            rule=Rule(certify.look_every, certify.early_share, certify.futility_z),
            radii=config.grid_radii if budget == "grid" else (),
            sigmas=config.sigmas,
            sigma_e=config.estimator_sigma,
            split=certify.alpha_split,
            level_shares=certify.level_shares,
        )


def standard_from_row(row: Mapping[str, Any], terms: Terms) -> Certificate:
    """The certificate that a row of `CERTIFICATE_SCHEMA` must hold."""
    selection, estimation = _votes(row, "selection"), _votes(row, "estimation")
    if terms.budget == "fixed":
        return certificate(selection, estimation, row["sigma"], terms.sampling)
    return conclude(
        row["sigma"],
        beyond(terms.radii),
        selection,
        estimation,
        row["num_estimation"],
        terms.sampling,
        terms.rule.early_share,
        Stop(row["stop_reason"]),
        grid=terms.budget == "grid",
    )


def dual_from_row(row: Mapping[str, Any], terms: Terms) -> DualCertificate:
    """The certificate that a row of `DUAL_SCHEMA` must hold."""
    stage = terms.stages()
    selection = {ESTIMATOR: _votes(row, "selection", "_sigma"), CLASSIFIER: _votes(row, "selection")}
    estimation = {ESTIMATOR: _votes(row, "estimation", "_sigma"), CLASSIFIER: _votes(row, "estimation")}
    level = {ESTIMATOR: terms.sigma_e, CLASSIFIER: terms.sigmas[int(selection[ESTIMATOR].argmax())]}
    if terms.budget == "fixed":
        first = certificate(selection[ESTIMATOR], estimation[ESTIMATOR], terms.sigma_e, stage[ESTIMATOR])
        label = None
        if not first.abstained:
            label = certificate(selection[CLASSIFIER], estimation[CLASSIFIER], level[CLASSIFIER], stage[CLASSIFIER])
        return join_stages(first, label, terms.sigmas, terms.sampling.alpha)
    grid, ending = terms.budget == "grid", {ESTIMATOR: "_sigma", CLASSIFIER: ""}
    stages: dict[str, Certificate] = {}
    order = stage_order(selection, level)
    for head in order:
        if stages and stages[order[0]].abstained:
            stages[head] = skipped(level[head], selection[head], stage[head])
            continue
        stages[head] = conclude(
            level[head],
            second_targets(terms.radii, stages[order[0]].radius) if stages else beyond(terms.radii),
            selection[head],
            estimation[head],
            row[f"num_estimation{ending[head]}"],
            stage[head],
            terms.rule.early_share,
            Stop(row[f"stop_reason{ending[head]}"]),
            grid=grid,
        )
    return join_stages(stages[ESTIMATOR], stages[CLASSIFIER], terms.sigmas, terms.sampling.alpha, tie_of(order[0]))


def multiscale_from_row(row: Mapping[str, Any], terms: Terms) -> MultiscaleCertificate:
    """The certificate that a row of `MULTISCALE_SCHEMA` must hold."""
    votes = {}
    for phase in (Phase.SELECTION, Phase.ESTIMATION):
        levels = [*row[f"counts_{phase.value}_above"], row[f"counts_{phase.value}"]]
        for sigma, counts in zip(reversed(terms.sigmas), levels, strict=False):
            votes[sigma, phase] = np.asarray(counts, np.int64)
    return multiscale_from_votes(votes, terms)


def multiscale_from_votes(votes: Mapping[tuple[float, Phase], Counts], terms: Terms) -> MultiscaleCertificate:
    """The certificate of the cascade over `terms.sigmas`, from each level's votes.

    Raises:
        ValueError: when the cascade asks for a level that has none.
    """
    procedure = multiscale_certify(terms.sigmas, terms.sampling, terms.level_shares)
    draws = next(procedure)
    while True:
        if (draws.sigma, draws.phase) not in votes:
            raise ValueError(f"the cascade goes on to sigma {draws.sigma:g}, which has no votes")
        try:
            draws = procedure.send({CLASSIFIER: votes[draws.sigma, draws.phase]})
        except StopIteration as stop:
            certificate: MultiscaleCertificate = stop.value
            return certificate


def _votes(row: Mapping[str, Any], phase: str, ending: str = "") -> Counts:
    return np.asarray(row[f"counts_{phase}{ending}"], np.int64)
