"""What each method's rows say of procedures that were driven by made-up votes, whose draws were counted on the way."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from core.agreement_records import AgreementCertificate
from core.config import parse_config
from core.errors import ConfigError, DataError
from core.machine.noise_key import auxiliary
from core.procedures.multiscale import MultiscaleCertificate, level_alphas
from core.procedures.sequential import Budget
from core.records import (
    AUXILIARY,
    CLASSIFIER,
    ESTIMATOR,
    Answer,
    Certificate,
    Counts,
    Draws,
    DualCertificate,
    Rule,
    Sampling,
    is_paired,
    paired,
)
from core.report import DualRows
from core.report.multiscale import MultiscaleRows
from distributed.methods import METHODS, method_named
from distributed.methods.dual import Dual, dual_copies
from distributed.methods.method import Copies, Method, Terms, keyed
from distributed.methods.standard import grid, stacked
from tests.helpers.oracles import drive
from tests.helpers.tiny import PLAIN

NUM_CLASSES = 4
BUDGETS: list[Budget] = ["fixed", "sequential", "grid"]


def terms_of(budget: Budget, sigmas: tuple[float, ...], sigma_e: float = 0.5, **other: Any) -> Terms:
    radii = (0.0, 0.2, 0.4) if budget == "grid" else ()
    return Terms(Sampling(15, 120, 0.02), budget, Rule(20, 0.2, 2.0), radii, sigmas, sigma_e, **other)


TERMS = [
    *(terms_of(budget, (0.25, 0.5)) for budget in BUDGETS),
    terms_of("fixed", (0.5,)),
    terms_of("fixed", (0.12, 0.25, 0.5), 0.7),
    terms_of("sequential", (0.12, 0.25, 0.5), 0.7, split="full", router_share=0.25),
]
WITH_REFERENCE = replace(
    terms_of("fixed", (0.12, 0.5)), sampling=Sampling(15, 120, 0.02, num_reference=40, bound="randomized"), seed=3
)
"""For the methods that know it; the draws of the reference, and the number of each key."""


@dataclass
class Voter:
    """Votes of one example; a few draws of each hundred vote for no class."""

    random: np.random.Generator
    num_levels: int
    name: str = ""
    asked: Copies = field(default_factory=Counter)

    def __post_init__(self) -> None:
        widths = {CLASSIFIER: NUM_CLASSES, ESTIMATOR: self.num_levels}
        self.shares = {}
        for head, width in widths.items():
            favourite = np.eye(width)[self.random.integers(width)]
            sure = self.random.choice([0.3, 0.8, 1.0])
            self.shares[head] = [*(0.98 * (sure * favourite + (1 - sure) / width)), 0.02]

    def __call__(self, draws: Draws) -> Answer:
        self.asked[draws.heads] += draws.num
        votes = {
            head: self.random.multinomial(draws.num, self.shares[head])[:-1]
            for head in draws.heads
            if not is_paired(head)
        }
        for head in (head for head in [*votes] if paired(head) in draws.heads):
            votes[paired(head)] = np.append(self.random.binomial(votes[head], 0.01), 0)
        return votes | {AUXILIARY: np.array([auxiliary(3, self.name, draws.phase, draws.sigma)])}


def made(method: Method, terms: Terms, num: int = 25) -> Iterator[tuple[dict[str, Any], Any, Copies]]:
    """Row, result and the copies that were asked for, of each procedure of so many examples."""
    for seed in range(num):
        for procedure in method.procedures(terms):
            voter = Voter(np.random.default_rng(seed), len(terms.sigmas), f"example-{seed}")
            result = drive(procedure(), voter)
            row = method.row(f"example-{seed}", seed % NUM_CLASSES, result) | {"image_hash": f"{seed:016x}"}
            yield row, result, voter.asked


def stored(method: Method, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=method.schema)


def phases_of(result: Any) -> list[tuple[int, Counts]]:
    """Draws and votes of each phase of each stage that was run."""
    if isinstance(result, AgreementCertificate):
        num, votes = result.num_selection, result.votes
        estimation = [(stage.num, stage.counts) for stage in (votes.router, *votes.classes) if stage is not None]
        return [(num, votes.router_selection), (num, votes.class_selection), *estimation]
    stages: list[Certificate] = [result]
    if isinstance(result, DualCertificate):
        stages = [stage for stage in (result.sigma_stage, result.class_stage) if stage is not None]
    elif isinstance(result, MultiscaleCertificate):
        stages = list(result.levels)
    selection = [(stage.num_selection, stage.counts_selection) for stage in stages]
    return selection + [(stage.num_estimation, stage.counts_estimation) for stage in stages]


each = pytest.mark.parametrize("name", METHODS)
under = pytest.mark.parametrize("terms", TERMS, ids=lambda t: f"{t.budget}-{len(t.sigmas)}-{t.split}")


@each
@under
def test_again_stored_row_gives_itself(name: str, terms: Terms) -> None:
    method = method_named(name)
    rows = [row for row, _, _ in made(method, terms)]
    table = stored(method, rows)
    assert {*rows[0]} == {*method.schema.names}
    assert len({row["abstained"] for row in rows}) == 2
    for row in table.to_pylist():
        assert stored(method, [method.again(row, terms)]).to_pylist() == [row]
        assert row["status"] == "ok"
        assert method.spent(row, terms) == terms.sampling.alpha == row["alpha"]
    share = {"agreement": 1 - terms.router_share, "dual": 0.5 if terms.split == "halves" else 1.0}.get(name, 1.0)
    assert method.stage(terms).alpha == pytest.approx(0.02 * share, rel=1e-15)


@pytest.mark.parametrize("name", ["standard", "dual"])
def test_again_row_of_a_reference_gives_itself_and_copies_counts_its_draws(name: str) -> None:
    method, terms = method_named(name), WITH_REFERENCE
    schema, ran = method.columns(terms), 0
    bound, exact = method.copies(terms)
    for row, _, asked in made(method, terms):
        assert {*row} == {*schema.names}
        plain = pa.Table.from_pylist([row], schema=schema).to_pylist()[0]
        assert pa.Table.from_pylist([method.again(plain, terms)], schema=schema).to_pylist() == [plain]
        other = {**plain, "uniform": 0.5, "uniform_sigma": 0.5}  # as if it had been drawn anew
        assert method.again(other, terms)["uniform"] == row["uniform"]
        columns = [votes.column for votes in method.votes(plain, terms, NUM_CLASSES)]
        assert {f"counts_missed{ending}" for ending in method.endings} <= {*columns}
        if name == "standard" or not row["abstained"]:
            assert row["num_reference"] == 40
            ran += 1
        assert all(num <= bound[kind] for kind, num in asked.items()) or not exact
    assert ran
    assert bound[CLASSIFIER, paired(CLASSIFIER)] == 40 * (len(terms.sigmas) if name == "standard" else 1)
    assert method.schema_with(schema.names) == schema
    assert method.schema_with([]) == method.schema


@each
@under
def test_row_counts_the_draws_that_were_asked_for_and_copies_bounds_them(name: str, terms: Terms) -> None:
    method = method_named(name)
    most, exact = method.copies(terms)
    each_of = len(method.procedures(terms)) if method.per_level else 1
    spread = set()
    for row, _, asked in made(method, terms):
        assert row["num_draws"] == asked.total() <= most.total()
        assert not exact or {kind: each_of * num for kind, num in asked.items()} == dict(most)
        spread.add(asked.total())
    assert each_of * max(spread) <= most.total()
    assert len(spread) == 1 or not exact


@each
@under
def test_non_finite_is_what_the_stages_lack(name: str, terms: Terms) -> None:
    method = method_named(name)
    kept = list(made(method, terms))
    table = stored(method, [row for row, _, _ in kept])
    lost = [sum(num - counts.sum() for num, counts in phases_of(result)) for _, result, _ in kept]
    assert method.non_finite(table) == sum(lost) > 0
    assert [method.non_finite(table.slice(place, 1)) for place in range(len(kept))] == lost
    assert method.non_finite(stored(method, [method.error_row("x", 0, None, terms)])) == 0


@each
@under
def test_votes_are_all_columns_of_counts_and_fit_their_draws(name: str, terms: Terms) -> None:
    method = method_named(name)
    for row, result, _ in made(method, terms):
        found = list(method.votes(row, terms, NUM_CLASSES))
        assert {votes.column for votes in found} <= {column for column in row if column.startswith("counts_")}
        for votes in found:
            assert sum(votes.counts) <= votes.draws
            assert len(votes.counts) in votes.widths
            width = len(terms.sigmas) if votes.column.endswith("_sigma") else NUM_CLASSES
            assert width in votes.widths or (votes.widths == {0} and not votes.draws)
        drawn = [num for num, _ in phases_of(result)]
        assert sum(votes.draws for votes in found if len(votes.counts)) == sum(drawn)


@each
def test_error_row_claims_nothing_and_spends_what_a_certificate_would(name: str) -> None:
    method, terms = method_named(name), TERMS[0]
    row = method.error_row("x", 3, 0.25 if method.per_level else None, terms)
    assert {*row} == {*method.schema.names}
    stated = {"example_id": "x", "label": 3, "sigma": 0.25 if method.per_level else None, "alpha": 0.02}
    stated |= {"status": "error", "prediction": -1, "abstained": True, "image_hash": None, "target": None}
    stated |= {"stop_reason": "skipped"} | dict(method.empty)
    assert {key: row[key] for key in stated} == stated
    assert not any(value for key, value in row.items() if key not in stated)
    assert method.levels(terms.sigmas) == (terms.sigmas if method.per_level else (None,))


def by_level(rows: list[dict[str, Any]]) -> dict[tuple[str, float | None], dict[str, Any]]:
    return {(row["example_id"], row["sigma"]): row for row in rows}


@each
def test_rederived_keeps_errors_and_gives_the_other_rows_again(name: str) -> None:
    terms, other = TERMS[0], replace(TERMS[0], sampling=replace(TERMS[0].sampling, alpha=0.2))
    method, standard = method_named(name), method_named("standard")
    base = stored(standard, [row for row, _, _ in made(standard, terms, 3)]).to_pylist()
    base[:2] = [standard.error_row(row["example_id"], row["label"], row["sigma"], terms) for row in base[:2]]
    own = base if method.per_level else stored(method, [row for row, _, _ in made(method, terms, 3)]).to_pylist()
    if not method.per_level:
        own[0] = method.error_row(own[0]["example_id"], own[0]["label"], None, terms)
    run = {"standard": keyed(base, True), name: keyed(own, method.per_level)}
    found = list(method.rederived(own, run, terms.sigmas, other))
    assert [row["status"] for row in found] == [row["status"] for row in own]
    assert [row["example_id"] for row in found] == [row["example_id"] for row in own]
    for row, before in zip(found, own, strict=True):
        error = {**before, "alpha": 0.2}
        if name in ("multiscale", "agreement") and row["status"] == "ok":  # the votes of standard RS, not its own
            sigma = row["sigma"] if name == "agreement" else terms.sigmas[-row["num_levels"]]
            last = by_level(base)[row["example_id"], sigma]
            for key, value in {"alpha": 0.2, "label": before["label"], "image_hash": before["image_hash"]}.items():
                assert row[key] == value
            assert row["counts_selection"].tolist() == last["counts_selection"]
        else:
            expected = error if row["status"] == "error" else method.again(before, other)
            assert stored(method, [row]).equals(stored(method, [expected]))


def test_rederived_dual_at_fewer_levels_takes_the_votes_of_standard_where_its_choice_moves() -> None:
    terms, base = TERMS[0], by_level([row for row, _, _ in made(method_named("standard"), TERMS[0])])
    rows = stored(Dual(), [row for row, _, _ in made(Dual(), terms)]).to_pylist()
    moved = [row["sigma_index"] == 1 or not row["counts_selection"] for row in rows]
    assert {*moved} == {True, False}
    found = Dual().rederived(rows, {"standard": base}, terms.sigmas, replace(terms, sigmas=(0.25,)))
    for row, before, other in zip(found, rows, moved, strict=True):
        votes = base[row["example_id"], 0.25] if other else before
        if len(row["counts_selection"]):
            assert list(row["counts_selection"]) == list(votes["counts_selection"])
        assert list(row["counts_selection_sigma"]) == before["counts_selection_sigma"][:1]


def test_rederived_of_votes_that_stopped_early_needs_them_all() -> None:
    fixed, early, one = terms_of("fixed", (0.25, 0.5)), terms_of("sequential", (0.25, 0.5)), (0.25,)
    standard = [row for row, _, _ in made(method_named("standard"), fixed, 8)]
    assert list(method_named("multiscale").rederived([], {"standard": by_level(standard)}, fixed.sigmas, early)) == []
    rows = [row for row, _, _ in made(Dual(), early, 8)]
    with pytest.raises(ConfigError, match="needs budget: fixed"):
        list(Dual().rederived(rows, {"standard": by_level(standard)}, early.sigmas, replace(early, sigmas=one)))


def test_terms_of_a_configuration() -> None:
    overrides = ["certify.look_every=30", "certify.early_share=0.3", "certify.futility_z=1.5", "sigma_e=0.7"]
    config = parse_config(PLAIN, [*overrides, "certify.alpha_split=full", "certify.level_shares=[0.25, 0.5]"])
    sampling = Sampling(5, 50, 0.01)
    stated: dict[str, Any] = {"rule": Rule(30, 0.3, 1.5), "sigmas": (0.25, 0.5), "sigma_e": 0.7, "split": "full"}
    stated |= {"sampling": sampling, "level_shares": (0.25, 0.5), "sigma_share": 0.5}
    for budget in BUDGETS:
        terms = Terms.of(config, sampling, budget)
        assert terms == Terms(**stated, budget=budget, radii=(0.0, 0.2) if budget == "grid" else ())


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.7])
@pytest.mark.parametrize("estimation", [[120, 0], [60, 60]], ids=["certified", "abstained"])
def test_dual_again_with_another_share_divides_alpha_and_spends_no_more(share: float, estimation: list[int]) -> None:
    """Where the estimator abstains and the classifier is not run, too."""
    terms = replace(TERMS[0], sigma_share=share)
    row = next(row for row, result, _ in made(Dual(), terms) if result.class_stage)
    new = Dual().again({**row, "counts_selection_sigma": [15, 0], "counts_estimation_sigma": estimation}, terms)
    assert (new["sigma"] is None) == (estimation == [60, 60])
    assert new["alpha_sigma"] == 0.02 * share
    assert new["alpha_class"] == pytest.approx(0.02 * (1 - share), rel=1e-15)
    assert Fraction(new["alpha_sigma"]) + Fraction(new["alpha_class"]) <= Fraction(0.02)


@each
@under
def test_shown_has_the_columns_of_the_rows(name: str, terms: Terms) -> None:
    method = method_named(name)
    rows = [row for row, _, _ in made(method, terms)]
    data = method.shown(stored(method, rows), terms)
    assert data.name == method.title
    same = ["correct", "radius", "p_lower", "abstained", "num_draws"]
    if isinstance(data, MultiscaleRows):
        same += ["sigma", "sigma_bound", "num_levels"]
        assert data.alpha_levels == level_alphas(0.02, len(terms.sigmas))
    if isinstance(data, DualRows):
        same += ["radius_sigma", "radius_class", "bounded_by"]
        np.testing.assert_array_equal(data.sigma_choice, [row["sigma_index"] for row in rows])
        for sigma, row in zip(data.sigma, rows, strict=True):
            asked_no_further = row["stop_reason_sigma"] == "skipped"
            expected = terms.sigmas[row["sigma_index"]] if asked_no_further else row["sigma"]
            assert sigma == expected or (expected is None and math.isnan(sigma))
    for key in same:
        expected = [math.nan if row[key] is None else row[key] for row in rows]
        np.testing.assert_array_equal(getattr(data, key), expected)


def test_dual_copies_of_an_estimator_that_abstains_are_its_own() -> None:
    terms = TERMS[0]
    both = ((ESTIMATOR, CLASSIFIER), 15)
    assert dual_copies(terms, shared=False, class_stage=False) == Counter(dict([both, ((ESTIMATOR,), 120)]))
    assert dual_copies(terms, shared=True, class_stage=False) == Counter({both[0]: 135})
    assert dual_copies(terms, shared=False, class_stage=True)[CLASSIFIER,] == 135


def test_stacked_rows_of_errors_are_zeros() -> None:
    lists = np.empty(3, object)
    lists[:] = [np.array([1, 2]), np.array([]), np.array([3, 4])]
    assert stacked(lists).tolist() == [[1, 2], [0, 0], [3, 4]]
    assert stacked(lists).dtype == np.int64


def test_grid_rows_of_another_order_or_number_are_refused() -> None:
    method, terms = method_named("standard"), TERMS[0]
    table = stored(method, [row for row, _, _ in made(method, terms, 3)])
    assert grid(table, "counts_selection", terms.sigmas).shape == (3, 2, NUM_CLASSES)
    np.testing.assert_array_equal(grid(table, "sigma", terms.sigmas), [terms.sigmas] * 3)
    for odd in (table.slice(0, 5), table.take(list(reversed(range(6))))):
        with pytest.raises(DataError, match="expected one row per example for each sigma"):
            grid(odd, "radius", terms.sigmas)
