"""Sequential certification: the guarantee of a fixed number of draws, with fewer of them where they decide sooner.

The estimation votes are looked at every so many draws. An e-process (`log_e_value` in `confidence`), at a share of
alpha, may show a target radius early; one Clopper-Pearson look at the last draw has the rest of alpha. Stopping short
of a target only gives up radius, so giving up may follow any rule and costs nothing of alpha.

In Dual RS the radius is min(R_sigma, R_c). The stage that looks tighter on its selection draws gets its full budget
and all of its alpha in one look; the other one has only to show the same radius.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from core.errors import ConfigError
from core.law import Law
from core.procedures.dual import dual_certify, join_stages, selection_heads
from core.procedures.ladder import Ladder, sample
from core.procedures.smoothing import certify
from core.records import (
    ABSTAIN,
    CLASSIFIER,
    ESTIMATOR,
    AlphaSplit,
    Bound,
    Certificate,
    Counts,
    Draws,
    DualCertificate,
    Phase,
    Procedure,
    Rule,
    Sampling,
    Stop,
    stage_sampling,
)

__all__ = [
    "Budget",
    "ascending_grid",
    "beyond",
    "certify_sequential",
    "check_budget",
    "climb",
    "conclude",
    "dual_certify_sequential",
    "dual_procedure",
    "second_targets",
    "skipped",
    "stage_order",
    "standard_procedure",
    "tie_of",
]

Budget = Literal["fixed", "sequential", "grid"]


def beyond(radii: Sequence[float]) -> tuple[float, ...]:
    """Targets a hair beyond each radius of a grid, so that a certificate counts as "radius > r"."""
    return tuple(radius + 2.0**-30 for radius in radii)


def climb(
    sigma: float,
    targets: Sequence[float],
    selection: Counts,
    sampling: Sampling,
    rule: Rule,
    head: str,
    *,
    grid: bool = False,
    ask: tuple[str, ...] | None = None,
    given: Sequence[Counts] = (),
    others: list[Counts] | None = None,
) -> Procedure[Certificate]:
    """Certify the class that `selection` chose, as far up a ladder of radii as it goes.

    Targets are shown in ascending order, each only after the one below it. A false claim therefore needs the e-process
    of the lowest target that is not true to cross, or the last look to err: alpha in all, however many targets.

    Args:
        sigma: noise level.
        targets: ascending radii > 0 that may be claimed early; larger radii than the last one are of no use. None at
            all: no early claim, and all of alpha for the look at the last draw.
        selection: votes of the selection draws.
        sampling: draws and failure probability of this stage; `num_estimation` is the most that is drawn.
        rule: when to look and when to give up.
        head: the network that votes.
        grid: whether nothing but the targets is of interest: the radius is then one of them, and the rule's futility
            gives up on the next one. Otherwise the last look certifies any radius up to the last target, and only the
            prospect of certifying nothing at all ends the sampling.
        ask: see `sample`; `head` alone unless given.
        given: see `sample`.
        others: see `sample`.
    """
    top_class, most = int(selection.argmax()), sampling.num_estimation
    ladder = Ladder(sigma, tuple(targets), sampling, rule.early_share, grid=grid)

    def verdict(votes: Counts, num: int) -> Stop:
        return ladder.verdict(int(votes[top_class]), num, rule.futility_z)

    estimation, num, stop = yield from sample(
        sigma, most, rule.look_every, head, verdict, ask=ask or (head,), given=given, others=others
    )
    return conclude(sigma, targets, selection, estimation, num, sampling, rule.early_share, stop, grid=grid)


def conclude(
    sigma: float,
    targets: Sequence[float],
    selection: Counts,
    estimation: Counts,
    num: int,
    sampling: Sampling,
    early_share: float,
    stop: Stop,
    *,
    grid: bool = False,
) -> Certificate:
    """The certificate that the votes give at the point where the sampling ended; see `climb`.

    A function of the final votes alone, so that stored counts are enough to check a certificate.
    """
    top_class = int(selection.argmax())
    ladder = Ladder(sigma, tuple(targets), sampling, early_share, grid=grid)
    p_lower, radius, target = ladder.result(int(estimation[top_class]), num)
    return Certificate(
        prediction=top_class if radius > 0.0 else ABSTAIN,
        radius=radius,
        p_lower=p_lower,
        sigma=sigma,
        num_selection=sampling.num_selection,
        num_estimation=num,
        counts_selection=selection,
        counts_estimation=estimation,
        alpha=sampling.alpha,
        stop=stop,
        alpha_early=ladder.alpha_early,
        target=target,
        law=sampling.law,
    )


def certify_sequential(
    sigma: float, sampling: Sampling, rule: Rule, radii: Sequence[float] = ()
) -> Procedure[Certificate]:
    """CERTIFY that stops as soon as it can only abstain; otherwise draw by draw the fixed one. With `radii`, a grid, it
    decides no more than which of them are exceeded.
    """
    selection = (yield Draws(sigma, sampling.num_selection, (CLASSIFIER,), Phase.SELECTION))[CLASSIFIER]
    return (yield from climb(sigma, beyond(radii), selection, sampling, rule, CLASSIFIER, grid=len(radii) > 0))


def dual_certify_sequential(
    sigmas: Sequence[float],
    sigma_e: float,
    sampling: Sampling,
    rule: Rule,
    radii: Sequence[float] = (),
    split: AlphaSplit = "halves",
) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY with early stopping; the same claim and the same alpha as `core.procedures.dual.dual_certify`. With
    `radii`, a grid, only which of them the radius exceeds is decided.

    Which stage goes first is decided on selection draws, so it is independent of both stages' estimation draws. Where
    the classifier goes first and the estimator then abstains, the classifier's draws were in vain: never more than both
    stages in full, but more than `dual_certify`, which asks the estimator first.
    """
    stage = stage_sampling(sampling, split)
    heads = selection_heads(sigmas, sigma_e)
    first_votes = yield Draws(sigma_e, stage.num_selection, heads, Phase.SELECTION)
    selection = {ESTIMATOR: first_votes[ESTIMATOR]}
    level = {ESTIMATOR: sigma_e, CLASSIFIER: sigmas[int(selection[ESTIMATOR].argmax())]}
    shared = level[CLASSIFIER] == sigma_e
    if shared:
        selection[CLASSIFIER] = first_votes[CLASSIFIER]
    else:
        draws = Draws(level[CLASSIFIER], stage.num_selection, (CLASSIFIER,), Phase.SELECTION)
        selection[CLASSIFIER] = (yield draws)[CLASSIFIER]

    first, second = stage_order(selection, level, stage.law)
    others: list[Counts] = []
    stages: dict[str, Certificate] = {}
    stages[first] = yield from climb(
        level[first],
        beyond(radii),
        selection[first],
        stage,
        rule,
        first,
        grid=len(radii) > 0,
        ask=heads if shared else None,
        others=others if shared else None,
    )
    if stages[first].abstained:
        stages[second] = skipped(level[second], selection[second], stage)
    else:
        wanted = second_targets(radii, stages[first].radius)
        stages[second] = yield from climb(
            level[second], wanted, selection[second], stage, rule, second, grid=len(radii) > 0, given=others
        )
    return join_stages(stages[ESTIMATOR], stages[CLASSIFIER], sigmas, sampling.alpha, tie_of(first))


def stage_order(selection: Mapping[str, Counts], level: Mapping[str, float], law: Law) -> tuple[str, str]:
    """The stage that looks tighter on its selection votes first; a tie starts with the estimator."""
    first, second = sorted((ESTIMATOR, CLASSIFIER), key=lambda head: _guess(selection[head], level[head], law))
    return first, second


def second_targets(radii: Sequence[float], first_radius: float) -> tuple[float, ...]:
    """What the second stage has to show: the first one's radius, or the grid up to it."""
    return tuple(target for target in beyond(radii) if target <= first_radius) or (first_radius,)


def tie_of(first: str) -> Bound:
    """Which stage bounds equal radii: the first one, since the second was not asked for more."""
    return Bound.SIGMA if first == ESTIMATOR else Bound.CLASS


def _guess(selection: Counts, sigma: float, law: Law) -> float:
    """A rough radius from selection votes, to order the stages by."""
    p = (selection.max() + 0.5) / (selection.sum() + 1.0)
    return float(law.scale(sigma) * law.quantile(p))


def skipped(sigma: float, selection: Counts, sampling: Sampling) -> Certificate:
    """An abstention without estimation draws: the other stage had abstained."""
    return conclude(sigma, (), selection, np.zeros_like(selection), 0, sampling, 0.0, Stop.SKIPPED)


def standard_procedure(
    budget: Budget, sigma: float, sampling: Sampling, rule: Rule, radii: Sequence[float]
) -> Procedure[Certificate]:
    """CERTIFY with the budget that a configuration names; `radii` is the grid of `grid`."""
    if budget == "fixed":
        return certify(sigma, sampling)
    check_budget(budget, sampling.law)
    return certify_sequential(sigma, sampling, rule, ascending_grid(radii) if budget == "grid" else ())


def dual_procedure(
    budget: Budget,
    sigmas: Sequence[float],
    sigma_e: float,
    sampling: Sampling,
    rule: Rule,
    radii: Sequence[float],
    split: AlphaSplit = "halves",
) -> Procedure[DualCertificate]:
    """DUAL-CERTIFY with the budget that a configuration names; `radii` is the grid of `grid`."""
    if budget == "fixed":
        return dual_certify(sigmas, sigma_e, sampling, split)
    check_budget(budget, sampling.law)
    grid = ascending_grid(radii) if budget == "grid" else ()
    return dual_certify_sequential(sigmas, sigma_e, sampling, rule, grid, split)


def check_budget(budget: Budget, law: Law) -> None:
    """Refuse to stop early where nothing is drawn at random."""
    if law.exhaustive and budget != "fixed":
        raise ConfigError(
            f"this noise has a fixed number of copies, and all are needed: budget must be 'fixed', got {budget!r}"
        )


def ascending_grid(radii: Sequence[float]) -> Sequence[float]:
    """The grid of the budget `grid`; raises ConfigError where it is none."""
    ascending = sorted({float(radius) for radius in radii})
    if not ascending or ascending != [float(radius) for radius in radii] or ascending[0] < 0.0:
        raise ConfigError(f"budget 'grid' needs ascending radii >= 0, got {list(radii)}")
    return ascending
