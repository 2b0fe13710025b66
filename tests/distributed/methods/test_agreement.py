"""Rows of the agreement claim: from votes and back, and derived from those of Dual RS and standard RS."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from core.agreement_records import Router
from core.errors import ConfigError
from core.procedures.sequential import Budget
from core.records import CLASSIFIER, ESTIMATOR, Phase, Rule, Sampling, Stop
from distributed.methods import method_named
from distributed.methods.agreement import Agreement
from distributed.methods.method import RunRows, Terms, keyed
from tests.helpers.oracles import drive
from tests.helpers.routed import Routed, Stream

SIGMAS = (0.25, 0.5, 1.0)
NUM = 60


def terms_of(router: Router = "median", budget: Budget = "fixed", sigma_e: float = 1.0, alpha: float = 0.01) -> Terms:
    radii = (0.0, 0.2, 0.4) if budget == "grid" else ()
    return Terms(Sampling(10, NUM, alpha), budget, Rule(look_every=20), radii, SIGMAS, sigma_e, router=router)


def stream_of(number: int, sigma_e: float) -> Stream:
    """Votes of every kind: sure and unsure routers and classes, some that vote for nothing, and beside them class 0."""
    random = np.random.default_rng(number)
    shares = random.dirichlet([(0.3, 0.3, 0.3), (9.0, 1.0, 0.1), (0.2, 2.0, 2.0)][number % 3])
    if number % 5 == 0:
        shares = shares * 0.97
    p = random.choice([0.995, 0.93, 0.7, 0.2, 0.03], size=3)
    routed = Routed(SIGMAS, sigma_e, tuple(shares.tolist()), tuple(p.tolist()))
    return Stream.of(routed, Sampling(10, NUM, 0.01), random)


def certified(name: str, terms: Terms, streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """The rows of a method, as a store gives them back."""
    method, rows = method_named(name), []
    for number, stream in enumerate(streams):
        for make in method.procedures(terms):
            result = drive(make(), stream)
            rows.append(method.row(f"example-{number:03d}", number % 2, result) | {"image_hash": "x"})
    return [*pa.Table.from_pylist(rows, schema=method.schema).to_pylist()]


def run_of(terms: Terms, streams: Sequence[Stream], *names: str) -> RunRows:
    return {name: keyed(certified(name, terms, streams), method_named(name).per_level) for name in names}


def stored(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [*pa.Table.from_pylist([dict(row) for row in rows], schema=Agreement.schema).to_pylist()]


@pytest.mark.parametrize("budget", get_args(Budget))
@pytest.mark.parametrize("router", get_args(Router))
def test_rows_are_recomputed_from_their_votes_bit_for_bit(router: Router, budget: Budget) -> None:
    terms, method = terms_of(router, budget), Agreement()
    streams = [stream_of(number, 1.0) for number in range(60)]
    rows = certified("agreement", terms, streams)
    assert stored([method.again(row, terms) for row in rows]) == rows
    most, exact = method.copies(terms)
    assert not exact
    for row in rows:
        assert row["radius"] >= row["radius_constant"]
        assert row["num_draws"] <= most.total()
        assert (row["binding"] is None) == row["abstained"] == (row["radius"] == 0.0)
        level = [max(pair) for pair in zip(row["radius_excluded"], row["radius_class"], strict=True)]
        assert row["abstained"] or (row["radius"] == min(level) == level[row["binding"]])
        assert [num for place, num in enumerate(row["num_estimation_level"]) if place == row["sigma_index"]] == [0]
        for votes in method.votes(row, terms, 2):
            assert sum(votes.counts) <= votes.draws
            assert len(votes.counts) in votes.widths
        assert all((stop == Stop.SKIPPED) == (num == 0) for stop, num in method.ends(row))
        drawn = 20 + row["num_estimation"] + row["num_estimation_sigma"] + sum(row["num_estimation_level"])
        assert row["num_draws"] == drawn - row["num_shared"]
    found = {(row["binding"], bool(row["radius"] > row["radius_constant"])) for row in rows}
    assert len(found) >= 5, "the votes are of every kind"
    assert any(any(row["num_estimation_level"]) for row in rows)
    table = pa.Table.from_pylist(rows, schema=Agreement.schema)
    lost = sum(votes.draws - sum(votes.counts) for row in rows for votes in method.votes(row, terms, 2))
    assert method.non_finite(table) == lost > 0
    shown = method.shown(table, terms)
    assert shown.capped.any()
    assert (shown.draws_others > 0).any()
    assert shown.constant_level().radius.tolist() == [row["radius_constant"] for row in rows]


@pytest.mark.parametrize("name", ["counts_estimation_level", "num_estimation_level", "stop_reason_level"])
def test_row_whose_lists_by_level_differ_in_length_is_refused(name: str) -> None:
    terms, method = terms_of(), Agreement()
    (row,) = certified("agreement", terms, [stream_of(0, 1.0)])
    row[name] = row[name][:-1]
    with pytest.raises(ValueError, match="zip"):
        method.recompute(row, terms)
    with pytest.raises(ValueError, match="zip"):
        [*method.votes(row, terms, 2), *method.ends(row)]


@pytest.mark.parametrize("sigma_e", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("router", get_args(Router))
def test_rederived_from_dual_and_standard_is_what_is_certified_directly(router: Router, sigma_e: float) -> None:
    terms, method = terms_of(router, sigma_e=sigma_e), Agreement()
    streams = [stream_of(number, sigma_e) for number in range(45)]
    run = run_of(terms, streams, "dual", "standard")
    for other in (terms, replace(terms, sampling=replace(terms.sampling, alpha=0.2))):
        direct = certified("agreement", other, streams)
        assert stored([*method.rederived([], run, SIGMAS, other)]) == direct
    own = run_of(terms, streams, "agreement", "standard")
    assert stored([*method.rederived([], own, SIGMAS, terms)]) == certified("agreement", terms, streams)


@pytest.mark.parametrize("router", get_args(Router))
def test_rederived_subset_of_sigma_counts_votes_for_the_rest_for_no_level(router: Router) -> None:
    terms, method, kept = terms_of(router), Agreement(), (0, 2)
    streams = [stream_of(number, 1.0) for number in range(45)]
    run = run_of(terms, streams, "dual", "standard")
    fewer = replace(terms, sigmas=tuple(SIGMAS[place] for place in kept))
    new = np.array([0, 2, 1, 2])  # level 1, and none, are neither of both
    without = [
        Stream(
            {key: new[draws] if key[0] == ESTIMATOR else draws for key, draws in stream.draws.items()},
            {ESTIMATOR: 2, CLASSIFIER: 2},
        )
        for stream in streams
    ]
    direct = certified("agreement", fewer, without)
    assert stored([*method.rederived([], run, SIGMAS, fewer)]) == direct
    assert {row["sigma"] for row in direct} == {0.25, 1.0}


@pytest.mark.parametrize("budget", ["sequential", "grid"])
def test_rederived_of_an_early_budget_takes_its_own_rows_alone(budget: Budget) -> None:
    terms, method = terms_of(budget=budget), Agreement()
    streams = [stream_of(number, 1.0) for number in range(45)]
    run = run_of(terms, streams, "agreement", "dual", "standard")
    rows = [*run["agreement"].values()]
    assert stored([*method.rederived(rows, run, SIGMAS, terms)]) == rows
    assert [*method.rederived([], run, SIGMAS, terms)] == []
    small = replace(terms, sampling=replace(terms.sampling, alpha=0.001))
    for row, before in zip(method.rederived(rows, run, SIGMAS, small), rows, strict=True):
        assert row["radius"] <= before["radius"]
    with pytest.raises(ConfigError, match="moves the router's choice"):
        [*method.rederived(rows, run, SIGMAS, replace(terms, sigmas=SIGMAS[:2]))]


def test_rederived_example_that_could_not_be_run_stays_an_error() -> None:
    terms, method = terms_of(), Agreement()
    run = run_of(terms, [stream_of(0, 1.0)], "dual", "standard")
    failed = method_named("standard").error_row("example-000", 0, 0.5, terms)
    spoilt = {**run, "standard": {**run["standard"], ("example-000", 0.5): failed}}
    (row,) = method.rederived([], spoilt, SIGMAS, terms)
    assert (row["status"], row["abstained"], row["radius"], row["binding"]) == ("error", True, 0.0, None)
    table = pa.Table.from_pylist([row], schema=Agreement.schema)
    assert method.shown(table, terms).radius_class.tolist() == [[0.0, 0.0, 0.0]]


def test_copies_of_a_single_level_that_is_sigma_e_are_shared() -> None:
    terms = replace(terms_of(), sigmas=(1.0,))
    assert Agreement().copies(terms) == ({(ESTIMATOR, CLASSIFIER): 70}, True)
    stream = Stream.of(Routed((1.0,), 1.0, (1.0,), (0.9,)), terms.sampling, np.random.default_rng(0))
    (row,) = certified("agreement", terms, [stream])
    assert row["num_draws"] == 70
    assert {draws.phase for draws in stream.asked} == {Phase.SELECTION, Phase.ESTIMATION}
