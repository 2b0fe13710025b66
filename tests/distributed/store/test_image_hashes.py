"""Rows name the image that they were computed from."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.data import Dataset, image_hash
from core.errors import DataError
from core.files import file_sha256
from core.law import Gaussian
from core.procedures.confidence import certified_radius
from distributed.checks.audit import replay
from distributed.execution.launch import work_of
from distributed.files.parquet import from_bytes, to_bytes
from distributed.store.origin import origin_of
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.store.verify import changed_images
from jobs import audit as audit_job
from jobs import certify
from jobs import report as report_job
from tests.helpers.runs import finished_run

# Images
from tests.helpers.tampering import DUAL, STANDARD, edit, findings, rewrite, stop
from tests.helpers.tiny import run_main


def folder_run(root: Path) -> tuple[RunDirectory, Path]:
    """A run on 40 stored images, whose digest looks at 32 of them."""
    random, images = np.random.default_rng(0), root / "images"
    for split, num in (("train", 10), ("test", 40)):
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


def test_stored_images_that_the_digest_does_not_see_are_refused_by_the_hash_in_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, images = folder_run(tmp_path)
    data = directory.data("test")
    for row in ShardStore(directory.path, DUAL).read().to_pylist():
        assert row["image_hash"] == image_hash(data.image(data.example_ids.index(row["example_id"])))
    names, digest = blank(images, data), data.digest()
    assert len(names) == 8
    fresh = RunDirectory(directory.path, None)
    assert fresh.data("test").digest() == digest
    stop(directory.path, lost=2)
    with pytest.raises(
        DataError, match=r"certificates/standard: test/.*: its image has changed .*put the data set back"
    ):
        certify.run(RunDirectory(directory.path, None), "standard")
    assert "its image has changed" in findings(directory.path)
    monkeypatch.setattr("distributed.checks.audit.IMAGES_CHECKED", 0)
    assert "its image has changed" not in findings(directory.path)
    drawn = replay(RunDirectory(directory.path, None, "look"), 40, seed=0)
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


def test_rows_of_one_example_from_different_images_are_found_without_the_images(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed.checks.audit.IMAGES_CHECKED", 0)  # all are looked at where they are in memory

    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["image_hash"] = "0" * 16

    name = ShardStore(run, DUAL).read_file("shard-000000.parquet").column("example_id")[0].as_py()
    rewrite(run / DUAL / "shard-000000.parquet", change)
    found = findings(run)
    different = rf"^{name}: its rows were computed from different images: \w+ in {STANDARD}, 0{{16}} in {DUAL}$"
    assert re.search(different, found, re.MULTILINE)
    assert f"certificates/dual: {name}: its image has changed (hash" in found
    with pytest.raises(DataError, match=f"computed from different images of '{name}'"):
        report_job.run(RunDirectory(run, None, "look"))
    rewrite(run / DUAL / "shard-000000.parquet", lambda rows: rows[0].update(image_hash=None))
    assert f"certificates/dual: {name}: does not name the image that it was computed from" in findings(run)
    rewrite(run / STANDARD / "shard-000000.parquet", change)
    assert f"has rows of '{name}' that were computed from different images" in findings(run)


def test_changed_images_names_each_once_and_passes_over_rows_without_a_hash() -> None:
    pixels = np.arange(40, dtype=np.uint8).reshape(10, 1, 2, 2)
    data = Dataset("x", tuple("abcdefghij"), pixels, np.zeros(10, np.int64), 1)
    rows = [("a", "0" * 16), ("a", "0" * 16), ("b", None), ("c", image_hash(pixels[2])), ("z", "0" * 16)]
    (problem,) = changed_images(rows, data)
    assert problem.startswith("a: its image has changed")
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
        assert one["radius"] == float(certified_radius(one["p_lower"], 0.12, Gaussian(1)))
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
