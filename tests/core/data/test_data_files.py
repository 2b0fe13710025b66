"""Which files are examples: junk, links and strangers are named or refused; a split is whole and nothing but itself."""

import logging
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import DatasetConfig, SplitConfig, parse_config
from core.data import Dataset
from core.data.folders import image_files
from core.data.parquet_files import files_of_split
from core.data.storage import LocalStorage, hidden
from core.errors import DataError
from distributed.files.datasets import load_dataset, open_storage
from distributed.store.run_directory import RunDirectory
from distributed.studies.predict import open_images
from tests.core.data.test_data_folders import encoded, picture
from tests.helpers.tiny import PLAIN

IMAGE = encoded(picture(1, (8, 8)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with one image each, and what systems and people leave beside them."""
    for name in (
        "cat/0.png",
        "dog/0.JPE",
        "__MACOSX/cat/._0.png",
        "cat/@eaDir/0.png",
        "cat/.thumbs/0.png",
        "dog/._0.png",
    ):
        put(tmp_path / "test" / name)
    for name in (
        "cat/Thumbs.db",
        "dog/.DS_Store",
        "cat/notes.txt",
        "dog/README",
        "dog/more.TXT",
        "val.sh",
        "dog/a.heic",
    ):
        put(tmp_path / "test" / name, b"no image")
    return tmp_path


def put(path: Path, content: bytes = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def load(root: Path | str, **keys: Any) -> Dataset:
    return load_dataset(DatasetConfig(name="folder", path=str(root), **keys), "test")


def parquet(root: Path, split: str = "test", **keys: Any) -> Dataset:
    return load_dataset(
        DatasetConfig(name="parquet", path=str(root), num_classes=2, test=SplitConfig(split=split), **keys), "test"
    )


def write(root: Path, *names: str, label: int = 0) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": pa.array([IMAGE], pa.binary()), "label": [label]}), root / name)


LEFT_OUT = (
    "left out, no images by their names: 1 '.heic' ('test/dog/a.heic'), 1 '.sh' ('test/val.sh'), 2 '.txt' "
    "('test/cat/notes.txt'), 3 folders ('test/__MACOSX/'), 1 hidden ('test/dog/._0.png'), 1 without ending "
    "('test/dog/README')"
)


@pytest.mark.parametrize("store", ["local", "file", "memory"])
def test_junk_is_no_class_and_no_example_and_what_is_left_out_is_named(root: Path, store: str) -> None:
    fsspec.filesystem("memory").put(str(root / "test"), "/junk/test", recursive=True)
    data = load({"local": str(root), "file": f"file://{root}", "memory": "fsspec+memory://junk"}[store])
    fsspec.filesystem("memory").rm("/junk", recursive=True)
    assert data.class_names == ("cat", "dog")
    assert data.example_ids == ("test/cat/0.png", "test/dog/0.JPE")
    assert data.notes == (LEFT_OUT,)


def test_run_warns_of_what_is_left_out_and_notes_it(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse_config(PLAIN | {"dataset": {"name": "folder", "path": str(root)}})
    run = RunDirectory(tmp_path / "run", config)
    with caplog.at_level(logging.WARNING):
        run.data("test")
        run.data("test")
    assert [record.getMessage() for record in caplog.records] == [f"dataset.test: {LEFT_OUT}"]
    assert run.manifest["data"]["test"]["notes"] == [LEFT_OUT]


def test_predict_reads_images_only_and_says_what_it_leaves_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        names, images = open_images(str(root / "test"), parse_config(PLAIN))
    assert names == ("cat/0.png", "dog/0.JPE")
    assert len(images) == 2
    assert "1 '.heic' ('dog/a.heic')" in caplog.text
    caplog.clear()
    assert open_images(str(root / "test/cat/0.png"), parse_config(PLAIN))[0] == ("0.png",)
    assert not caplog.records


def test_hidden_knows_names_of_systems_at_any_depth() -> None:
    assert all(map(hidden, ("a/@eaDir/x.png", "__MACOSX", "a/.b/c", "Thumbs.db", "thumbs.db", "$RECYCLE.BIN/x")))
    assert not any(map(hidden, ("", "a/b.png", "a.b", "eaDir", "lost", "x/thumbs.db.png")))


def test_image_beside_the_class_folders_is_refused(root: Path) -> None:
    put(root / "test/stray.png")
    put(root / "test/stray2.png")
    with pytest.raises(DataError, match=r"test/stray\.png' and 1 more images lie beside the class folders"):
        load(root)


@pytest.mark.parametrize("name", ["a.heic", "a", "a.txt", "deep/a.svg"])
def test_class_whose_files_are_all_left_out_is_refused(root: Path, name: str) -> None:
    put(root / "test/eel" / name)
    with pytest.raises(DataError, match=rf"test/eel' holds files, but no image by its name \('test/eel/{name}'"):
        load(root)
    (root / "test/eel" / name).rename(root / "test/eel/.DS_Store")
    assert load(root).class_names == ("cat", "dog", "eel")  # an empty class is none of its images lost


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/loop", ".."),
        ("cat/self", "."),
        ("cat/up", "../.."),
        ("eel", "cat"),
        ("cat/more", "../dog"),
        ("dog/far", "../../.."),
    ],
)
def test_link_to_a_folder_that_is_there_already_is_refused(root: Path, link: str, target: str) -> None:
    (root / "test" / link).symlink_to(target, target_is_directory=True)
    for address in (str(root), f"file://{root}"):
        with pytest.raises(DataError, match=rf"test/{link}/?' is a link to a folder whose images are there already"):
            load(address)


def test_links_to_what_lies_elsewhere_are_followed(root: Path) -> None:
    put(root / "store/eel/0.png")
    put(root / "store/1.png")
    (root / "test/eel").symlink_to(root / "store/eel")
    (root / "test/cat/1.png").symlink_to(root / "store/1.png")
    data = load(root)
    assert data.example_ids == ("test/cat/0.png", "test/cat/1.png", "test/dog/0.JPE", "test/eel/0.png")
    assert data.image(1).shape == (3, 8, 8)


@pytest.mark.parametrize("target", ["0.png", "../dog/0.JPE", "twice"])
def test_link_to_an_image_that_is_there_already_is_refused(root: Path, target: str) -> None:
    if target == "twice":
        put(root / "store/1.png")
        (root / "test/cat/1.png").symlink_to(root / "store/1.png")
        target = str(root / "store/1.png")
    (root / "test/cat/x.png").symlink_to(target)
    with pytest.raises(DataError, match=r"test/cat/x\.png' is a link to 'test/.*', the same image; remove it"):
        load(root)


def test_image_files_a_link_to_a_file_of_another_kind_is_the_image(root: Path) -> None:
    """As the Hugging Face hub's cache keeps files: blobs without ending, and links with names."""
    put(root / "hub/blobs/0123")
    (root / "hub/snapshots").mkdir()
    (root / "hub/snapshots/a.png").symlink_to("../blobs/0123")
    assert image_files(LocalStorage(str(root)), "hub") == (["hub/snapshots/a.png"], ["hub/blobs/0123"])


def test_broken_links_are_broken_images(root: Path) -> None:
    (root / "test/cat/gone.png").symlink_to("nowhere.png")
    (root / "test/cat/self.png").symlink_to("self.png")
    data = load(root)
    assert data.example_ids[1:3] == ("test/cat/gone.png", "test/cat/self.png")
    for index in (1, 2):
        with pytest.raises(DataError, match="cannot read"):
            data.image(index)


def test_storages_list_the_same(root: Path) -> None:
    fsspec.filesystem("memory").put(str(root / "test"), "/list/test", recursive=True)
    local, memory = LocalStorage(str(root)), open_storage("fsspec+memory://list")
    assert local.files("test") == memory.files("test")
    assert local.folders("test") == memory.folders("test") == ["cat", "dog"]
    assert [path for path in local.files("test") if path.endswith("/")] == [
        "test/__MACOSX/", "test/cat/.thumbs/", "test/cat/@eaDir/",
    ]  # fmt: skip
    fsspec.filesystem("memory").rm("/list", recursive=True)


# Parquet files


@pytest.mark.parametrize(
    ("path", "is_test"),
    [
        ("test.parquet", True), ("test-00000-of-00005.parquet", True), ("data/test-00000-of-00001-0a9f.parquet", True),
        ("test_3.parquet", True), ("test-3.snappy.parquet", True), ("test3.parquet", True), ("test/x.parquet", True),
        ("default/test/0000.parquet", True), ("test_sketch-00000-of-00001.parquet", False),
        ("test-sketch.parquet", False),
        ("test_v2-00000-of-00001.parquet", False), ("testing.parquet", False), ("latest.parquet", False),
        ("train/test_x/0.parquet", False), ("test-a-00000-of-00001.parquet", False),
    ],
)  # fmt: skip
def test_files_of_split_takes_the_split_and_no_other_that_begins_like_it(path: str, is_test: bool) -> None:
    assert files_of_split([path], "test") == [path] * is_test


def test_parquet_split_that_begins_like_another_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, "test-00000-of-00001.parquet", label=1)
    write(tmp_path, "test_sketch-00000-of-00001.parquet", "._test-00000-of-00001.parquet")
    data = parquet(tmp_path)
    assert data.labels.tolist() == [1]
    assert data.notes == ("left out, not of the split 'test' by their names: 'test_sketch-00000-of-00001.parquet'",)
    assert parquet(tmp_path, "test_sketch").labels.tolist() == [0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/test-00000-of-00001.parquet", "b/test-00000-of-00001.parquet"), r"in 2 folders \('a', 'b'\).*dataset\."),
        (("test.parquet", "b/test/0.parquet"), r"in 2 folders \('\.', 'b/test'\)"),
        (("test-00000-of-00002.parquet", "test-00000-of-00003.parquet"), "not the parts of one set"),
        (("test-00000-of-00001.parquet", "test.parquet"), "not the parts of one set"),
        (("test-00000-of-00001-aa.parquet", "test-00000-of-00001-bb.parquet"), "not the parts of one set"),
        (("test.parquet", "test-1.parquet"), "not the parts of one set"),
        (("test.parquet", "test.snappy.parquet"), "not the parts of one set"),
        (("test2017.parquet", "test.parquet"), "not the parts of one set"),
        (("test_0.parquet", "test-1.parquet"), "not the parts of one set"),
        (("test/train.parquet", "test/test.parquet"), "not the parts of one set"),
        (("test-00000-of-00003.parquet", "test-00002-of-00003.parquet"), r"1 of the 3 parts .* the first is number 1"),
    ],
)
def test_parquet_files_that_are_not_one_whole_set_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError, match=rf"dataset\.test: .*{message}"):
        parquet(tmp_path)


def test_parquet_folder_of_its_own_holds_one_set(tmp_path: Path) -> None:
    config = DatasetConfig(name="parquet", num_classes=2, test=SplitConfig(path=str(tmp_path)))
    write(tmp_path, "a.parquet", "b.parquet")
    assert len(load_dataset(config, "test")) == 2
    write(tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="not the parts of one set"):
        load_dataset(config, "test")
    one = SplitConfig(path=str(tmp_path / "test-00000-of-00001.parquet"))
    assert len(load_dataset(config.model_copy(update={"test": one}), "test")) == 1


def test_parquet_images_by_path_alone_are_refused(tmp_path: Path) -> None:
    for column in (
        pa.array([{"path": "a.png"}]),
        pa.array([{"bytes": None, "path": "a.png"}]),
        pa.array([{"bytes": "text", "path": "a.png"}]),
        pa.array(["a.png"]),
    ):
        pq.write_table(pa.table({"image": column, "label": [0]}), tmp_path / "test.parquet")
        with pytest.raises(DataError, match=r"test\.parquet': column 'image' is .*; paths are not followed"):
            parquet(tmp_path)
    typed = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": IMAGE, "path": None}], typed)
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "test.parquet")
    data = parquet(tmp_path)
    with pytest.raises(DataError, match=r"row 0 \(.*the image is empty; .* a path beside it is not followed"):
        data.image(0)
    assert data.image(1).shape == (3, 8, 8)
    assert data.digest() == parquet(tmp_path).digest()  # a run begins without it
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}).slice(0, 0), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"^dataset\.test: this split of parquet holds no example"):
        parquet(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("test-0.parquet", "test-1.parquet", "test-10.parquet"),
        ("test/part-00000-0a9f-c000.snappy.parquet", "test/part-00001-0a9f-c000.snappy.parquet"),
        ("test/0000.parquet", "test/0001.parquet"),
        ("test-00000-of-00002-aa.parquet", "test-00001-of-00002-bb.parquet"),
        ("test/a.parquet", "test/b.parquet"),
    ],
)
def test_parquet_files_of_one_writer_are_one_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path, *names)
    assert len(parquet(tmp_path)) == len(names)
