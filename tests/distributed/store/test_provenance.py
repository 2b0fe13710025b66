"""Whose row is it? What an attacker with an editor and another run can do to a run directory, and what refuses it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import parse_config
from core.errors import ConfigError, DataError
from core.files import file_sha256
from distributed.checks.audit import Replayed, replay
from distributed.execution.launch import work_of
from distributed.files.parquet import from_bytes
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.views.tables import report_data
from jobs import audit as audit_job
from jobs import certify
from jobs import report as report_job

# Files of rows
from tests.helpers.tampering import DUAL, STANDARD, edit, findings, rewrite, stop
from tests.helpers.tiny import run_main


def test_shard_of_another_run_is_refused_wherever_it_is_read(finished: dict[int, Path], run: Path) -> None:
    stop(run)
    shutil.copy(finished[1] / STANDARD / "shard-000000.parquet", run / STANDARD / "shard-000000.parquet")
    store = ShardStore(run, STANDARD)
    for read in (store.read, store.check_files, lambda: certify.run(RunDirectory(run, None), "standard")):
        with pytest.raises(
            DataError, match=r"shard-000000.parquet' is not of this run and place: .*seed is 1, expected 0"
        ):
            read()
    assert "shard-000000.parquet' is not of this run and place" in findings(run)
    (run / STANDARD / "shard-000000.parquet").unlink()  # as the message says
    certify.run(RunDirectory(run, None), "standard")
    assert ShardStore(run, STANDARD).read().equals(ShardStore(finished[0], STANDARD).read())
    assert findings(run) == ""


def test_part_of_another_run_is_refused_and_its_shards_are_kept(finished: dict[int, Path], run: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(finished[1], other)
    plan = ShardStore(other, DUAL).read_plan()
    assert plan is not None
    ids = ShardStore(other, DUAL).read().column("example_id").to_pylist()
    ShardStore(other, DUAL).finish(plan, ids, (None,), 1000)
    part = other / DUAL / "part-000000-000001.parquet"
    about = json.loads(from_bytes(part.read_bytes(), "")[1]["origin"])
    assert (about["seed"], about["store"], about["shards"], about["plan"]) == (1, DUAL, [0, 1], plan.digest)
    shutil.copy(part, run / DUAL)
    with pytest.raises(DataError, match=r"part-000000-000001.parquet' is not of this run and place: .*seed is 1"):
        ShardStore(run, DUAL).finish(plan, ids, (None,), 1000)
    assert len(list((run / DUAL).iterdir())) == 3


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (lambda about: about.pop("origin"), "does not say what it was made from"),
        (lambda about: about.update(origin="[1]"), "does not say what it was made from"),
        (lambda about: about.update(origin=about["origin"].replace('"seed": 0', '"seed": 2')), "seed is 2, expected 0"),
        (
            lambda about: about.update(origin=about["origin"].replace(STANDARD, DUAL)),
            "store is 'certificates/dual', expected 'certificates/standard'",
        ),
        (lambda about: about.update(origin=about["origin"].replace('"version": 2', '"version": 3')), "version is 3"),
    ],
)
def test_shard_that_says_something_else_of_itself_is_refused(
    run: Path, forge: Callable[[dict[str, str]], object], problem: str
) -> None:
    rewrite(run / STANDARD / "shard-000001.parquet", about=forge)
    with pytest.raises(DataError, match=f"shard-000001.*{problem}"):
        ShardStore(run, STANDARD).read()


def test_shard_under_another_number_or_of_another_device_is_refused(run: Path) -> None:
    shutil.copy(run / DUAL / "shard-000000.parquet", run / DUAL / "shard-000001.parquet")
    with pytest.raises(DataError, match=r"shard-000001.*shards is \[0, 0\], expected \[1, 1\]"):
        ShardStore(run, DUAL).read()
    rewrite(run / STANDARD / "shard-000000.parquet", about=lambda about: about.update(device="tpu: v5"))
    assert "was made on 'tpu: v5', expected cpu or cuda" in findings(run)


def test_plan_that_was_edited_is_not_that_of_its_shards(run: Path) -> None:
    store = ShardStore(run, STANDARD)
    plan = store.read_plan()
    assert plan is not None
    ids = RunDirectory(run, None, "look").data("test").example_ids
    for forged in (
        replace(plan, batch_size=32),
        replace(
            plan, origin={key: plan.origin[key] for key in ("fingerprint", "models")}
        ),  # as before it had a version
        replace(plan, order=plan.order[::-1].copy()),
    ):
        store.write_plan(forged, ids)
        with pytest.raises(DataError, match=r"shard-000000.* plan is '\w{16}', expected '\w{16}'"):
            ShardStore(run, STANDARD).read()
    short = Plan(plan.order[:15], np.array([0, 10, 15]), 2, plan.origin, "cpu", 64)
    with pytest.raises(DataError, match="the plan is for 15 places and 2 rows of each, expected each of the 20"):
        store.verify(short, ids, (0.12, 0.5))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shard-1.parquet", "is not the name of a shard or a part"),
        ("shard-0000001.parquet", "is not the name"),
        ("shard-000001 (copy).parquet", "is not the name"),
        ("part-000001-000001.parquet", "is not the name"),
        ("part-000001-000000.parquet", "is not the name"),
        ("rows.parquet", "is not the name"),
        ("shard-000007.parquet", "is beyond the 2 shards of the plan"),
        ("part-000001-000002.parquet", "is beyond the 2 shards of the plan"),
    ],
)
def test_file_that_is_none_of_the_plan_is_named_and_not_counted(run: Path, name: str, problem: str) -> None:
    shutil.copy(run / STANDARD / "shard-000001.parquet", run / STANDARD / name)
    assert f"{name}: {problem}" in findings(run)
    with pytest.raises(DataError, match=f"{problem}.*move the file away"):
        ShardStore(run, STANDARD).read()
    stop(run, lost=0)
    with pytest.raises(DataError, match=f"{problem}.*move the file away"):
        certify.run(RunDirectory(run, None), "standard")
    if name == "shard-1.parquet":
        (run / STANDARD / name).unlink()
        certify.run(RunDirectory(run, None), "standard")
        assert RunDirectory(run, None).manifest["steps"]["certify-standard"]["rows"] == 40


def test_parts_that_hold_a_shard_twice_are_named(tmp_path: Path) -> None:
    for name in ("part-000000-000001.parquet", "part-000001-000002.parquet", "shard-000000.parquet"):
        (tmp_path / "dataset").mkdir(exist_ok=True)
        (tmp_path / "dataset" / name).write_bytes(b"")
    (odd,) = ShardStore(tmp_path, "dataset").odd_files(None)
    assert odd == ("part-000001-000002.parquet", "holds shards that 'part-000000-000001.parquet' holds too")


# The manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"]["certify"].update(alpha=1e-9), r"edited(.|\n)*certify.alpha: 0.01 when it was begun, 1"),
        (lambda m: m["config"].update(seed=7), r"its configuration was edited(.|\n)*seed: 0 when it was begun, 7 now"),
        (lambda m: m.pop("fingerprint"), "its configuration was edited"),
        (lambda m: m.update(seed=7), "seed was edited: it is 7, the configuration's is 0"),
        (lambda m: m.pop("seed"), "seed was edited: it is None"),
    ],
)
def test_run_directory_manifest_that_was_edited_is_refused(
    run: Path, change: Callable[[dict[str, Any]], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, change)
    for mode in ("write", "dry", "look"):
        with pytest.raises(ConfigError, match=message):
            RunDirectory(run, None, mode)
    for job in (report_job, audit_job):
        assert run_main(job, "--out", str(run)) == 2
    assert "was edited" in capsys.readouterr().err


def test_manifest_edited_with_its_fingerprint_is_not_what_the_rows_were_made_from(run: Path) -> None:
    def forge(manifest: dict[str, Any]) -> None:
        manifest["config"]["certify"]["alpha"] = 1e-9
        manifest["fingerprint"] = parse_config(manifest["config"]).fingerprint()

    edit(run, forge)
    directory = RunDirectory(run, None, "look")
    with pytest.raises(ConfigError, match=r"is not what certificates/standard was made from, .*: fingerprint is '\w+'"):
        report_job.run(directory)
    assert "was made for something else than the manifest says: fingerprint is" in findings(run)


def test_report_data_states_no_settings_that_the_rows_do_not_have(run: Path) -> None:
    """Even where plan and files agree with the manifest: rows say under which alpha, with how many draws."""
    directory = RunDirectory(run, None, "look")
    certify_config = directory.config.certify
    for change, message in (
        ({"alpha": 1e-9}, "certificates/standard: alpha is 0.01 in rows, the configuration says 1e-09"),
        ({"num_selection": 9}, "num_selection is 20 in rows, the configuration says 9"),
        ({"num_estimation": 9}, "num_estimation is 100 in rows, the configuration says 9"),
    ):
        forged = directory.config.model_copy(update={"certify": certify_config.model_copy(update=change)})
        with pytest.raises(DataError, match=message):
            report_data(forged, directory.folder, directory.manifest)
    with pytest.raises(DataError, match=r"certificates/dual: sigma_e is 0\.5 in rows, the configuration says 0\.7"):
        report_data(directory.config.model_copy(update={"sigma_e": 0.7}), directory.folder, directory.manifest)


@pytest.mark.parametrize(
    ("fact", "stated", "found"),
    [
        ("rows", 5000, "20"), ("error_rows", 1, "0"), ("devices", ["cuda: X"], "['cpu']"), ("plan", "0", "'"),
        ("batch_size", 1, "64"), ("shards", 3, "2"), ("non_finite_draws", 7, "0"),
    ],
)  # fmt: skip
def test_audit_what_the_manifest_states_of_a_step_is_compared(run: Path, fact: str, stated: Any, found: str) -> None:
    edit(run, lambda manifest: manifest["steps"]["certify-dual"].update({fact: stated}))
    said = f"certificates/dual: manifest.json: {fact} is {stated!r}, plan and files say {found}"
    assert said in findings(run)


def test_data_digest_that_was_edited_is_refused_and_found(run: Path) -> None:
    edit(run, lambda manifest: manifest["data"]["test"].update(digest="0" * 16))
    with pytest.raises(ConfigError, match=r"is not what certificates/standard was made from, .*: data is '0{16}'"):
        report_job.run(RunDirectory(run, None, "look"))
    assert f"fingerprint {'0' * 16}" in findings(run)


# Replay


def forge_dual(run: Path, num: int) -> None:
    """Certify `num` examples with votes that nobody drew, consistent in every file."""
    directory = RunDirectory(run, None)
    work, _ = work_of(directory, DUAL)
    terms, file = work.terms, run / DUAL / "shard-000000.parquet"

    def forge(rows: list[dict[str, Any]]) -> None:
        for row in rows[:num]:
            chosen = row["sigma_index"]
            row["counts_estimation_sigma"] = [100 if index == chosen else 0 for index in range(2)]
            for phase, draws in (("selection", 20), ("estimation", 100)):
                row[f"counts_{phase}"] = [draws if label == row["label"] else 0 for label in range(10)]
            row["num_estimation"] = 100
            row |= work.method.again(row, terms)

    rewrite(file, forge)
    edit(run, lambda manifest: manifest["steps"]["certify-dual"]["sha256"].update({file.name: file_sha256(file)}))


def test_replay_looks_at_each_store_and_says_what_it_may_have_missed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge_dual(run, 3)
    assert findings(run) == "", "a consistent forgery passes every check without noise"
    told: list[Replayed] = []
    found = replay(RunDirectory(run, None, "look"), 19, seed=0, tell=told.append)
    assert [(each.store, each.drawn, each.rows) for each in told] == [(DUAL, 19, 20), (STANDARD, 19, 40)]
    assert {finding.store for finding in found} == {DUAL}
    assert len({finding.row for finding in found}) >= 2  # one of twenty is not looked at
    assert "0.05 (1), 0 (2)" in str(told[0])
    assert run_main(audit_job, "--out", str(run), "--replay", "19", "--replay-seed", "5") == 3
    printed = capsys.readouterr().out
    assert "certificates/dual: 19 of 20 rows drawn again; probability of missing forged rows" in printed
    assert "rows chosen by --replay-seed 5" in printed


def test_replay_choice_is_fresh_unless_its_seed_is_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = set()
    for _ in range(2):
        assert run_main(audit_job, "--out", str(run), "--replay", "1") == 0
        seeds.add(capsys.readouterr().out.partition("--replay-seed ")[2])
    assert len(seeds) == 2


# Models


def test_fetch_local_file_that_has_changed_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, _ = work_of(RunDirectory(run, None), DUAL)
    assert set(work.model_files()) == {"denoiser", "classifier", "estimator"}
    with monkeypatch.context() as context:  # hashed once, and not again while nothing touches the files
        context.setattr("core.files.file_sha256", lambda path: "another")
        work.model_files()
    file = run / "models/classifier_finetuned.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as there:  # the same size and inode, and the time put back
        there.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"classifier_finetuned.safetensors' is not the file that this run wrote"):
        work.model_files()
    file.unlink()
    with pytest.raises(DataError, match="is not the file that this run wrote"):
        work.model_files()
