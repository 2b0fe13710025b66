import gzip
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from core.config import DatasetConfig, SplitConfig, parse_config
from core.data import Dataset, Split
from core.data.loading import preparation
from core.errors import ConfigError, DataError
from distributed.files.datasets import load_dataset

RNG = np.random.default_rng(0)
SPLITS: tuple[Split, ...] = ("train", "test")
IMAGES: dict[str, Any] = {
    "train": RNG.integers(0, 256, (12, 5, 4), dtype=np.uint8),
    "test": RNG.integers(0, 256, (4, 5, 4), np.uint8),
}
LABELS: dict[str, Any] = {"train": np.array([2, 0, 1, 3] * 3), "test": np.array([3, 1, 1, 0])}


def idx(array: NDArray[Any]) -> bytes:
    """By the published description: two zero bytes, 8 for unsigned bytes, the axes, their lengths, the numbers."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + bytes(array.reshape(-1).tolist())


def write_idx(
    folder: Path, train: str = "train", test: str = "t10k", form: str = "-idx{}-ubyte.gz", add: int = 0
) -> None:
    folder.mkdir(exist_ok=True)
    for split, name in (("train", train), ("test", test)):
        for what, axes, array in (("images", 3, IMAGES[split]), ("labels", 1, LABELS[split] + add)):
            file = f"{name}-{what}{form.format(axes)}"
            (folder / file).write_bytes(gzip.compress(idx(array), mtime=0) if file.endswith(".gz") else idx(array))


def load(name: str, path: Path | str, split: Split = "test", **keys: Any) -> Dataset:
    return load_dataset(DatasetConfig(name=name, path=str(path), **keys), split)  # type: ignore[arg-type]


def check(data: Dataset, split: Split, images: NDArray[Any] | None = None) -> None:
    assert np.array_equal(np.asarray(data.images), IMAGES[split][:, None] if images is None else images)
    assert data.labels.tolist() == LABELS[split].tolist()
    assert (data.num_classes, data.class_names) == (4, None)


@pytest.mark.parametrize("form", ["-idx{}-ubyte.gz", "-idx{}-ubyte", ".idx{}-ubyte", ".idx{}-ubyte.gz"])
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_idx_files_as_published_give_images_labels_and_ids(tmp_path: Path, form: str, test: str) -> None:
    write_idx(tmp_path, test=test, form=form)
    (tmp_path / "._emnist-mnist-train-images-idx3-ubyte").write_bytes(b"left by a file manager")
    data = load("idx", tmp_path)
    check(data, "test")
    check(load("idx", tmp_path, "train"), "train")
    assert data.example_ids[::3] == ("idx-test-00000000", "idx-test-00000003")
    assert data.notes == ()


def test_idx_content_decides_what_is_packed_and_copies_must_agree(tmp_path: Path) -> None:
    write_idx(tmp_path)
    packed = tmp_path / "t10k-images-idx3-ubyte.gz"
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(packed.read_bytes())
    packed.write_bytes(idx(IMAGES["test"]))
    check(load("idx", tmp_path), "test")
    packed.write_bytes(idx(IMAGES["test"] ^ 1))
    with pytest.raises(DataError, match=r"images-idx3-ubyte' and .*ubyte.gz' do not hold the same images; remove one"):
        load("idx", tmp_path)


def test_idx_and_npz_on_an_object_store_read_the_same(tmp_path: Path) -> None:
    write_idx(tmp_path / "set")
    np.savez(tmp_path / "set.npz", **{f"{key}_{split}": values for split in ("train", "test") for key, values in
                                      (("x", IMAGES[split]), ("y", LABELS[split]))})  # fmt: skip
    fsspec.filesystem("memory").put(str(tmp_path), "/arrays", recursive=True)
    for split in SPLITS:
        check(load("idx", "fsspec+memory://arrays/set", split), split)
        check(load("npz", "fsspec+memory://arrays/set.npz", split, color="grey"), split)


def test_idx_emnist_is_turned_upright_and_letters_count_from_one(tmp_path: Path) -> None:
    write_idx(tmp_path, "emnist-letters-train", "emnist-letters-test", add=1)
    data = load("idx", tmp_path)
    check(data, "test", IMAGES["test"].transpose(0, 2, 1)[:, None])
    assert data.notes == ("EMNIST stores images transposed: turned upright", "labels 1 to 4 became 0 to 3")
    assert load("idx", tmp_path, num_classes=4).labels.tolist() == LABELS["test"].tolist()
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    named = load("idx", tmp_path, class_file=str(names))
    assert (named.labels.tolist(), named.class_names) == (LABELS["test"].tolist(), ("a", "b", "c", "d"))
    names.write_text("none\na\nb\nc\nd\n")  # as torchvision has them
    assert load("idx", tmp_path, class_file=str(names)).labels.tolist() == (LABELS["test"] + 1).tolist()


def test_idx_two_sets_in_one_folder_are_refused_until_split_names_one(tmp_path: Path) -> None:
    write_idx(tmp_path, "emnist-letters-train", "emnist-letters-test", add=1)
    for train, test in (("emnist-digits-train", "emnist-digits-test"), ("train", "t10k")):
        write_idx(tmp_path, train, test)
        with pytest.raises(DataError, match=r"several sets \('emnist-digits-test'.*set dataset\.train\.split"):
            load("idx", tmp_path)
    parts: dict[str, Any] = {key: SplitConfig(split=f"emnist-letters-{key}") for key in ("train", "test")}
    data = load("idx", tmp_path, **parts)
    check(data, "test", IMAGES["test"].transpose(0, 2, 1)[:, None])
    assert data.example_ids[0] == "idx-emnist-letters-test-00000000"


def test_idx_mixed_splits_of_two_sets_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "emnist-digits-train", "t10k")
    for split in SPLITS:
        with pytest.raises(DataError, match=r"several sets \('emnist-digits-train', 't10k'\)"):
            load("idx", tmp_path, split)


GOOD = idx(IMAGES["test"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"ubyte' begins with nothing, expected an idx file of unsigned bytes with 3 axes \(00000803\)"),
        (GOOD[:15], r"begins with 00000803, expected an idx"),
        (idx(LABELS["test"]) + bytes(16), r"begins with 00000801, expected"),
        (b"\0\0\x0d\3" + GOOD[4:], r"begins with 00000d03"),
        (GOOD[:-1], r"holds only 79 bytes, expected 80 as its header says \(4, 5, 4\); get it anew"),
        (GOOD + b"\0", r"holds more bytes, expected 80 as"),
        (gzip.compress(GOOD[:-1], mtime=0), r"holds only 79 bytes"),
        (gzip.compress(GOOD + bytes(1000), mtime=0), r"holds more bytes"),
        (gzip.compress(GOOD, mtime=0)[:-9], r"is not a whole gzip file"),
        (gzip.compress(GOOD, mtime=0)[:-5] + b"\1" + gzip.compress(GOOD, mtime=0)[-4:], r"is not a whole gzip file"),
        (gzip.compress(GOOD, mtime=0) + b"junk", r"is not a whole gzip file"),
        (b"\0\0\x08\3" + b"\xff" * 12, r"holds only 0 bytes, expected 79,228,162,458,924,105,385,300,197,375"),
        (gzip.compress(b"\0\0\x08\3" + b"\xff" * 12, mtime=0), r"holds only 0 bytes, expected 79,228"),
        (idx(IMAGES["train"]), r"holds uint8 \(12, 5, 4\), expected 4 images, as many as labels"),
        (idx(IMAGES["test"][:, :0]), r"holds uint8 \(4, 0, 4\), expected 4 images"),
        (idx(IMAGES["test"] % 2), r"no pixel is above 1: is white 1 or 255\?"),
    ],
)
def test_idx_wrong_images_say_what_they_hold(tmp_path: Path, content: bytes, message: str) -> None:
    write_idx(tmp_path, form="-idx{}-ubyte")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("idx", tmp_path)


def test_idx_bomb_is_not_unpacked_beyond_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(GOOD + bytes(50_000_000), mtime=0))
    asked, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size))  # type: ignore[func-returns-value]
    with pytest.raises(DataError, match="holds more bytes"):
        load("idx", tmp_path)
    assert asked[-2:] == [16, 81]


def test_idx_missing_files_say_what_is_there(tmp_path: Path) -> None:
    write_idx(tmp_path / "raw")
    with pytest.raises(
        DataError, match=r"no t10k-labels-idx1-ubyte \(or \.gz\) in .*: 'raw/t10k-images-idx3-ubyte.gz'"
    ):
        load("idx", tmp_path)
    for file in (tmp_path / "raw").glob("train-*"):
        file.unlink()
    with pytest.raises(DataError, match=r"no train-labels-idx1-ubyte"):
        load("idx", tmp_path / "raw")
    assert load("idx", tmp_path / "raw", num_classes=5).num_classes == 5
    test_only = DatasetConfig(name="idx", test=SplitConfig(path=str(tmp_path / "raw")))
    with pytest.raises(DataError, match=r"3 labels occur, from 0 to 3, expected all of 0 to 2 or 1 to 3; set"):
        load_dataset(test_only, "test")


@pytest.mark.parametrize(
    ("train", "num_classes", "expected"),
    [
        ([0, 1, 2, 3], None, (0, 4)),
        ([1, 2, 3], None, (1, 3)),
        ([1, 2, 3], 4, (0, 4)),
        ([1, 3], 3, (1, 3)),
        ([0, 2, 3], None, r"3 labels occur, from 0 to 3, expected all of 0 to 2 or 1 to 3"),
        ([1, 2, 4], None, r"expected all of 0 to 2 or 1 to 3"),
        ([2, 3], None, r"expected all of 0 to 1 or 1 to 2"),
        ([0, 1, 2, 3], 3, r"4 labels occur, from 0 to 3, expected 0 to 2 or 1 to 3"),
        ([-1, 1, 2], None, r"holds label -1, expected labels from 0 or 1 on"),
    ],
)
def test_labels_count_from_one_only_where_the_last_class_says_so(
    tmp_path: Path, train: list[int], num_classes: int | None, expected: Any
) -> None:
    images = RNG.integers(0, 256, (len(train), 5, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=train, x_test=images[:1], y_test=train[1:2])
    config = DatasetConfig(name="npz", path=str(tmp_path / "a.npz"), num_classes=num_classes, color="grey")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load_dataset(config, "train")
        return
    first, num = expected
    for split, labels in (
        ("train", train),
        ("test", train[1:2]),
    ):  # one rule for both, which the test split cannot tell
        data = load_dataset(config, split)  # type: ignore[arg-type]
        assert (data.labels.tolist(), data.num_classes) == ([label - first for label in labels], num)


@pytest.mark.parametrize(
    "names", ["x_{} y_{}", "X-{} Y-{}", "{}_images {}_labels", "{}-data {}-target", "{}_image {}_label"]
)
@pytest.mark.parametrize("archive", [True, False])
def test_npz_names_as_people_give_them(tmp_path: Path, names: str, archive: bool) -> None:
    arrays: dict[str, Any] = {
        name.format(split.upper() if name[0] == "X" else split): values
        for split in ("train", "test", "val")
        for name, values in zip(
            names.split(), (IMAGES.get(split, IMAGES["train"][::-1]), LABELS.get(split, LABELS["train"])), strict=True
        )
    }
    path = tmp_path / ("set.npz" if archive else "set")
    if archive:
        np.savez_compressed(path, **arrays)
    else:
        path.mkdir()
        for name, values in arrays.items():
            np.save(path / f"{name}.npy", values)
    check(load("npz", path, "train", color="grey"), "train")
    check(load("npz", path, color="grey"), "test")
    data = load("npz", path, color="grey", test=SplitConfig(split="val"))
    assert np.array_equal(np.asarray(data.images), IMAGES["train"][::-1, None])
    assert data.example_ids[0] == "npz-val-00000000"


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "target"), ("arr_0", "arr_1")])
def test_npz_file_of_one_split_needs_no_name_of_it(tmp_path: Path, names: tuple[str, str]) -> None:
    for split in SPLITS:
        np.savez(tmp_path / f"{split}.npz", **dict(zip(names, (IMAGES[split], LABELS[split]), strict=True)))
    parts = {split: SplitConfig(path=str(tmp_path / f"{split}.npz")) for split in ("train", "test")}
    check(load_dataset(DatasetConfig(name="npz", color="grey", **parts), "test"), "test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"holds 0 arrays of images and 0 of labels of the split 'test' by their names"):
        load("npz", tmp_path / "test.npz")


def test_npz_names_that_leave_a_choice_are_refused(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"x_test": IMAGES["test"], "test_images": IMAGES["test"], "y_test": LABELS["test"]}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"holds 2 arrays of images and 1 of labels .*there: 'x_test', 'test_images'"):
        load("npz", tmp_path / "a.npz")
    part = DatasetConfig(name="npz", test=SplitConfig(path=str(tmp_path / "b.npz")), color="grey")
    np.savez(tmp_path / "b.npz", test_images=IMAGES["test"], labels=LABELS["test"])
    with pytest.raises(DataError, match=r"holds 1 arrays of images and 0 of labels"):
        load_dataset(part, "test")
    np.savez(tmp_path / "b.npz", x_train=IMAGES["test"], y_train=LABELS["test"])
    with pytest.raises(DataError, match=r"holds 0 arrays of images and 0 of labels of the split 'test'"):
        load_dataset(part, "test")


COLOR = RNG.integers(0, 256, (4, 3, 5, 6), np.uint8)


def npz(tmp_path: Path, images: Any, labels: Any = LABELS["test"], **keys: Any) -> Dataset:
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    part = SplitConfig(path=str(tmp_path / "a.npz"))
    return load_dataset(DatasetConfig(name="npz", test=part, num_classes=4, **keys), "test")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("column", [False, True])
def test_npz_axes_and_types_come_out_as_the_same_bytes(tmp_path: Path, dtype: Any, column: bool) -> None:
    labels = LABELS["test"].astype(">i2").reshape(-1, *(1,) * column)

    def given(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        return pixels if dtype is np.uint8 else (pixels / 255).astype(dtype)

    for images in (COLOR, COLOR.transpose(0, 2, 3, 1), np.asfortranarray(COLOR)):
        check(npz(tmp_path, given(images), labels), "test", COLOR)
    for images in (COLOR[:, 0], COLOR[:, :1], COLOR[:, 0, :, :, None]):
        check(npz(tmp_path, given(images), labels, color="grey"), "test", COLOR[:, :1])


SCALE = COLOR / 255


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (COLOR[:, :, :, :3], None, r"uint8 \(4, 3, 5, 3\): either the first or the last axis of an image may be"),
        (np.repeat(COLOR, 2, 1), None, r"uint8 \(4, 6, 5, 6\): no axis of an image is its channels"),
        (COLOR.reshape(4, -1), None, r"uint8 \(4, 90\), expected 4 images, as many as labels"),
        (COLOR[:3], None, r"uint8 \(3, 3, 5, 6\), expected 4 images"),
        (COLOR.astype(np.int64), None, r"int64 \(4, 3, 5, 6\), expected uint8 \(0 to 255\), or floats in \[0, 1\]"),
        (COLOR > 9, None, r"holds bool .*, expected uint8"),
        (COLOR % 2, None, r"no pixel is above 1"),
        (COLOR.astype(np.float32), None, r"image 0 spans \[.*\], expected \[0, 1\]; store uint8"),
        (np.where(SCALE[2, 1, 1, 1] == SCALE, np.nan, SCALE), None, r"spans \[nan, nan\]"),
        (SCALE * 2 - 1, None, r"spans \[-0?\.?\d*.*expected \[0, 1\]"),
        (SCALE * 0.99, None, r"image 0 has a pixel 0\.\d+ grey levels from the next of 8 bits; rounding is a choice"),
        (COLOR, LABELS["test"] / 1, r"labels\.npy' holds float64 \(4,\), expected labels as integers \(N,\) or \(N, 1"),
        (COLOR, np.eye(4, dtype=int), r"int64 \(4, 4\), expected labels .*argmax"),
        (COLOR, 3, r"int64 \(\), expected labels"),
        (COLOR, np.zeros(0, int), r"holds no label"),
        (COLOR, np.full(4, 2**64 - 1, np.uint64), r"holds label -1"),
    ],
)
def test_npz_wrong_arrays_say_what_they_hold(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        npz(tmp_path, images, LABELS["test"] if labels is None else labels)


def test_npz_color_must_be_that_of_the_arrays(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds grey images, expected rgb; set dataset\.color=grey"):
        npz(tmp_path, COLOR[:, 0])
    with pytest.raises(DataError, match=r"holds rgb images, expected grey; set dataset\.color=rgb"):
        npz(tmp_path, COLOR, color="grey")
    for name, color in (("idx", "grey"), ("npz", "rgb")):  # of what jobs.predict reads for such a run
        assert preparation(DatasetConfig(name=name, path="x")).color == color  # type: ignore[arg-type]


def test_npz_objects_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.npy' is not a whole NumPy array: Object arrays cannot be loaded"):
        npz(tmp_path, COLOR, np.array([{}] * 4, dtype=object))
    stream = io.BytesIO()
    np.save(stream, LABELS["test"])
    for content, message in (
        (stream.getvalue()[:-1], r"labels\.npy' is not a whole NumPy array"),
        (stream.getvalue() + b"\0\0", r"labels\.npy' holds 2 bytes after its array"),
        (stream.getvalue().replace(b"(4,)", b"(9999999999999999,)"), r"labels\.npy' is not a whole NumPy array"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", b"")
            archive.writestr("labels.npy", content)
        config = DatasetConfig(name="npz", test=SplitConfig(path=str(tmp_path / "a.npz")))
        with pytest.raises(DataError, match=message):
            load_dataset(config, "test")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"a\.npz' is not an \.npz archive"):
        load_dataset(config, "test")
    place = whole.index(stream.getvalue()[:6])
    (tmp_path / "a.npz").write_bytes(whole[: place + 9] + b"\xff" + whole[place + 10 :])
    with pytest.raises(DataError, match=r"labels\.npy' cannot be unpacked: Bad CRC-32"):
        load_dataset(config, "test")
    with pytest.raises(DataError, match=r"no \.npy files in .*; files there: 'a\.npz'"):
        load("npz", tmp_path)


@pytest.mark.parametrize("keys", [{"resize": 8}, {"layout": "parquet"}, {"image_column": "x"}, {"exif": "apply"}])
def test_dataset_config_keys_of_other_sets_are_refused_for_arrays(keys: dict[str, Any]) -> None:
    for name in ("idx", "npz"):
        plain = {"sigmas": [0.5], "certify": {"num_estimation": 10_000}, "report": {"radii": [0]}}
        with pytest.raises(ConfigError, match=rf"dataset\.{next(iter(keys))}: means nothing for {name}"):
            parse_config(plain | {"dataset": {"name": name, "path": "x", **keys}})
