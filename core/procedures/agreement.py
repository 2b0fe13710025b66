"""The agreement certificate: the class stays throughout a ball, whatever level the router picks in it.

Dual RS wants the level to stay. The class needs less: a level matters at a distance only if the router can pick it
within that distance, and then only if the classifier at that level would answer otherwise. So each level j has

    E_j, within which the router does not pick it, and
    R_j, within which the classifier smoothed at it answers c,

and the radius is what `core.procedures.composition` makes of them. docs/guarantees.md holds the theorem, its proof, and
why alpha needs no correction for the number of levels. Levels are counted from 0 here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from core.agreement_records import (
    AgreementCertificate,
    AgreementLevel,
    AgreementPrediction,
    AgreementVotes,
    Router,
    StageVotes,
)
from core.procedures.agreement_terms import Agreement, Near, others_of
from core.procedures.composition import Composition, Radius, compose
from core.procedures.confidence import binomial_p_value
from core.procedures.dual import selection_heads
from core.procedures.ladder import sample
from core.procedures.routers import against, choose_level, plurality_radius
from core.procedures.sequential import beyond
from core.procedures.smoothing import predict
from core.records import ABSTAIN, CLASSIFIER, ESTIMATOR, Counts, Draws, Phase, Prediction, Procedure, Sampling, Stop

__all__ = ["Agreement", "agreement_certify", "agreement_from_votes", "agreement_predict", "choose_level"]


Verdict = Callable[[Counts, int], Stop]
VotesOf = Callable[[int | None, Verdict], Procedure[StageVotes]]
"""Gets the estimation votes of a stage: of the classifier at a level, or of the router (None)."""


def agreement_certify(terms: Agreement) -> Procedure[AgreementCertificate]:
    """CERTIFY the routed classifier; see `AgreementCertificate` for what is promised.

    Where the chosen level is sigma_e itself, both heads read the same (denoised) copies, as in DUAL-CERTIFY.
    """
    sigmas, sigma_e, num = terms.sigmas, terms.sigma_e, terms.sampling.num_selection
    heads = selection_heads(sigmas, sigma_e)
    selection = yield Draws(sigma_e, num, heads, Phase.SELECTION)
    level = choose_level(selection[ESTIMATOR], terms.router)
    if sigmas[level] != sigma_e:
        selection = {**selection, **(yield Draws(sigmas[level], num, (CLASSIFIER,), Phase.SELECTION))}
    near, others = Near(terms, level, selection[ESTIMATOR], selection[CLASSIFIER]), list[Counts]()

    def drawn(place: int | None, verdict: Verdict) -> Procedure[StageVotes]:
        head, sigma = (ESTIMATOR, sigma_e) if place is None else (CLASSIFIER, sigmas[place])
        shared = near.at_sigma_e is not None and place in (None, near.at_sigma_e)
        both = shared and not others  # the first of the two has both networks vote, the second begins with that
        most = terms.sampling.at(sigma).num_estimation
        votes = yield from sample(
            sigma,
            most,
            most if terms.budget == "fixed" else terms.rule.look_every,
            head,
            verdict,
            ask=heads if both else (head,),
            given=() if both or not shared else tuple(others),
            others=others if both else None,
        )
        return StageVotes(*votes)

    return (yield from _statement(terms, level, near, selection[ESTIMATOR], selection[CLASSIFIER], drawn))


def agreement_from_votes(terms: Agreement, votes: AgreementVotes) -> AgreementCertificate:
    """The certificate that stored votes give under `terms`, whatever terms they were drawn for.

    A stage that these terms ask for and that was not drawn shows nothing; one that they do not ask for is not used. Why
    one ended is what these terms say of its votes, where they would have ended it there.
    """
    chosen = choose_level(votes.router_selection, terms.router)
    near = Near(terms, chosen, votes.router_selection, votes.class_selection)

    def stored(place: int | None, verdict: Verdict) -> Procedure[StageVotes]:
        yield from ()  # nothing is drawn
        known = votes.router if place is None else votes.classes[place]
        if known is None or not known.num:
            return known or _nothing(votes.class_selection)
        stop, sigma = verdict(known.counts, known.num), terms.sigma_e if place is None else terms.sigmas[place]
        ended = stop is not Stop.FULL or known.num == terms.sampling.at(sigma).num_estimation
        return replace(known, stop=stop if ended else known.stop)

    statement = _statement(terms, chosen, near, votes.router_selection, votes.class_selection, stored)
    try:
        next(statement)
    except StopIteration as end:
        certificate: AgreementCertificate = end.value
        return certificate
    raise AssertionError("stored votes asked for draws")


def _statement(
    terms: Agreement, chosen: int, near: Near, router_selection: Counts, class_selection: Counts, votes_of: VotesOf
) -> Procedure[AgreementCertificate]:
    """The statement: gets the votes of one stage after the other, and says what they show together.

    Another level is asked only where the router may pick it within the radius reached so far, and has only to show that
    radius. In which order does not matter for a fixed budget; otherwise levels that the router is seen to pick near by
    go first, for where their class is the same the router need not be bounded away from them.
    """
    c = int(class_selection.argmax())
    num_levels, grid = len(terms.sigmas), terms.budget == "grid"
    classes: list[StageVotes | None] = [None] * num_levels
    bounds, radii = [0.0] * num_levels, [0.0] * num_levels
    alphas, norm = {head: stage.alpha for head, stage in terms.stages.items()}, terms.sampling.law.norm
    others = others_of(chosen, num_levels)

    def ask(place: int, targets: tuple[float, ...], useful: float = 0.0) -> Procedure[None]:
        ladder = terms.ladder(CLASSIFIER, terms.sigmas[place], targets, useful)
        z = terms.rule.futility_z
        votes = yield from votes_of(place, lambda counts, num: ladder.verdict(_agreeing(counts, c), num, z))
        classes[place] = votes
        bounds[place], radii[place], _ = ladder.result(_agreeing(votes.counts, c), votes.num)

    router, excluded, constant = _nothing(router_selection), [0.0] * num_levels, 0.0

    def route(reached: float) -> Procedure[None]:
        nonlocal router, excluded, constant
        places = [place for place in others if radii[place] < reached]
        if places or not near.places:
            reach = _Reach(terms, chosen, terms.targets(reached, 0.0), places)
            router = yield from votes_of(None, reach.verdict)
            excluded, constant = reach.radii(router)

    reached = near.goal

    def composed(places: Sequence[int]) -> Composition:
        return compose(
            [Radius(excluded[place], norm, 0.0 if place == chosen else alphas[ESTIMATOR]) for place in places],
            [Radius(radii[place], norm, alphas[CLASSIFIER]) for place in places],
        )

    for place in near.places:
        yield from ask(place, terms.targets(reached, 0.0))
        reached = min(reached, max(radii[place], near.likely[place]))
    doubtful = any(radii[place] < reached for place in near.places)
    if doubtful:  # the class there may be another one
        yield from route(reached)
        reached = min(reached, composed(near.places).radius)
    classes[chosen] = _nothing(class_selection)
    if reached:
        yield from ask(chosen, terms.targets(reached, 0.0) if near.places else beyond(terms.radii) if grid else ())
        reached = min(reached, radii[chosen])
    if reached and not doubtful:
        yield from route(reached)

    seen = [*near.places, chosen]
    for place in sorted((each for each in others if each not in seen), key=excluded.__getitem__):
        reached = composed(seen).radius
        if excluded[place] < reached:
            yield from ask(place, terms.targets(reached, excluded[place]), excluded[place])
        seen.append(place)
    joint = composed(seen)
    radius = joint.radius
    return AgreementCertificate(
        prediction=c if radius > 0.0 else ABSTAIN,
        radius=radius,
        radius_constant=min(constant, radii[chosen]),
        level=chosen,
        binding=seen[joint.binding] if radius > 0.0 else None,
        levels=tuple(map(AgreementLevel, terms.sigmas, excluded, radii, bounds)),
        router=terms.router,
        sigma_e=terms.sigma_e,
        alpha=terms.sampling.alpha,
        alpha_router=alphas[ESTIMATOR],
        alpha_class=alphas[CLASSIFIER],
        num_selection=terms.sampling.num_selection,
        num_shared=_num_shared(terms, chosen, near, router, classes),
        votes=AgreementVotes(router_selection, class_selection, router, tuple(classes)),
    )


def _agreeing(votes: Counts, c: int) -> int:
    """Votes of any level for the one class that is certified."""
    return int(votes[c])


class _Reach:
    """How far the router cannot reach each level, from one stream of votes."""

    def __init__(self, terms: Agreement, chosen: int, targets: tuple[float, ...], places: Sequence[int]) -> None:
        self.terms, self.chosen, self.targets, self.places = terms, chosen, targets, places
        self.ladder = terms.ladder(ESTIMATOR, terms.sigma_e, targets)

    def verdict(self, votes: Counts, num: int) -> Stop:
        """FULL as long as it is for one level."""
        if self.terms.router == "plurality":
            return Stop.FULL
        z = self.terms.rule.futility_z
        seen = {self.ladder.verdict(against(votes, self.chosen, place), num, z) for place in self.places}
        order = (Stop.FULL, Stop.UNLIKELY, Stop.FUTILE)
        return next((stop for stop in order if stop in seen), Stop.REACHED if self.targets else Stop.FULL)

    def radii(self, router: StageVotes) -> tuple[list[float], float]:
        """E of every level (0.0 for the chosen one), and within what the chosen one does not change."""
        shown = self._median if self.terms.router == "median" else self._plurality
        excluded = [0.0] * len(self.terms.sigmas)
        for place in others_of(self.chosen, len(excluded)):
            excluded[place] = shown(router, place)
        return excluded, shown(router, self.chosen)

    def _median(self, router: StageVotes, place: int) -> float:
        votes = router.counts
        successes = int(votes[place]) if place == self.chosen else against(votes, self.chosen, place)
        return self.ladder.result(successes, router.num)[1]

    def _plurality(self, router: StageVotes, place: int) -> float:
        stage, sigma_e = self.terms.stages[ESTIMATOR], self.terms.sigma_e
        if router.num < stage.at(sigma_e).num_estimation:
            return 0.0  # no bound may be looked at before the last draw
        radius = plurality_radius(router.counts, self.chosen, place, router.num, stage.alpha, sigma_e, stage.law)
        if self.terms.budget == "grid":
            return max((target for target in self.targets if target <= radius), default=0.0)
        return radius


def _num_shared(
    terms: Agreement, chosen: int, near: Near, router: StageVotes, classes: Sequence[StageVotes | None]
) -> int:
    own = None if near.at_sigma_e is None else classes[near.at_sigma_e]
    selection = terms.sampling.num_selection if near.at_sigma_e == chosen else 0
    return selection + min(router.num, own.num) if own else 0


def _nothing(like: Counts) -> StageVotes:
    """The votes of a stage that was not asked."""
    return StageVotes(np.zeros_like(like), 0, Stop.SKIPPED)


def agreement_predict(
    sigmas: Sequence[float], sigma_e: float, num: int, alpha: float, router: Router = "median"
) -> Procedure[AgreementPrediction]:
    """PREDICT the routed classifier's class at the input; another class with probability at most alpha.

    The level need not be certain: every level that the router's votes do not exclude there is asked, and all must
    predict the same class. That is wrong only if the level that the router truly picks was excluded (alpha / 2: one of
    the two boundaries beside it was misjudged, alpha / 4 each), or if PREDICT at it erred (alpha / 2).

    Args:
        sigmas: Sigma, in the order of the estimator's outputs; ascending for the median router.
        sigma_e: noise level of the estimator.
        num: noisy copies of each stage.
        alpha: probability of returning another class.
        router: how the estimator's votes pick a level. Plurality excludes all levels but one, or none.
    """
    terms = Agreement(tuple(sigmas), sigma_e, Sampling(1, num, alpha), router)
    places = range(len(sigmas))
    if router == "median":
        votes = (yield Draws(sigma_e, num, (ESTIMATOR,), Phase.PREDICTION))[ESTIMATOR]
        candidates = [
            place
            for place in places
            if not any(
                2 * beside > num and binomial_p_value(beside, num) <= terms.stages[ESTIMATOR].alpha
                for beside in (int(votes[:place].sum()), int(votes[place + 1 :].sum()))
            )
        ]
    else:
        level = yield from predict(sigma_e, num, terms.stages[ESTIMATOR].alpha, head=ESTIMATOR)
        votes, candidates = level.counts, [*places] if level.prediction == ABSTAIN else [level.prediction]
    stages: list[Prediction] = []
    for place in candidates:
        stages.append((yield from predict(sigmas[place], num, terms.stages[CLASSIFIER].alpha, head=CLASSIFIER)))
        if stages[-1].prediction == ABSTAIN or stages[-1].prediction != stages[0].prediction:
            return AgreementPrediction(ABSTAIN, alpha, votes, tuple(candidates), tuple(stages))
    return AgreementPrediction(stages[0].prediction, alpha, votes, tuple(candidates), tuple(stages))
