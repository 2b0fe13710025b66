"""Whose row is it? What an attacker with an editor and another run can do to a run directory, and what refuses it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from core.config import parse_config
from core.data import Dataset, image_hash
from core.errors import ConfigError, DataError
from core.files import file_sha256
from core.procedures.confidence import certified_radius
from distributed.checks.audit import Replayed, audit, replay
from distributed.execution.launch import work_of
from distributed.files.parquet import from_bytes, to_bytes
from distributed.store.origin import origin_of
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.store.verify import changed_images
from distributed.views.tables import report_data
from jobs import audit as audit_job
from jobs import certify
from jobs import report as report_job
from tests.distributed.checks.test_audit import finished_run
from tests.helpers.tiny import run_main

STANDARD, DUAL = "certificates/standard", "certificates/dual"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run with two seeds: 20 examples in two shards."""
    root = tmp_path_factory.mktemp("runs")
    small = ("dataset.test_size=20", "sigmas=[0.12, 0.5]")
    return {seed: finished_run(root / str(seed), *small, f"seed={seed}", weight_seed=3).path for seed in (0, 1)}


@pytest.fixture
def run(finished: dict[int, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest by hand."""
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


def stop(run: Path, store: str = STANDARD, lost: int = 1) -> None:
    """Leave a step as a kill leaves it: not recorded, a shard missing."""
    edit(run, lambda manifest: manifest["steps"].pop(f"certify-{store.rpartition('/')[2]}"))
    (run / store / f"shard-{lost:06d}.parquet").unlink()


def rewrite(
    file: Path,
    rows: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    about: Callable[[dict[str, str]], object] = lambda about: None,
) -> None:
    """Change a file of rows and what it says of them, in place."""
    table, metadata = from_bytes(file.read_bytes(), file.name)
    there = table.to_pylist()
    rows(there)
    about(metadata)
    changed = pa.Table.from_pylist(there, schema=table.schema)
    file.write_bytes(to_bytes(table.schema, [changed], lambda: metadata))


def findings(run: Path) -> str:
    return "\n".join(map(str, audit(RunDirectory(run, None, "look"))[0]))


# Files of rows


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
    rewrite(run / STANDARD / "shard-000000.parquet", about=lambda about: about.update(device="cuda: H100"))
    assert "was made on 'cuda: H100', the plan is for 'cpu'" in findings(run)


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
        (
            lambda m: m["config"]["certify"].update(alpha=1e-9),
            r"its configuration was edited(.|\n)*certify.alpha: 0.01 when it was begun, 1e-09 now",
        ),
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
    ("change", "message"),
    [
        (lambda m: m["data"]["test"].update(digest="0" * 32), "fingerprint 00000000000000000000000000000000"),
        (lambda m: m["steps"]["certify-dual"].update(rows=5000), "rows is 5000, plan and files say 20"),
        (lambda m: m["steps"]["certify-dual"].update(error_rows=1), "error_rows is 1, plan and files say 0"),
        (
            lambda m: m["steps"]["certify-dual"].update(devices=["cuda: X"]),
            "devices is ['cuda: X'], plan and files say",
        ),
        (lambda m: m["steps"]["certify-dual"].update(plan="0"), "plan is '0', plan and files say"),
        (lambda m: m["steps"]["certify-dual"].update(batch_size=1), "batch_size is 1, plan and files say 64"),
    ],
)
def test_audit_what_the_manifest_states_of_data_and_steps_is_compared(
    run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(run, change)
    assert message in findings(run)


def test_report_data_digest_that_was_edited_is_refused(run: Path) -> None:
    edit(run, lambda manifest: manifest["data"]["test"].update(digest="0" * 16))
    with pytest.raises(ConfigError, match=r"is not what certificates/standard was made from, .*: data is '0{16}'"):
        report_job.run(RunDirectory(run, None, "look"))


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
    assert [(each.store, each.drawn, each.rows) for each in told] == [(STANDARD, 19, 40), (DUAL, 19, 20)]
    assert {finding.store for finding in found} == {DUAL}
    assert len({finding.row for finding in found}) >= 2  # one of twenty is not looked at
    assert "0.05 (1), 0 (2)" in str(told[1])
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


# Images


def folder_run(root: Path) -> tuple[RunDirectory, Path]:
    """A run on 60 stored images, whose digest looks at 32 of them."""
    random, images = np.random.default_rng(0), root / "images"
    for split, num in (("train", 10), ("test", 60)):
        for index in range(num):
            file = images / split / f"{index % 10}" / f"{index:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(file)
    data = f"dataset={{name: folder, path: {images}, color: grey, resize: 8, crop: 8}}"
    run = finished_run(root / "run", data, "certify.num_estimation=20", "certify.alpha=0.1")
    return run, images


def blank(images: Path, data: Dataset) -> list[str]:
    """Blank every image that the digest does not look at; returns their ids."""
    seen = set(np.linspace(0, len(data) - 1, 32).astype(int).tolist())
    names = [name for place, name in enumerate(data.example_ids) if place not in seen]
    for name in names:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / name)
    return names


def test_stored_images_that_the_digest_does_not_see_are_refused_by_the_hash_in_the_rows(tmp_path: Path) -> None:
    directory, images = folder_run(tmp_path)
    data = directory.data("test")
    for row in ShardStore(directory.path, DUAL).read().to_pylist():
        assert row["image_hash"] == image_hash(data.image(data.example_ids.index(row["example_id"])))
    names, digest = blank(images, data), data.digest()
    assert len(names) == 28
    fresh = RunDirectory(directory.path, None)
    assert fresh.data("test").digest() == digest
    stop(directory.path, lost=2)
    with pytest.raises(
        DataError, match=r"certificates/standard: test/.*: its image has changed .*put the data set back"
    ):
        certify.run(RunDirectory(directory.path, None), "standard")
    found = findings(directory.path)
    assert "its image has changed" in found
    drawn = replay(RunDirectory(directory.path, None, "look"), 60, seed=0)
    assert {
        finding.row.partition(",")[0]
        for finding in drawn
        if "image_hash is" in finding.problem and finding.store == DUAL
    } == set(names)
    # Whoever makes a store after the images were changed: the other one gives it away.
    shutil.rmtree(directory.path / DUAL)
    (directory.path / "plan/certificates-dual.parquet").unlink()
    edit(directory.path, lambda manifest: manifest["steps"].pop("certify-dual"))
    with pytest.raises(DataError, match="its image has changed"):
        certify.run(RunDirectory(directory.path, None), "dual")


def test_rows_of_one_example_from_different_images_are_found_without_the_images(run: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["image_hash"] = "0" * 16

    name = ShardStore(run, DUAL).read_file("shard-000000.parquet").column("example_id")[0].as_py()
    rewrite(run / DUAL / "shard-000000.parquet", change)
    found = findings(run)
    assert f"{name}: its rows were computed from different images: " in found
    assert f"certificates/dual: {name}: its image has changed (hash" in found
    with pytest.raises(DataError, match=f"computed from different images of '{name}'"):
        report_job.run(RunDirectory(run, None, "look"))
    rewrite(run / DUAL / "shard-000000.parquet", lambda rows: rows[0].update(image_hash=None))
    assert f"certificates/dual: {name}: does not name the image that it was computed from" in findings(run)
    rewrite(run / STANDARD / "shard-000000.parquet", change)
    assert f"has rows of '{name}' that were computed from different images" in findings(run)


def test_changed_images_looks_at_as_many_as_are_asked_for_and_passes_over_rows_without_a_hash() -> None:
    pixels = np.arange(40, dtype=np.uint8).reshape(10, 1, 2, 2)
    data = Dataset("x", tuple("abcdefghij"), pixels, np.zeros(10, np.int64), 1)
    table = pa.table({"example_id": list("abcdefghij") * 2, "image_hash": ["0" * 16] * 10 + [None] * 10})
    assert len(list(changed_images([table], data, 4))) == 4
    assert len(list(changed_images([table], data, 40))) == 10
    right = pa.table({"example_id": ["c"], "image_hash": [image_hash(pixels[2])]})
    assert list(changed_images([right], data, 4)) == []
    assert image_hash(pixels[2]) != image_hash(pixels[2].reshape(1, 1, 4))


def test_digest_in_memory_sees_every_image_and_knows_the_sample_of_before() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1000, 1, 4, 4)).astype(np.uint8)
    data = Dataset("x", tuple(map(str, range(1000))), images, np.zeros(1000, np.int64), 1)
    whole, sample = data.digest(), data.digest(sample=True)
    assert (len(whole), len(sample)) == (32, 16)
    assert data.matches(whole)
    assert data.matches(sample)
    unseen = next(place for place in range(1000) if place not in np.linspace(0, 999, 32).astype(int))
    changed = images.copy()
    changed[unseen] ^= 1
    other = replace(data, images=changed)
    assert other.digest(sample=True) == sample
    assert not other.matches(whole)


# Runs that were begun before all this


def as_before(file: Path) -> None:
    """A file as an earlier version wrote it."""
    table, metadata = from_bytes(file.read_bytes(), file.name)
    del metadata["origin"]
    table = table.drop_columns(["image_hash"])
    file.write_bytes(to_bytes(table.schema, [table], lambda: metadata))


def test_run_begun_before_files_named_their_origin_goes_on_with_its_arithmetic(
    run: Path, finished: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(run, None)
    for store, method in ((STANDARD, "standard"), (DUAL, "dual")):
        shutil.rmtree(run / store)
        edit(run, lambda manifest, method=method: manifest["steps"].pop(f"certify-{method}"))  # type: ignore[misc]
        plan = ShardStore(run, store).read_plan()
        assert plan is not None
        _, models = work_of(directory, store)
        origin = {"fingerprint": directory.config.fingerprint(), "models": models}
        assert origin == origin_of(directory.config, models, "", begun=replace(plan, origin={}))
        old = replace(plan, origin=origin, settings={})
        ShardStore(run, store).write_plan(old, directory.data("test").example_ids)
        certify.run(RunDirectory(run, None), method)
        as_before(run / store / "shard-000000.parquet")
        before = ShardStore(run, store).read()
        (run / store / "shard-000001.parquet").unlink()
        certify.run(RunDirectory(run, None), method)
        after = ShardStore(run, store).read()
        assert after.equals(before)
        assert before.column("image_hash").null_count == before.num_rows // 2
    rows = [row for row in ShardStore(run, STANDARD).read().to_pylist() if row["sigma"] == 0.12]
    new = {
        row["example_id"]: row for row in ShardStore(finished[0], STANDARD).read().to_pylist() if row["sigma"] == 0.12
    }
    assert any(row["radius"] > 0 for row in rows)
    for row in rows:
        one, two = row, new[row["example_id"]]
        assert one["counts_estimation"] == two["counts_estimation"]
        assert one["radius"] == float(certified_radius(one["p_lower"], 0.12, 1))
        assert two["radius"] == float(certified_radius(two["p_lower"], 0.12))
        assert one["radius"] > two["radius"] or one["radius"] == two["radius"] == 0.0
    edit(run, lambda manifest: manifest["steps"]["certify-standard"].update(sha256=hashes(run, STANDARD)))
    edit(run, lambda manifest: manifest["steps"]["certify-dual"].update(sha256=hashes(run, DUAL)))
    assert findings(run) == ""
    capsys.readouterr()
    assert run_main(audit_job, "--out", str(run), "--replay", "30") == 0
    assert "certificates/dual: begun before files named their origin: provenance not proved" in capsys.readouterr().out
    report_job.run(RunDirectory(run, None, "look"))


def hashes(run: Path, store: str) -> Mapping[str, str]:
    return {file.name: file_sha256(file) for file in (run / store).iterdir()}
