"""One list of classes for a run: the label of an image is its class's place in it, whatever the files look like."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import DatasetConfig, SplitConfig, parse_config
from core.data import Dataset, Split
from core.data.classes import in_order, numbers_of
from core.errors import ConfigError, DataError
from distributed.files.datasets import class_names, load_dataset
from distributed.store.run_directory import RunDirectory
from distributed.studies.shift import shifted_config
from tests.core.data.test_data_folders import encoded, picture
from tests.helpers.tampering import edit
from tests.helpers.tiny import PLAIN

IMAGE = encoded(picture(1, (8, 8)))


def write(root: Path, *classes: str, num: int = 1) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(num):
            (root / name / f"{number}.png").write_bytes(encoded(picture(len(name) + number, (8, 8))))
    return root


def folder(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(name="folder", path=str(path), **keys)


def labelled(data: Dataset) -> dict[str, str]:
    """The class name that each example's label stands for, by the folder that it lies in."""
    assert data.class_names is not None
    return {
        example_id.split("/")[1]: data.class_names[label]
        for example_id, label in zip(data.example_ids, data.labels.tolist(), strict=True)
    }


def hub(root: Path, split: str, names: list[str] | None, labels: list[Any], parts: int = 1) -> Path:
    """As `datasets` writes it: integers, and their names in the schema's metadata."""
    root.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array([IMAGE] * len(labels), pa.binary()), "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    for part in range(parts):
        pq.write_table(
            table.slice(part * len(labels) // parts, len(labels) // parts),
            root / f"{split}-{part:05d}-of-{parts:05d}.parquet",
        )
    return root


def parquet(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(name="parquet", path=str(path), **keys)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(number) for number in range(1000)], [str(number) for number in range(1000)]),
        ([str(number) for number in range(1, 103)], [str(number) for number in range(1, 103)]),
        ([f"{number:05d}" for number in range(43)], [f"{number:05d}" for number in range(43)]),
        ([f"{number:02d}" for number in range(120)], [f"{number:02d}" for number in range(120)]),
        (["10", "9", "n2", "n10"], ["10", "9", "n10", "n2"]),  # not all of them numbers: as text
        (["²", "1"], ["1", "²"]),
        ([], []),
    ],
)
def test_in_order_numbers_sort_as_numbers_and_all_else_as_text(names: list[str], expected: list[str]) -> None:
    assert in_order(reversed(names), "here") == tuple(expected)


@pytest.mark.parametrize(
    "names", [["0", "1", "3"], ["1", "01"], ["01", "2"], ["2", "3"], ["0", "00", "1"], ["0001", "0003"]]
)
def test_in_order_numbers_with_gaps_or_in_two_ways_are_refused(names: list[str]) -> None:
    with pytest.raises(DataError, match=r"here: the class folders are numbers, but neither 0 to .*dataset\.class_file"):
        in_order(names, "here")


def test_numbers_of_names_that_are_twice_or_unknown_are_refused() -> None:
    assert numbers_of(["b", "a"], ["a", "x", "b"], "w").tolist() == [2, 0]
    assert numbers_of(["b"], ["crane", "crane", "b"], "w").tolist() == [2]  # what is not asked for may repeat
    with pytest.raises(DataError, match="w: the class name 'crane' is there twice"):
        numbers_of(["b", "crane"], ["crane", "crane", "b"], "w")
    with pytest.raises(DataError, match="w: the class name 'b' is there twice"):
        numbers_of(["b", "b"], ["a", "b"], "w")
    with pytest.raises(DataError, match="w has 1 of its 2 classes that are none of the run's 2: 'c'; the run has 'a'"):
        numbers_of(["b", "c"], ["a", "b"], "w")


def test_dataset_class_names_of_another_number_are_refused() -> None:
    images = np.zeros((1, 1, 8, 8), np.uint8)
    with pytest.raises(DataError, match="1 class names, expected 2"):
        Dataset("x", ("a",), images, np.array([0]), 2, ("cat",))


def test_numbered_folders_have_their_number_as_label(tmp_path: Path) -> None:
    write(tmp_path / "test", *map(str, range(12)))
    data = load_dataset(folder(tmp_path), "test")
    assert [int(example_id.split("/")[1]) for example_id in data.example_ids] == data.labels.tolist()
    assert sorted(data.labels.tolist()) == list(range(12))


def test_run_that_was_begun_with_folders_numbered_as_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train", *map(str, range(12)))
    config = parse_config(PLAIN | {"dataset": {"name": "folder", "path": str(tmp_path / "set")}})
    directory = RunDirectory(tmp_path / "run", config)
    data = directory.data("train")
    as_text = sorted(map(str, range(12)))
    old = np.array([as_text.index(example_id.split("/")[1]) for example_id in data.example_ids])
    before = Dataset(data.name, data.example_ids, data.images, old, 12)
    noted = {"train": {"digest": before.digest(), "examples": 12, "classes": 12, "shape": [3, 8, 8]}}
    edit(tmp_path / "run", lambda manifest: manifest.update(data=noted))
    with pytest.raises(ConfigError, match=r"dataset.train: this is not the data set .* read it otherwise"):
        RunDirectory(tmp_path / "run", config).data("train")


def test_splits_in_two_places_have_one_list_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", "bee", "cat", "dog")
    write(tmp_path / "b", "cat", "dog")
    config = DatasetConfig(
        name="folder", train=SplitConfig(path=str(tmp_path / "a")), test=SplitConfig(path=str(tmp_path / "b"))
    )
    test, train = load_dataset(config, "test"), load_dataset(config, "train")
    assert test.class_names == train.class_names == ("bee", "cat", "dog")
    for data in (test, train):
        assert all(name == own for name, own in labelled(data).items())


def test_split_that_is_not_there_is_needed_unless_the_number_of_classes_is_known(tmp_path: Path) -> None:
    write(tmp_path / "test", "cat", "dog")
    gone = SplitConfig(path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone' is not there"):
        load_dataset(folder(tmp_path, train=gone), "test")
    assert load_dataset(folder(tmp_path, train=gone, num_classes=2), "test").class_names == ("cat", "dog")
    with pytest.raises(DataError, match="has 2 class folders, expected 3"):
        load_dataset(folder(tmp_path, train=gone, num_classes=3), "test")


def test_corrupted_folders_beside_parquet_of_other_names_go_by_number(tmp_path: Path) -> None:
    """ImageNet-C's folders are WordNet's ids, the hub's Parquet files have words."""
    write(tmp_path / "c" / "fog" / "1", "n01", "n02")
    hub(tmp_path / "clean", "train", ["cat", "dog"], [1, 0])
    config = DatasetConfig(
        name="imagenet-c", path=str(tmp_path / "c"), corruption="fog", severity=1, layout="parquet", num_classes=2,
        train=SplitConfig(path=str(tmp_path / "clean")),
    )  # fmt: skip
    assert load_dataset(config, "train").labels.tolist() == [1, 0]
    assert load_dataset(config, "test").class_names == ("n01", "n02")


def test_test_class_that_training_lacks_is_refused_unless_the_number_of_classes_says_it_is_one(tmp_path: Path) -> None:
    write(tmp_path / "train", "cat", "dog")
    write(tmp_path / "test", "Dog", "cat")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"the test split in .* none of the run's 2: 'Dog'; the run has 'dog'"):
            load_dataset(folder(tmp_path), split)
        with pytest.raises(DataError, match="has 3 class folders, expected 2"):
            load_dataset(folder(tmp_path, num_classes=2), split)
    data = load_dataset(folder(tmp_path, num_classes=3), "train")
    assert (data.class_names, data.labels.tolist()) == (("Dog", "cat", "dog"), [1, 2])


@pytest.mark.parametrize("names", [["dog", "cat", "bee"], ["cat", "dog"], ["bee", "cat", "dog"]])
def test_parquet_test_names_in_another_order_or_fewer_are_mapped_by_name(tmp_path: Path, names: list[str]) -> None:
    hub(tmp_path, "train", ["bee", "cat", "dog"], [0, 1, 2])
    hub(tmp_path, "test", names, [0, 1, 1, 0], parts=2)
    train, test = (load_dataset(parquet(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("bee", "cat", "dog")
    assert train.labels.tolist() == [0, 1, 2]
    assert [train.class_names[label] for label in test.labels.tolist()] == [names[0], names[1], names[1], names[0]]


def test_parquet_test_names_that_training_lacks_are_refused(tmp_path: Path) -> None:
    hub(tmp_path, "train", ["bee", "cat"], [0, 1])
    hub(tmp_path, "test", ["bee", "horse"], [0, 1])
    with pytest.raises(DataError, match=r"the test split in .* has 1 of its 2 .*: 'horse'; the run has 'cat'"):
        load_dataset(parquet(tmp_path), "test")
    hub(tmp_path, "test", ["cat"], [0])
    with pytest.raises(DataError, match=r"name 2 classes, expected 5; drop dataset\.num_classes"):
        load_dataset(parquet(tmp_path, num_classes=5), "train")


def test_parquet_label_that_the_names_do_not_reach_is_refused_by_row(tmp_path: Path) -> None:
    hub(tmp_path, "train", ["bee", "cat", "dog"], [0, 1])
    hub(tmp_path, "test", ["cat", "dog"], [0, 2])
    with pytest.raises(DataError, match=r"row 1: label 2, expected 0 to 1 \(it names 2 classes\)"):
        load_dataset(parquet(tmp_path), "test")


def test_parquet_parts_that_number_their_classes_differently_are_mapped_by_name(tmp_path: Path) -> None:
    for part, names in enumerate((["bee", "cat"], ["cat", "bee"])):
        hub(tmp_path / "x", "test", names, [0, 1, 1])
        (tmp_path / "x" / "test-00000-of-00001.parquet").rename(tmp_path / f"test-{part:05d}-of-00002.parquet")
    data = load_dataset(parquet(tmp_path), "test")
    assert (data.class_names, data.labels.tolist()) == (("bee", "cat"), [0, 1, 1, 1, 0, 0])


def test_class_file_renumbers_named_labels_and_a_contradiction_is_refused(tmp_path: Path) -> None:
    hub(tmp_path / "set", "test", ["bee", "cat"], [0, 1])
    file = tmp_path / "classes.txt"
    file.write_text("cat\nbee\n")
    config = parquet(tmp_path / "set", class_file=str(file))
    data = load_dataset(config, "test")
    assert (data.class_names, data.labels.tolist()) == (("cat", "bee"), [1, 0])
    file.write_text("Biene\nKatze\n")
    with pytest.raises(DataError, match=r"2 of its 2 classes .*: 'bee', 'cat'; the run has 'Biene'"):
        load_dataset(config, "test")


def test_class_file_with_a_repeated_name_is_no_error_where_labels_are_numbers(tmp_path: Path) -> None:
    """ImageNet's 134 and 517 are both cranes."""
    file = tmp_path / "classes.txt"
    file.write_text("crane\nbee\ncrane\n")
    config = parquet(tmp_path / "set", class_file=str(file))
    for names in (None, ["crane", "bee", "crane"]):
        hub(tmp_path / "set", "test", names, [0, 1, 2])
        data = load_dataset(config, "test")
        assert (data.class_names, data.labels.tolist()) == (("crane", "bee", "crane"), [0, 1, 2])
    hub(tmp_path / "set", "test", None, ["bee", "crane"])
    with pytest.raises(DataError, match="the class name 'crane' is there twice"):
        load_dataset(config, "test")
    write(tmp_path / "folders" / "test", "bee", "crane")
    with pytest.raises(DataError, match="the class name 'crane' is there twice"):
        load_dataset(folder(tmp_path / "folders", class_file=str(file)), "test")


def test_parquet_numbers_without_names_beside_a_named_split_are_noted(tmp_path: Path) -> None:
    hub(tmp_path, "train", ["bee", "cat"], [0, 1])
    hub(tmp_path, "test", None, [1, 0])
    data = load_dataset(parquet(tmp_path), "test")
    assert (data.class_names, data.labels.tolist()) == (("bee", "cat"), [1, 0])
    assert data.notes == ("labels without names, taken for those of the other split",)


def test_cifar10_parquet_in_another_order_goes_by_name(tmp_path: Path) -> None:
    from core.data.cifar import CLASSES

    hub(tmp_path, "test", list(CLASSES[::-1]), [0, 9, 3])
    pq.write_table(pq.read_table(tmp_path / "test-00000-of-00001.parquet"), tmp_path / "train.parquet")
    keys: dict[str, Any] = {"name": "cifar10", "layout": "parquet", "image_column": "image", "path": str(tmp_path)}
    assert load_dataset(DatasetConfig(**keys), "test").labels.tolist() == [9, 0, 6]


def test_class_file_and_ids_file_with_a_mark_or_another_unicode_form_name_the_same(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path / "train", composed, "zoo")
    write(tmp_path / "test", decomposed, "zoo")
    data = load_dataset(folder(tmp_path), "test")
    assert (data.class_names, data.labels.tolist()) == ((composed, "zoo"), [0, 1])
    names, ids = tmp_path / "classes.txt", tmp_path / "ids.txt"
    names.write_bytes(b"\xef\xbb\xbf" + f"zoo\r\n{decomposed}\r\n".encode())
    ids.write_bytes(b"\xef\xbb\xbf" + f"test/{composed}/0.png\n".encode())
    config = folder(tmp_path, class_file=str(names), test=SplitConfig(ids_file=str(ids)))
    data = load_dataset(config, "test")
    assert (data.class_names, data.example_ids) == (("zoo", composed), (f"test/{decomposed}/0.png",))
    write(tmp_path / "test", composed)
    with pytest.raises(DataError, match=f"the class name '{composed}' is there twice"):
        load_dataset(folder(tmp_path), "test")


def test_file_and_folder_names_that_are_not_utf8_lose_nothing(tmp_path: Path) -> None:
    write(tmp_path / "test", "cat")
    root = str(tmp_path / "test").encode()
    for raw in (root + b"/cat/caf\xe9.png", root + b"/z\xfc/0.png"):
        path = Path(raw.decode("utf-8", "surrogateescape"))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(IMAGE)
    for address in (str(tmp_path), f"file://{tmp_path}"):
        data = load_dataset(folder(address), "test")
        assert data.example_ids == ("test/cat/0.png", "test/cat/caf\\xe9.png", "test/z\\xfc/0.png")
        assert (data.class_names, data.labels.tolist()) == (("cat", "z\\xfc"), [0, 0, 1])
        assert len(data.digest()) == 16
        assert [data.image(index).shape for index in range(3)] == [(3, 8, 8)] * 3


# In a run


def begun(tmp_path: Path, **keys: Any) -> RunDirectory:
    hub(tmp_path / "set", "train", ["bee", "cat"], [0, 1])
    hub(tmp_path / "set", "test", ["cat", "bee"], [0, 1])
    dataset = {"name": "parquet", "path": str(tmp_path / "set"), **keys}
    return RunDirectory(tmp_path / "run", parse_config(PLAIN | {"dataset": dataset}))


def test_run_directory_notes_its_classes_and_refuses_others(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for split in ("train", "test"):
        run.data(split)
    noted = RunDirectory(tmp_path / "run", None).manifest["data"]
    assert noted["class_names"] == ["bee", "cat"]
    edit(tmp_path / "run", lambda manifest: manifest["data"].pop("class_names"))  # a run of an earlier version
    RunDirectory(tmp_path / "run", None).data("test")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["data"] == noted
    hub(tmp_path / "set", "train", ["bee", "horse"], [0, 1])
    hub(tmp_path / "set", "test", ["horse", "bee"], [0, 1])
    with pytest.raises(ConfigError, match=r"2 classes are not the 2 that .*: number 1 is 'cat' there, 'horse' now"):
        RunDirectory(tmp_path / "run", None).data("train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_names_are_those_of_the_data_set(tmp_path: Path, split: Split) -> None:
    config = begun(tmp_path).config.dataset
    assert class_names(config) == load_dataset(config, split).class_names == ("bee", "cat")
    assert class_names(DatasetConfig()) == load_dataset(DatasetConfig(), split).class_names == tuple("0123456789")


def test_corrupted_set_of_other_classes_than_the_run_that_lends_its_networks_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "set" / split, "n01", "n02")
    dataset = {"name": "imagenet", "path": str(tmp_path / "set"), "num_classes": 2, "resize": 8, "crop": 8}
    run = RunDirectory(tmp_path / "run", parse_config(PLAIN | {"dataset": dataset}))
    run.data("test")

    def shifted(corruption: str) -> RunDirectory:
        config = shifted_config(run.config, corruption, 1, str(tmp_path / "c"))
        directory = RunDirectory(tmp_path / "run" / "shift" / f"{corruption}-1", config)
        directory.borrow(run, [])
        return directory

    write(tmp_path / "c" / "fog" / "1", "n01", "n02")
    write(tmp_path / "c" / "snow" / "1", "n01", "n03")
    assert shifted("fog").data("test").class_names == ("n01", "n02")
    with pytest.raises(ConfigError, match="number 1 is 'n02' there, 'n03' now"):
        shifted("snow").data("test")


def test_parquet_part_without_names_beside_a_named_one_is_refused(tmp_path: Path) -> None:
    """By number it would contradict its neighbour, whose labels go by name."""
    hub(tmp_path, "train", ["bee", "cat"], [0, 1])
    for part, names in enumerate((["cat", "bee"], None)):
        hub(tmp_path / "x", "test", names, [0, 1])
        (tmp_path / "x" / "test-00000-of-00001.parquet").rename(tmp_path / f"test-{part:05d}-of-00002.parquet")
    with pytest.raises(DataError, match=r"test-00001-of-00002\.parquet' does not name the classes .*'cat', 'bee'"):
        load_dataset(parquet(tmp_path), "test")


def test_parquet_label_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    hub(tmp_path, "test", None, pa.array([0, 2**64 - 1], pa.uint64()))
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet': a label in column 'label' is beyond 64 bits"):
        load_dataset(DatasetConfig(name="parquet", num_classes=2, test=SplitConfig(path=str(tmp_path))), "test")


def test_class_without_any_image_is_named(tmp_path: Path) -> None:
    """An empty folder, or a comment in a class file, moves the numbers of the others."""
    write(tmp_path / "test", "bee", "cat")
    (tmp_path / "test" / "ant").mkdir()
    data = load_dataset(folder(tmp_path, num_classes=3), "test")
    assert data.labels.tolist() == [1, 2]
    assert data.notes == ("no image of 1 of its 3 classes: 'ant'",)
    file = tmp_path / "classes.txt"
    file.write_text("# classes\nant\nbee\ncat\n")
    data = load_dataset(folder(tmp_path, class_file=str(file)), "test")
    assert data.notes == ("no image of 2 of its 4 classes: '# classes', 'ant'",)


def test_class_file_line_ends_where_files_end_lines_and_nowhere_else(tmp_path: Path) -> None:
    write(tmp_path / "test", "bee", "c\u2028at")
    file = tmp_path / "classes.txt"
    file.write_bytes("bee\r\nc\u2028at\r\n".encode())
    assert load_dataset(folder(tmp_path, class_file=str(file)), "test").class_names == ("bee", "c\u2028at")


def split(root: Path, name: str, seed: int) -> Path:
    """Two classes of two images."""
    for number, kind in enumerate(("bee", "bee", "cat", "cat")):
        (root / name / kind).mkdir(parents=True, exist_ok=True)
        (root / name / kind / f"{number}.png").write_bytes(encoded(picture(seed + number, (8, 8))))
    return root / name


@pytest.mark.parametrize("kind", ["the same split", "path", "link", "copy", "two sets of one name"])
def test_run_whose_splits_share_examples_is_refused(tmp_path: Path, kind: str) -> None:
    """The same images would be certified that the networks learnt, or with the noise that they learnt from."""
    train, test = split(tmp_path, "train", 0), tmp_path / "test"
    part: dict[str, Any] = {}
    match kind:
        case "the same split":
            part, message = {"test": {"split": "train"}}, r"share 4 example ids \('train/bee/0\.png'\), .* same noise"
        case "path":
            part, message = {"test": {"path": f"{train}/"}}, r"share all 4 images, as 'test/bee/0\.png' and 'train/bee/"
        case "link":
            test.symlink_to(train)
            message = "share all 4 images"
        case "copy":
            split(tmp_path, "test", 0)
            message = "share all 4 images"
        case _:
            split(tmp_path / "b", "train", 50)
            part = {"train": {"path": str(tmp_path), "split": "train"}, "test": {"path": f"{tmp_path}/b"}}
            part["test"]["split"], message = "train", "share 4 example ids"
    run = RunDirectory(
        tmp_path / "run", parse_config({**PLAIN, "dataset": part | {"name": "folder", "path": str(tmp_path)}})
    )
    run.data("train")
    with pytest.raises(ConfigError, match=rf"dataset\.test: the training and the test split {message}"):
        run.data("test")


def test_run_whose_splits_are_parts_of_one_is_no_error(tmp_path: Path) -> None:
    split(tmp_path, "all", 0)
    parts: dict[str, Any] = {}
    for key, names in (("train", ("bee/0", "cat/2")), ("test", ("bee/1", "cat/3"))):
        (tmp_path / key).write_text("".join(f"all/{name}.png\n" for name in names))
        parts[key] = {"split": "all", "ids_file": str(tmp_path / key)}
    run = RunDirectory(
        tmp_path / "run", parse_config({**PLAIN, "dataset": parts | {"name": "folder", "path": str(tmp_path)}})
    )
    assert not set(run.data("train").example_ids) & set(run.data("test").example_ids)
