"""Every way to spoil a run that the audit must find, and certificates derived from stored votes."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import parse_config
from core.errors import ConfigError, NoiseError
from core.files import file_sha256
from core.machine.engine import Engine
from distributed.checks.audit import Finding, Replayed, audit, replay
from distributed.execution.launch import work_of
from distributed.execution.work import Work, _sound, build_engine
from distributed.methods.dual import Dual
from distributed.methods.rows import CERTIFICATE_SCHEMA, error_row
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.studies.recertify import Change, recertify
from jobs import build_dataset
from tests.helpers import tampering
from tests.helpers.runs import finished_run
from tests.helpers.tampering import DUAL, edit, findings
from tests.helpers.tiny import tiny_run

Row = dict[str, Any]
Rows = list[Row]


def problems(run: RunDirectory) -> list[str]:
    return findings(run.path).splitlines()


def rewrite(run: RunDirectory, store: str, change: Callable[[Rows], Rows | None], rehash: bool = True) -> str:
    """Change the rows of a store's first shard; with `rehash` the manifest is made to agree."""
    file = run.path / store / ShardStore(run.path, store).files()[0]

    def changed(rows: Rows) -> None:
        rows[:] = change(rows) or rows

    tampering.rewrite(file, changed)
    if rehash:
        step = "build_dataset" if store == "dataset" else store.replace("certificates/", "certify-")
        edit(run.path, lambda manifest: manifest["steps"][step]["sha256"].update({file.name: file_sha256(file)}))
    return file.name


def test_audit_and_replay_untouched_run_finds_nothing(run: RunDirectory) -> None:
    found, checked = audit(run)
    assert found == []
    assert checked == {"certificates/standard": 100, "certificates/dual": 50}
    assert replay(run, 12, seed=0) == []


def test_audit_and_replay_untouched_cascade_finds_nothing(cascade: RunDirectory) -> None:
    found, checked = audit(cascade)
    assert found == []
    assert (checked["certificates/multiscale"], checked["certificates/agreement"]) == (50, 50)
    assert replay(cascade, 200, seed=0) == []
    rows = ShardStore(cascade.path, "certificates/multiscale").read().to_pylist()
    decided = {(row["num_levels"], row["sigma"], row["alpha_level"]) for row in rows if not row["abstained"]}
    assert decided == {(1, 1.0, 0.005), (2, 0.1, 0.0025)}


@pytest.mark.parametrize("rehash", [False, True], ids=["file altered", "file and manifest altered"])
@pytest.mark.parametrize("amount", [1, -1])
def test_audit_count_altered_by_one_names_the_row(run: RunDirectory, rehash: bool, amount: int) -> None:
    def spoil(rows: Rows) -> None:
        votes = rows[0]["counts_estimation"]
        votes[votes.index(max(votes))] += amount

    name = rewrite(run, "certificates/standard", spoil, rehash)
    found = problems(run)
    row = ShardStore(run.path, "certificates/standard").read_file(name).to_pylist()[0]
    assert any(f"{row['example_id']}, sigma {row['sigma']:g}: " in problem for problem in found)
    assert (f"certificates/standard: {name}: has another SHA-256 than the manifest says" in found) == (not rehash)


def test_audit_row_removed_doubled_or_foreign_is_named(run: RunDirectory) -> None:
    rewrite(run, "certificates/dual", lambda rows: [*rows[1:], rows[2], {**rows[3], "example_id": "digits-x"}])
    found = problems(run)
    ids = ShardStore(run.path, "certificates/dual").read().column("example_id").to_pylist()
    doubled = next(name for name in ids if ids.count(name) == 2)
    assert any("is there 0 times, expected once" in problem for problem in found)
    assert any(f"{doubled}: is there 2 times" in problem for problem in found)
    assert any("digits-x: is not planned" in problem for problem in found)
    assert any(problem.startswith("certificates/dual: '") and "exactly once" in problem for problem in found)


MULTISCALE, AGREEMENT = "certificates/multiscale", "certificates/agreement"
ALTERED: dict[str, tuple[Callable[[Row], bool], list[tuple[str, Any]]]] = {
    DUAL: (lambda row: row["sigma"] is not None, [
        ("radius", 9.0), ("prediction", 77), ("correct", lambda row: not row["correct"]), ("alpha", 0.5),
        ("alpha_sigma", 0.009), ("bounded_by", "nobody"), ("num_draws", 3), ("sigma", 0.3),
        ("label", lambda row: (row["label"] + 1) % 10), ("counts_selection_sigma", [-1, 21]),
        ("counts_selection_sigma", [20]), ("stop_reason_sigma", "futile"),
    ]),
    MULTISCALE: (lambda row: row["sigma"] == 0.1, [  # the smaller one decided
        ("radius", 9.0), ("prediction", 77), ("alpha", 0.5), ("alpha_level", 0.01), ("radius_level", 9.0),
        ("radius_above", math.inf), ("sigma", 1.0), ("sigma_bound", None), ("num_levels", 1), ("num_draws", 3),
        ("num_estimation", 99), ("counts_selection_above", []), ("counts_estimation_above", []),
        ("counts_estimation_above", [[10] * 10, [10] * 10]), ("counts_estimation_above", [[10] * 9]),
        ("counts_estimation_above", [[-1, *[10] * 9]]), ("counts_estimation_above", [[11] * 10]),
    ]),
    AGREEMENT: (lambda row: any(row["num_estimation_level"]) and not row["abstained"], [
        ("radius", 9.0), ("sigma", 0.3), ("prediction", 77), ("num_draws", 3), ("stop_reason", "reached"),
        ("alpha_early", 0.001), ("sigma_e", 0.1), ("router", "plurality"), ("sigma_index", 7),
        ("radius_constant", 0.001), ("binding", None), ("num_shared", 1), ("counts_selection_sigma", [-1, 21]),
        ("counts_estimation_sigma", [20]), ("num_estimation_sigma", 99), ("stop_reason_sigma", "reached"),
        ("radius_excluded", [9.0, 9.0]), ("radius_class", [9.0]), ("p_lower_level", [1.0, 1.0]),
        ("counts_estimation_level", [[], []]), ("counts_estimation_level", [[11] * 10, [11] * 10]),
        ("num_estimation_level", [0, 0]), ("num_estimation_level", [100]),
        ("stop_reason_level", ["skipped", "skipped"]), ("stop_reason_level", ["reached", "reached"]),
    ]),
}  # fmt: skip
"""By store: in which row, and which column becomes what."""


@pytest.mark.parametrize(
    ("store", "column", "value"), [(store, *change) for store, (_, changes) in ALTERED.items() for change in changes]
)
def test_audit_any_column_altered_is_found(store: str, column: str, value: Any, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue("run" if store == DUAL else "cascade")

    def spoil(rows: Rows) -> None:
        row = next(filter(ALTERED[store][0], rows))
        new = value(row) if callable(value) else value
        assert row[column] != new
        row[column] = new

    rewrite(run, store, spoil)
    assert problems(run)


def test_audit_vote_at_another_level_moved_is_found(cascade: RunDirectory) -> None:
    """Votes at the other levels are no decoration: what moves to another class moves what that level shows."""

    def spoil(rows: Rows) -> None:
        row = next(row for row in rows if any(row["num_estimation_level"]) and not row["abstained"])
        votes = next(votes for votes in row["counts_estimation_level"] if votes)
        votes[row["prediction"]] -= 1
        votes[row["prediction"] - 1] += 1

    rewrite(cascade, "certificates/agreement", spoil)
    assert any("radius_class is" in problem for problem in problems(cascade))


def test_audit_vote_of_a_level_above_moved_is_found_and_named(cascade: RunDirectory) -> None:
    """Votes above are no decoration: what moves to another class moves the radius, or what the cascade asks next."""

    def spoil(rows: Rows) -> None:
        for row in rows:
            for votes in row["counts_estimation_above"]:
                most = votes.index(max(votes))
                votes[most], votes[most - 1] = votes[most] - 20, votes[most - 1] + 20

    rewrite(cascade, "certificates/multiscale", spoil)
    found = problems(cascade)
    assert any("radius_above is" in problem or "cannot be recomputed" in problem for problem in found)


def test_audit_cascade_that_goes_on_after_a_decision_is_found(cascade: RunDirectory) -> None:
    """A level that decided is passed over for a smaller sigma with a larger radius, its votes kept as if undecided."""

    def spoil(rows: Rows) -> None:
        row = next(row for row in rows if row["sigma"] == 1.0)
        for phase in ("selection", "estimation"):
            row[f"counts_{phase}_above"] = [row[f"counts_{phase}"]]
        row |= {"num_levels": 2, "sigma": 0.1, "num_draws": 2 * row["num_draws"]}

    rewrite(cascade, "certificates/multiscale", spoil)
    assert any("num_levels is 2, its votes give 1" in problem for problem in problems(cascade))


def test_audit_radius_off_by_the_last_bit_is_found(run: RunDirectory) -> None:
    def spoil(rows: Rows) -> None:
        row = next(row for row in rows if row["radius"] > 0)
        row["radius"] = math.nextafter(row["radius"], 1.0)

    rewrite(run, "certificates/standard", spoil)
    assert any("radius is" in problem for problem in problems(run))


def test_audit_manifest_of_another_run_is_found(run: RunDirectory, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", "seed=5")
    shutil.copy(other.path / "manifest.json", run.path / "manifest.json")
    assert any("made for something else than the manifest says: fingerprint is" in problem for problem in problems(run))
    with pytest.raises(ConfigError, match=r"manifest.json' is not what certificates/standard was made from.*seed is 5"):
        ShardStore(run.path, "certificates/standard").read()


def test_audit_shard_removed_or_model_swapped_is_found(run: RunDirectory) -> None:
    (run.path / "certificates/dual" / ShardStore(run.path, "certificates/dual").files()[1]).unlink()
    assert "certificates/dual: shard-000001.parquet: is missing" in problems(run)
    shutil.copy(run.model("denoiser"), run.model("classifier_finetuned"))
    found = [problem for problem in problems(run) if "is not the file that this run wrote" in problem]
    assert [problem.partition("'")[0] for problem in found] == ["certificates/standard: ", "certificates/dual: "]


def test_audit_plan_that_is_missing_is_named_once_a_store(run: RunDirectory) -> None:
    (run.path / "plan/certificates-dual.parquet").unlink()
    assert len(found := problems(run)) == 1
    assert found[0].startswith("certificates/dual: plan: ")


def test_audit_method_that_spends_too_much_is_found(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dual, "spent", lambda self, row, terms: math.nextafter(0.01, 1.0))
    found = problems(run)
    assert len(found) == 50
    assert all("spends 0.010000000000000002 of alpha, the run allows 0.01" in problem for problem in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_replay_of_a_store_that_a_gpu_made_needs_one(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(run.path, "certificates/dual")
    plan, table = store.read_plan(), store.read()
    assert plan is not None
    origin = {key: value for key, value in plan.origin.items() if key != "noise_version"}
    monkeypatch.setattr(ShardStore, "read_plan", lambda self: replace(plan, origin=origin, device="cuda"))
    monkeypatch.setattr(ShardStore, "read", lambda self: table)
    with pytest.raises(ConfigError, match="was made on a GPU: its noise can only be drawn again on one"):
        replay(run, 1, seed=0)


@pytest.mark.parametrize(("moved", "found"), [(1, False), (5, True)])
def test_replay_of_rows_of_a_gpu_on_the_cpu_lets_near_ties_pass(
    run: RunDirectory, moved: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Votes, and all that follows from them, as if a few near-ties had fallen otherwise there."""
    work, _ = work_of(run, "certificates/standard")
    method, terms = work.method, work.terms

    def moved_votes(rows: Rows) -> None:
        for row in rows:
            counts = row["counts_estimation"]
            most = int(np.argmax(counts))
            counts[most], counts[most - 1] = counts[most] - moved, counts[most - 1] + moved
            row |= method.again(row, terms)

    rewrite(run, "certificates/standard", moved_votes)
    assert {each.store for each in replay(run, 100, seed=0)} == {"certificates/standard"}
    told: list[Replayed] = []
    monkeypatch.setattr(ShardStore, "devices", lambda self: {"cuda"})
    assert bool(replay(run, 100, seed=0, tell=told.append)) == found
    assert all("made on another device: up to 0.2% of the votes" in str(each) for each in told)


def test_run_begun_with_the_former_noise_goes_on_and_is_audited_with_it(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "compute.executor=local", "noise_version=1", "compute.part_rows=1")
    build_dataset.run(run)
    edit(run.path, lambda manifest: manifest["config"].pop("noise_version"))  # as it was when there was no other
    store = ShardStore(run.path, "dataset")
    table, plan = store.read(), store.read_plan()
    assert plan is not None
    assert "noise_version" not in plan.origin
    (run.path / "dataset" / "shard-000001.parquet").unlink()
    named = parse_config({k: v for k, v in run.config.model_dump(mode="json").items() if k != "noise_version"})
    again = RunDirectory(run.path, named)
    assert again.config.noise_version == 1
    build_dataset.run(again)
    assert ShardStore(run.path, "dataset").read().equals(table)
    assert audit(again)[0] == replay(again, 5, seed=0) == []
    with pytest.raises(ConfigError, match="noise_version: None there, 2 now"):
        RunDirectory(run.path, parse_config({**named.model_dump(mode="json"), "noise_version": 2}))


def test_audit_of_noise_that_is_not_sound_says_so(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.machine.noise_check.problems", lambda *arguments: iter(["it is loaded"]))
    _sound.cache_clear()
    (finding,) = audit(run)[0]
    assert "noise: the noise that" in str(finding)
    assert "is not what certificates assume: it is loaded" in str(finding)
    with pytest.raises(NoiseError, match="it is loaded"):
        replay(run, 1, seed=0)


def test_replay_votes_that_other_noise_gave_are_found(run: RunDirectory) -> None:
    """Votes and everything derived from them moved consistently: only drawing them again can tell."""
    work, _ = work_of(run, "certificates/standard")
    method, terms = work.method, work.terms

    def spoil(rows: Rows) -> None:
        for row in rows:
            row["counts_estimation"] = row["counts_estimation"][1:] + row["counts_estimation"][:1]
            row |= method.again(row, terms)

    rewrite(run, "certificates/standard", spoil)
    assert problems(run) == []
    found = replay(run, 15, seed=1)
    assert found
    assert all("drawn again: " in str(finding) for finding in found)


def test_replay_runs_the_batches_of_the_plan_and_counts_rows(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a network computes can depend on the shape, and `auto` came to one on the machine that made the rows."""
    asked = []

    def build(work: Work, num_classes: int, batch_size: int | None = None) -> Engine:
        asked.append((work.device, batch_size))
        return build_engine(work, num_classes, batch_size)

    monkeypatch.setattr("distributed.checks.audit.build_engine", build)
    assert replay(run, 1, seed=0, interval_s=0.0) == []
    assert asked == [("cpu", 64)] * 2
    printed = capsys.readouterr().err
    assert "replay: 1/2 rows (50%)" in printed
    assert "replay: 2/2 rows (100%)" in printed


@pytest.mark.parametrize("budget", ["sequential", "grid"])
def test_audit_sequential_budgets_are_recomputed_too(budget: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path, f"certify.budget={budget}", "certify.look_every=20")
    assert problems(run) == []
    assert replay(run, 20, seed=0) == []
    rows = ShardStore(run.path, "certificates/dual").read().to_pylist()
    stops = {row["stop_reason"] for row in rows} | {row["stop_reason_sigma"] for row in rows}
    assert len(stops) > 1, "nothing stopped early: the test shows nothing"


def test_audit_and_recertify_full_split_agree_with_each_other(run: RunDirectory, tmp_path: Path) -> None:
    full = finished_run(tmp_path / "full", "certify.alpha_split=full")
    assert problems(full) == []
    _, root = recertify(run, Change(split="full"))
    derived, made = ShardStore(root, "certificates/dual").read(), ShardStore(full.path, "certificates/dual").read()
    assert derived.equals(made)
    halves = ShardStore(run.path, "certificates/dual").read()
    assert sum(derived.column("radius").to_pylist()) > sum(halves.column("radius").to_pylist())
    assert set(made.column("alpha_class").to_pylist()) == {0.01}


def test_audit_without_certificates_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certificates to audit"):
        audit(tiny_run(tmp_path))


def first_row_becomes(run: RunDirectory, change: Callable[[Row], Row]) -> list[str]:
    """What the audit finds after the first row of the standard certificates was replaced, hashes and all."""
    rewrite(run, "certificates/standard", lambda rows: [change(rows[0]), *rows[1:]])
    return problems(run)


@pytest.mark.parametrize(
    "claim", [{}, {"radius": 0.5}, {"prediction": 3}, {"counts_estimation": [100]}, {"alpha": 0.5}]
)
def test_audit_error_row_that_claims_something_is_found(run: RunDirectory, claim: dict[str, object]) -> None:
    def failed(row: Row) -> Row:
        empty = error_row(CERTIFICATE_SCHEMA, {}, row["example_id"], row["label"], row["sigma"], 0.01)
        return {**row, **empty, **claim}

    found = first_row_becomes(run, failed)
    assert "error_rows is 0, plan and files say 1" in found[0]
    row = [problem for problem in found if "manifest.json" not in problem]
    assert len(row) == len(claim)
    for column in claim:
        assert f"{column} is " in row[0]


def test_audit_error_row_of_dual_that_names_a_level_is_found(run: RunDirectory) -> None:
    def failed(rows: Rows) -> Rows:
        row = error_row(Dual.schema, Dual.empty, rows[0]["example_id"], rows[0]["label"], None, 0.01)
        return [{**row, "sigma": 0.25}, *rows[1:]]

    rewrite(run, "certificates/dual", failed)
    assert [problem for problem in problems(run) if "sigma is 0.25, its votes give None" in problem]


@pytest.mark.parametrize(
    ("stop", "drawn", "odd"),
    [
        ("full", 99, True),
        ("futile", 100, True),
        ("unlikely", 100, True),
        ("reached", 100, False),
        ("futile", 99, False),
    ],
)
def test_audit_reason_that_does_not_fit_the_draws_is_found(run: RunDirectory, stop: str, drawn: int, odd: bool) -> None:
    found = first_row_becomes(run, lambda row: {**row, "stop_reason": stop, "num_estimation": drawn})
    assert any(f"stopped as '{stop}' after {drawn} of 100 draws" in problem for problem in found) == odd


def test_audit_file_that_the_manifest_does_not_name_is_found(run: RunDirectory) -> None:
    name = sorted(run.manifest["steps"]["certify-dual"]["sha256"])[0]
    edit(run.path, lambda manifest: manifest["steps"]["certify-dual"]["sha256"].pop(name))
    assert f"certificates/dual: {name}: is not in the manifest" in problems(run)


def test_audit_step_that_is_not_finished_is_looked_at_and_named(run: RunDirectory) -> None:
    edit(run.path, lambda manifest: manifest["steps"].pop("certify-dual"))
    found, checked = audit(RunDirectory(run.path, None))
    unfinished = "the step is not finished: its shards cannot be checked against recorded hashes"
    assert found == [Finding("certificates/dual", "", unfinished)]
    assert set(checked) == {"certificates/standard", "certificates/dual"}
