"""The agreement certificate against its theorem, a slow second implementation and closed forms through the engine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from core.agreement_records import AgreementCertificate, AgreementVotes, Router, StageVotes
from core.errors import ConfigError
from core.procedures.agreement import Agreement, agreement_from_votes, choose_level
from core.procedures.confidence import certified_radius, radius_of_two_bounds
from core.procedures.dual import dual_certify
from core.procedures.smoothing import certify
from core.records import ABSTAIN, CLASSIFIER, ESTIMATOR, Counts, Phase, Sampling, Stop
from tests.core.procedures.test_properties import decided_votes, votes_of
from tests.helpers.lattice import counts
from tests.helpers.oracles import drive
from tests.helpers.routed import Given, Routed, SlabRouter, certified, routed_classes

N0, N, ALPHA = 20, 400, 0.01
SAMPLING = Sampling(N0, N, ALPHA)
SIGMAS = (0.25, 0.5, 1.0)
ROUTERS: tuple[Router, ...] = ("median", "plurality")


def phi(successes: int, alpha: float, num: int = N) -> float:
    """Phi^-1 of the Clopper-Pearson lower bound, by SciPy's beta distribution."""
    return float(stats.norm.ppf(stats.beta.ppf(alpha, successes, num - successes + 1))) if successes else -math.inf


# --- The statement ----------------------------------------------------------------------------------------------------


def random_slabs(random: np.random.Generator, dim: int) -> tuple[SlabRouter, dict[float, tuple[int, float, int]]]:
    """A router of slabs and an expert of each level, a half-space across one of `dim` axes."""
    num_levels = int(random.integers(1, 6))
    cuts = tuple(np.sort(random.normal(0, 0.5, num_levels - 1)).tolist())
    planes = {
        0.25 * (level + 1): (int(random.integers(dim)), float(random.normal(-0.3, 0.5)), int(random.random() < 0.9))
        for level in range(num_levels)
    }
    return SlabRouter(cuts), planes


def at_the_origin(
    router: SlabRouter, planes: Mapping[float, tuple[int, float, int]], sigma_e: float, rule: Router
) -> tuple[float, int]:
    """T and the routed class at the origin. A half-space's radius is the distance, whatever the level."""
    origin = np.zeros((1, 3))
    c = int(routed_classes(router, planes, origin, sigma_e, rule)[0])
    answers = [special.ndtr(-at / sigma) for sigma, (_, at, _) in sorted(planes.items())]
    p = tuple(
        q if beyond else 1 - q for q, (_, _, beyond) in zip(answers, dict(sorted(planes.items())).values(), strict=True)
    )
    shares = router.shares(origin[:, 0], sigma_e)[0]
    truth = Routed(tuple(sorted(planes)), sigma_e, tuple(shares.tolist()), p)
    m = int((shares.cumsum() < 0.5).sum()) if rule == "median" else int(shares.argmax())
    return truth.radius(m, c, rule), c


@pytest.mark.parametrize("rule", ROUTERS)
def test_agreement_statement_holds_everywhere_in_the_ball(rule: Router) -> None:
    random, positive, farther = np.random.default_rng(0), 0, 0
    for _ in range(300):
        router, planes = random_slabs(random, dim=3)
        sigma_e = float(random.uniform(0.1, 1.0))
        radius, c = at_the_origin(router, planes, sigma_e, rule)
        directions = random.standard_normal((400, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        directions[:6] = np.concatenate([np.eye(3), -np.eye(3)])
        sphere = directions * radius * (1 - 1e-9)
        inside = sphere * random.random((400, 1)) ** (1 / 3)
        for points in (sphere, inside):
            assert (routed_classes(router, planes, points, sigma_e, rule) == c).all()
        positive += radius > 0
        shares = router.shares(np.zeros(1), sigma_e)[0]
        farther += radius > sigma_e * max(0.0, float(special.ndtri(shares.max()))) + 1e-9
    assert positive > 100
    assert farther > 50, "the level changes inside the ball"


def test_agreement_statement_is_tight_along_one_axis() -> None:
    """Where all planes lie across the router's axis, the class often changes at T itself."""
    random, tight = np.random.default_rng(1), 0
    for _ in range(200):
        router, planes = random_slabs(random, dim=1)
        radius, c = at_the_origin(router, planes, 0.5, "median")
        beyond = np.array([[radius + 1e-6, 0, 0], [-radius - 1e-6, 0, 0]])
        tight += (routed_classes(router, planes, beyond, 0.5, "median") != c).any()
    assert tight > 150


# --- What the votes give ----------------------------------------------------------------------------------------------


def stored(
    router: tuple[Counts, Counts], classes: Sequence[Counts | None], selection: Counts, num: int = N
) -> AgreementVotes:
    stages = tuple(None if votes is None else StageVotes(votes, num, Stop.FULL) for votes in classes)
    return AgreementVotes(router[0], selection, StageVotes(router[1], num, Stop.FULL), stages)


def terms_of(sigmas: Sequence[float], router: Router = "median", sigma_e: float = 1.0) -> Agreement:
    return Agreement(tuple(sigmas), sigma_e, SAMPLING, router)


@st.composite
def any_votes(draw: st.DrawFn, min_levels: int = 1) -> tuple[tuple[float, ...], AgreementVotes]:
    levels = draw(st.integers(min_levels, 5))
    sigmas = tuple(0.25 * (level + 1) for level in range(levels))
    router = (draw(votes_of(N0, levels)), draw(votes_of(N, levels) | decided_votes(N, levels)))
    selection = draw(votes_of(N0, 3))
    classes = [draw(votes_of(N, 3) | decided_votes(N, 3)) for _ in sigmas]
    if draw(st.booleans()):  # levels that agree are rare otherwise
        c = int(selection.argmax())
        for votes in classes:
            votes[[c, int(votes.argmax())]] = votes[[int(votes.argmax()), c]]
    return sigmas, stored(router, classes, selection)


def second_implementation(
    sigmas: Sequence[float], votes: AgreementVotes, sigma_e: float, rule: Router, share: float = 0.5
) -> tuple[float, float]:
    """T and the published radius, level by level and vote by vote, every level asked."""
    chosen_by, q = votes.router_selection.tolist(), votes.router.counts.tolist()
    spent, rest = ALPHA * share, ALPHA * (1 - share)
    if rule == "median":
        m = min(j for j in range(len(q)) if sum(chosen_by[: j + 1]) >= sum(chosen_by) / 2)
    else:
        m = chosen_by.index(max(chosen_by))
    c = int(votes.class_selection.argmax())
    terms = []
    for j, (sigma, stage) in enumerate(zip(sigmas, votes.classes, strict=True)):
        assert stage is not None
        stay = sigma * phi(int(stage.counts[c]), rest)
        if j == m:
            reach = 0.0
        elif rule == "median":
            kept_off = sum(votes for i, votes in enumerate(q) if (i < j if m < j else i > j))
            reach = sigma_e * phi(kept_off, spent)
        else:  # the upper bound of q_j, all draws without a vote among them, is one less the lower bound of the rest
            reach = sigma_e / 2 * (phi(q[m], spent / 2) + phi(sum(q) - q[j], spent / 2))
        terms.append(max(reach, stay, 0.0))
    own = votes.classes[m]
    assert own is not None
    constant = min(
        sigma_e * phi(q[m], spent if rule == "median" else spent / 2), sigmas[m] * phi(int(own.counts[c]), rest)
    )
    return min(terms), max(0.0, constant)


@pytest.mark.parametrize("rule", ROUTERS)
@given(drawn=any_votes(), sigma_e=st.floats(0.1, 2.0), share=st.just(0.5) | st.floats(0.01, 0.99))
def test_agreement_from_votes_equals_the_second_implementation(
    rule: Router, drawn: tuple[tuple[float, ...], AgreementVotes], sigma_e: float, share: float
) -> None:
    sigmas, votes = drawn
    result = agreement_from_votes(replace(terms_of(sigmas, rule, sigma_e), router_share=share), votes)
    radius, constant = second_implementation(sigmas, votes, sigma_e, rule, share)
    assert result.alpha_router == ALPHA * share
    assert Fraction(result.alpha_router) + Fraction(result.alpha_class) <= Fraction(ALPHA)
    assert result.alpha_class == pytest.approx(ALPHA * (1 - share), rel=1e-12)
    assert result.radius == pytest.approx(radius, rel=1e-7, abs=1e-12)
    assert result.radius_constant == pytest.approx(constant, rel=1e-7, abs=1e-12)
    assert result.abstained == (result.radius == 0.0) == (result.binding is None)
    if result.binding is not None:
        assert result.levels[result.binding].radius == result.radius == min(level.radius for level in result.levels)
        assert result.prediction == votes.class_selection.argmax()


@pytest.mark.parametrize("rule", ROUTERS)
@given(drawn=any_votes(), sigma_e=st.floats(0.1, 2.0))
def test_agreement_from_votes_radius_is_never_below_the_published_one(
    rule: Router, drawn: tuple[tuple[float, ...], AgreementVotes], sigma_e: float
) -> None:
    result = agreement_from_votes(terms_of(drawn[0], rule, sigma_e), drawn[1])
    assert result.radius >= result.radius_constant


@pytest.mark.parametrize("rule", ROUTERS)
@given(drawn=any_votes(), sigma_e=st.floats(0.1, 2.0), place=st.integers(0, 4), more=st.integers(1, 30))
def test_agreement_from_votes_radius_never_falls_when_votes_come_to_the_class_or_the_chosen_level(
    rule: Router, drawn: tuple[tuple[float, ...], AgreementVotes], sigma_e: float, place: int, more: int
) -> None:
    sigmas, votes = drawn
    terms, place = terms_of(sigmas, rule, sigma_e), place % len(sigmas)
    before = agreement_from_votes(terms, votes)
    stage, c = votes.classes[place], int(votes.class_selection.argmax())
    assert stage is not None
    gained = moved(stage.counts, (c + 1) % 3, c, more)
    classes = tuple(replace(s, counts=gained) if s is stage else s for s in votes.classes)
    assert agreement_from_votes(terms, replace(votes, classes=classes)).radius >= before.radius
    toward = moved(votes.router.counts, place, before.level, more)
    assert (
        agreement_from_votes(terms, replace(votes, router=replace(votes.router, counts=toward))).radius >= before.radius
    )


def moved(votes: Counts, source: int, target: int, num: int) -> Counts:
    votes, num = votes.copy(), min(num, int(votes[source]))
    votes[source] -= num
    votes[target] += num
    return votes


@given(drawn=any_votes(min_levels=2))
def test_agreement_from_votes_constant_router_costs_nothing(drawn: tuple[tuple[float, ...], AgreementVotes]) -> None:
    """Where the router's reach is beyond anything that n draws show of the class, the chosen level's radius is left."""
    sigmas, votes = drawn
    for place in range(len(sigmas)):
        one = np.eye(len(sigmas), dtype=np.int64)[place]
        constant = replace(votes, router_selection=one * N0, router=StageVotes(one * N, N, Stop.FULL))
        result = agreement_from_votes(terms_of(sigmas, sigma_e=max(sigmas)), constant)
        assert (result.level, result.radius) == (place, result.levels[place].radius_class)
        assert [stage is not None for stage in result.votes.classes] == [j == place for j in range(len(sigmas))]


@given(drawn=any_votes())
def test_agreement_from_votes_one_level_is_certify_at_the_share_of_the_class(
    drawn: tuple[tuple[float, ...], AgreementVotes],
) -> None:
    own = drawn[1].classes[0]
    assert own is not None
    votes = {Phase.SELECTION: drawn[1].class_selection, Phase.ESTIMATION: own.counts}
    alone = drive(certify(0.25, replace(SAMPLING, alpha=ALPHA / 2)), lambda draws: {CLASSIFIER: votes[draws.phase]})
    router = (counts(N0), counts(N))
    result = agreement_from_votes(terms_of((0.25,)), stored(router, [own.counts], drawn[1].class_selection))
    assert (result.prediction, result.radius, result.levels[0].p_lower) == (
        alone.prediction,
        alone.radius,
        alone.p_lower,
    )


@pytest.mark.parametrize("rule", ROUTERS)
def test_agreement_from_votes_stage_that_was_not_drawn_shows_nothing(rule: Router) -> None:
    sure, selection = counts(N, 0), counts(N0, 0)
    router = (counts(0, N0), counts(300, 100))
    both = agreement_from_votes(terms_of((0.25, 0.5), rule), stored(router, [sure, sure], selection))
    assert (both.level, both.prediction, both.binding) == (1, 0, 0)
    without = stored(router, [None, sure], selection)
    assert agreement_from_votes(terms_of((0.25, 0.5), rule), without).prediction == ABSTAIN
    blind = replace(without, router=StageVotes(counts(0, 0), 0, Stop.SKIPPED))
    assert agreement_from_votes(terms_of((0.25, 0.5), rule), blind).prediction == ABSTAIN
    short = replace(without, router=StageVotes(counts(0, 50), 50, Stop.FULL))
    assert agreement_from_votes(terms_of((0.25, 0.5), rule), short).prediction == ABSTAIN


def test_agreement_certificate_says_what_holds_each_level() -> None:
    votes = stored((counts(0, N0, 0), counts(2, 250, 148)), [None, counts(8, 392), counts(20, 380)], counts(0, N0))
    result = agreement_from_votes(terms_of(SIGMAS, sigma_e=1.0), votes)
    assert [level.by for level in result.levels] == ["router", "class", "class"]
    assert result.levels[0].radius == pytest.approx(1.0 * phi(398, ALPHA / 2))
    assert result.levels[2].radius_excluded == pytest.approx(1.0 * phi(252, ALPHA / 2))
    assert result.levels[2].radius_class == pytest.approx(1.0 * phi(380, ALPHA / 2))
    assert (result.binding, result.sigma, result.radius) == (1, 0.5, result.levels[1].radius)
    assert result.radius_constant == pytest.approx(1.0 * phi(250, ALPHA / 2))
    nothing = replace(votes, classes=(None, StageVotes(counts(200, 200), N, Stop.FULL), None))
    assert [level.by for level in agreement_from_votes(terms_of(SIGMAS), nothing).levels] == ["nothing"] * 3


def test_radius_of_two_bounds_is_rounded_towards_zero_and_equals_one_bound_doubled() -> None:
    for one, other in ((350, 399), (100, 399), (30, 395), (0, 400), (400, 400)):
        radius = radius_of_two_bounds(one, other, N, 0.01, 0.5)
        assert radius == pytest.approx(max(0.0, 0.25 * (phi(one, 0.01) + phi(other, 0.01))), rel=1e-8)
    assert radius_of_two_bounds(350, 399, N, 0.01, 0.12) / radius_of_two_bounds(
        350, 399, N, 0.01, 0.5
    ) == pytest.approx(float(np.float32(0.12)) / 0.5, rel=1e-12), "of the noise that is added"
    exact = special.ndtri(stats.beta.ppf(0.01, 350, 51)) + special.ndtri(stats.beta.ppf(0.01, 399, 2))
    assert 0.0 < exact * 0.25 - radius_of_two_bounds(350, 399, N, 0.01, 0.5) < 1e-12
    bound = stats.beta.ppf(0.01, 350, 51)
    assert radius_of_two_bounds(350, 350, N, 0.01, 0.5) == pytest.approx(float(certified_radius(bound, 0.5)), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_agreement_share_of_the_router_that_is_none_or_all_raises(share: float) -> None:
    with pytest.raises(ConfigError, match="router_share must lie in"):
        replace(terms_of(SIGMAS), router_share=share)


@pytest.mark.parametrize(
    ("votes", "median", "plurality"),
    [
        ((40, 35, 25), 1, 0),
        ((25, 35, 40), 1, 2),
        ((50, 20, 30), 0, 0),
        ((49, 20, 31), 1, 0),
        ((30, 40, 40), 1, 1),
        ((0, 0, 0), 0, 0),
    ],
)
def test_choose_level_is_the_routers_own_rule(votes: tuple[int, ...], median: int, plurality: int) -> None:
    assert choose_level(counts(*votes), "median") == median
    assert choose_level(counts(*votes), "plurality") == plurality


# --- What is asked ----------------------------------------------------------------------------------------------------


def ask(
    router: tuple[int, ...], ones: tuple[int, ...], chosen: int, sigma_e: float = 2.0
) -> tuple[AgreementCertificate, Given]:
    source = Given(counts(*router), ones, chosen, 1, SIGMAS, sigma_e)
    return certified(terms_of(SIGMAS, sigma_e=sigma_e), source), source


def test_agreement_certify_asks_other_levels_only_within_the_radius_reached_and_without_selection() -> None:
    result, source = ask((0, 400, 0), (0, 400, 0), chosen=1)
    assert [(d.heads[0], d.sigma, d.phase) for d in source.asked] == [
        (ESTIMATOR, 2.0, Phase.SELECTION),
        (CLASSIFIER, 0.5, Phase.SELECTION),
        (CLASSIFIER, 0.5, Phase.ESTIMATION),
        (ESTIMATOR, 2.0, Phase.ESTIMATION),
    ]
    assert result.num_draws == sum(d.num for d in source.asked) == 2 * (N0 + N)
    # Nothing excludes level 2, and level 0 is excluded farther than level 2 then allows.
    result, source = ask((10, 190, 200), (0, 400, 250), chosen=1)
    assert [(d.sigma, d.phase) for d in source.asked[4:]] == [(1.0, Phase.ESTIMATION)]
    assert (result.binding, result.votes.classes[0]) == (2, None)
    # Level 2 answers otherwise, so nothing is left that level 0 could take away.
    result, source = ask((150, 50, 200), (0, 400, 0), chosen=1)
    assert (result.prediction, len(source.asked)) == (ABSTAIN, 5)


def test_agreement_certify_class_that_is_not_certified_ends_it_before_the_router() -> None:
    result, source = ask((0, 400, 0), (0, 200, 0), chosen=1)
    assert [d.heads for d in source.asked] == [(ESTIMATOR,), (CLASSIFIER,), (CLASSIFIER,)]
    assert (result.prediction, result.radius, result.votes.router.stop) == (ABSTAIN, 0.0, Stop.SKIPPED)
    assert result.num_draws == sum(d.num for d in source.asked)


def test_agreement_certify_shares_the_draws_where_the_chosen_level_is_sigma_e() -> None:
    result, source = ask((0, 100, 300), (0, 390, 400), chosen=2, sigma_e=1.0)
    assert [(d.heads, d.sigma) for d in source.asked] == [
        *[((ESTIMATOR, CLASSIFIER), 1.0)] * 2,
        *[((CLASSIFIER,), 0.5)] * (len(source.asked) - 2),
    ]
    assert result.num_shared == N0 + N
    assert result.num_draws == sum(d.num for d in source.asked)
    apart = agreement_from_votes(terms_of(SIGMAS, sigma_e=1.0), source.stored(N))
    assert apart.levels == result.levels


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_agreement_certify_radius_is_at_least_that_of_dual_certify_on_the_same_votes(chosen: int) -> None:
    random = np.random.default_rng(chosen)
    for _ in range(50):
        router = random.multinomial(N, random.dirichlet(np.where(np.arange(3) == chosen, 20, 2)))
        source = Given(router, tuple(random.integers(300, N, 3).tolist()), chosen, 1, SIGMAS, 1.0)
        published = drive(dual_certify(SIGMAS, 1.0, SAMPLING), source)
        result = certified(terms_of(SIGMAS), source)
        assert result.radius_constant == published.radius
        assert result.radius >= published.radius
