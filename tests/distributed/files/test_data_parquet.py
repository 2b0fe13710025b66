import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import DatasetConfig, SplitConfig
from core.data import Dataset, Split
from core.data import load_dataset as load_local
from core.errors import ConfigError, DataError
from distributed.files.datasets import load_dataset
from tests.core.data.test_data_cifar import cifar10, write_cifar10
from tests.core.data.test_data_folders import encoded, picture

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(images: list[bytes | None], labels: list[Any], image: str = "image", **others: list[Any]) -> pa.Table:
    """As `datasets` writes it."""
    column = pa.array([{"bytes": content, "path": None} for content in images], IMAGE)
    return pa.table({image: column, "label": labels, **others})


def pngs(num: int, size: tuple[int, int] = (8, 6)) -> tuple[list[bytes | None], list[Any]]:
    pictures = [picture(seed, size) for seed in range(num)]
    return [encoded(image) for image in pictures], [np.asarray(image).transpose(2, 0, 1) for image in pictures]


def own(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(name="parquet", path=str(path), **keys)


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Path, list[Any]]:
    """Two training files with small row groups and one test file."""
    content, pixels = pngs(11)
    labels = [index % 3 for index in range(11)]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pq.write_table(table(content[:4], labels[:4]), folder / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table(content[4:9], labels[4:9]), folder / "train-00001-of-00002.parquet", row_group_size=2)
    pq.write_table(table(content[9:], labels[9:]), folder / "test-00000-of-00001.parquet")
    return tmp_path / "set", pixels


def check(data: Dataset, pixels: list[Any], order: list[int]) -> None:
    for index in order:
        assert np.array_equal(data.image(index), pixels[index])


def test_cifar10_parquet_layout_of_the_hub(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path / "pickles")["test_batch"]
    from PIL import Image

    images = [Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)) for row in written[b"data"]]
    folder = tmp_path / "hub" / "plain_text"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(
            table([encoded(image) for image in images], written[b"labels"], "img"),
            folder / f"{split}-00000-of-00001.parquet",
        )
    config = DatasetConfig(name="cifar10", path=str(tmp_path / "hub"), layout="parquet")
    data, pickles = load_dataset(config, "test"), cifar10(tmp_path / "pickles")
    assert data.example_ids == pickles.example_ids
    assert data.labels.tolist() == pickles.labels.tolist()
    assert (data.num_classes, data.shape) == (10, (3, 32, 32))
    assert all(np.array_equal(data.image(place), pickles.image(place)) for place in range(len(data)))
    assert load_dataset(config, "train").example_ids[1] == "cifar10-train-00001"


def test_imagenet_parquet_layout_of_the_hub_is_resized_and_cropped(tmp_path: Path) -> None:
    content, _ = pngs(2, (300, 280))
    (tmp_path / "data").mkdir()
    pq.write_table(table(content, [999, 3]), tmp_path / "data" / "validation-00000-of-00001.parquet")
    data = load_dataset(DatasetConfig(name="imagenet", path=str(tmp_path), layout="parquet"), "test")
    assert data.example_ids == ("imagenet-validation-00000000", "imagenet-validation-00000001")
    assert (data.labels.tolist(), data.num_classes, data.image(1).shape) == ([999, 3], 1000, (3, 224, 224))
    pq.write_table(table(content, [-1, -1]), tmp_path / "data" / "test-00000-of-00001.parquet")
    hidden = DatasetConfig(name="imagenet", path=str(tmp_path), layout="parquet", test=SplitConfig(split="test"))
    with pytest.raises(DataError, match="has label -1, expected 0 to 999"):
        load_dataset(hidden, "test")


def test_parquet_files_in_order_whatever_the_order_of_asking(hub: tuple[Path, list[Any]]) -> None:
    root, pixels = hub
    train = load_dataset(own(root, num_classes=3), "train")
    test = load_dataset(own(root, num_classes=3), "test")
    assert train.example_ids == tuple(f"parquet-train-{row:08d}" for row in range(9))
    assert test.example_ids == ("parquet-test-00000000", "parquet-test-00000001")
    assert train.labels.tolist() == [index % 3 for index in range(9)]
    check(train, pixels, [*range(9), 8, 0, 3, 4, 7, 2])
    check(test, pixels[9:], [1, 0])
    assert load_dataset(own(root, num_classes=3), "train").digest() == train.digest() != test.digest()


@pytest.mark.parametrize("scheme", ["file://", "fsspec+memory://"])
def test_parquet_on_an_object_store_is_the_same_data_set(hub: tuple[Path, list[Any]], scheme: str) -> None:
    root, pixels = hub
    if scheme == "file://":
        address = f"file://{root}"
    else:
        fsspec.filesystem("memory").put(str(root), "/bucket/set", recursive=True)
        address = "fsspec+memory://bucket/set"
    one, other = (load_dataset(own(path, num_classes=3), "train") for path in (root, address))
    assert (one.example_ids, one.digest()) == (other.example_ids, other.digest())
    check(other, pixels, list(range(9)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_folders_and_pickles_on_an_object_store_are_the_same_data_set(tmp_path: Path, split: Split) -> None:
    from tests.core.data.test_data_folders import write_folders

    write_folders(tmp_path / "images")
    write_cifar10(tmp_path / "cifar" / "cifar-10-batches-py")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/store", recursive=True)
    for keys, name in (({"name": "cifar10"}, "cifar"), ({"name": "imagenet", "num_classes": 3}, "images")):
        local, remote = (
            load_dataset(DatasetConfig(path=f"{root}/{name}", **keys), split)
            for root in (tmp_path, "fsspec+memory://store")
        )
        assert (local.example_ids, local.digest()) == (remote.example_ids, remote.digest())
        assert np.array_equal(local.image(1), remote.image(1))


def test_parquet_columns_of_ones_own(tmp_path: Path) -> None:
    content, pixels = pngs(3)
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    plain = pa.table({"picture": pa.array(content, pa.binary()), "kind": ["cat", "dog", "cat"], "key": ["x", "a", "m"]})
    pq.write_table(plain, tmp_path / "all.parquet")
    config = DatasetConfig(
        name="parquet",
        image_column="picture",
        label_column="kind",
        id_column="key",
        class_file=str(tmp_path / "names.txt"),
        test=SplitConfig(path=str(tmp_path / "all.parquet")),
    )
    data = load_dataset(config, "test")
    assert (data.example_ids, data.labels.tolist(), data.num_classes) == (("x", "a", "m"), [1, 0, 1], 2)
    check(data, pixels, [0, 1, 2])
    (tmp_path / "names.txt").write_text("dog\nbird\n")
    with pytest.raises(
        DataError, match=r"all\.parquet' has 1 of its 2 classes that are none of the run's 2: 'cat'; the run has 'bird'"
    ):
        load_dataset(config, "test")
    with pytest.raises(ConfigError, match=r"labels in column 'kind' are names \('cat'\).*dataset\.class_file"):
        load_dataset(config.model_copy(update={"class_file": None}), "test")
    with pytest.raises(ConfigError, match=r"is one Parquet file; name the files of the splits in dataset\.train\.path"):
        load_dataset(config.model_copy(update={"path": str(tmp_path / "all.parquet"), "test": SplitConfig()}), "test")


def test_parquet_class_names_of_the_hub_give_the_number_of_classes(tmp_path: Path) -> None:
    content, _ = pngs(2)
    features = {"info": {"features": {"label": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"}}}}
    described = table(content, [1, 0]).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(described, tmp_path / "test.parquet")
    assert load_dataset(own(tmp_path), "test").num_classes == 4
    pq.write_table(table(content, [1, 0]), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"set dataset\.num_classes \(labels there: 0 to 1\)"):
        load_dataset(own(tmp_path), "test")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_column": "lable"}, r"no column 'lable'; set dataset\.label_column to one of: image, label"),
        ({"image_column": "img"}, r"no column 'img'; set dataset\.image_column to one of: image, label"),
        ({"id_column": "key"}, r"no column 'key'; set dataset\.id_column to one of: image, label"),
        ({"image_column": "label"}, r"column 'label' is int64, expected encoded images: binary, or a struct"),
        ({"test": SplitConfig(split="validation")}, r"no Parquet files of the split 'validation' .*there: 'data/test-"),
    ],
)
def test_parquet_that_does_not_fit_the_configuration_says_what_is_there(
    hub: tuple[Path, list[Any]], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(own(hub[0], num_classes=3, **keys), "test")


def test_parquet_file_that_is_none_is_named(hub: tuple[Path, list[Any]]) -> None:
    root, _ = hub
    file = root / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet' cannot be read as Parquet"):
        load_dataset(own(root, num_classes=3), "train")
    with pytest.raises(ConfigError, match=r"holds Parquet: load it with distributed\.files\.datasets\.load_dataset"):
        load_local(own(root, num_classes=3), "test")
    with pytest.raises(ConfigError, match=r"cannot open 'nope://x': .*expected a local path or an address"):
        load_dataset(own("nope://x"), "test")
    with pytest.raises(DataError, match=r"gone' is not there; set dataset\.path"):
        load_dataset(own(f"file://{root}/gone"), "test")


def test_parquet_bad_rows_are_named(tmp_path: Path) -> None:
    content, pixels = pngs(4)
    content[1], content[2] = None, b"junk"
    pq.write_table(table(content, [0, 1, 0, 1]), tmp_path / "test.parquet")
    data = load_dataset(own(tmp_path, num_classes=2), "test")
    with pytest.raises(DataError, match=r"-00000001': cannot decode '.*test\.parquet' row 1 \(.*the image is empty"):
        data.image(1)
    with pytest.raises(DataError, match=r"-00000002': cannot decode '.*test\.parquet' row 2 \(.*4 bytes .*junk"):
        data.image(2)
    check(data, pixels, [0, 3])
    pq.write_table(table(content, [0, None, 0, 1]), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet' row 1: 'label' is empty \(null\)"):
        load_dataset(own(tmp_path, num_classes=2), "test")
    pq.write_table(table(content, [0.5, 1, 0, 1]), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"label 0\.5 in column 'label', expected integers or class names"):
        load_dataset(own(tmp_path, num_classes=2), "test")
    pq.write_table(table(content, [0, 1, 0, 1], key=["a", "b", "a", "c"]), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"example ids are not distinct, 'a' is there 2 times"):
        load_dataset(own(tmp_path, num_classes=2, id_column="key"), "test")


def test_parquet_subset_reads_the_right_rows(hub: tuple[Path, list[Any]]) -> None:
    root, pixels = hub
    data = load_dataset(own(root, num_classes=3, train=SplitConfig(every=3)), "train")
    assert data.example_ids == tuple(f"parquet-train-{row:08d}" for row in (0, 3, 6))
    check(data, [pixels[row] for row in (0, 3, 6)], [2, 0, 1])
