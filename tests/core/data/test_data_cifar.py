import io
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from core.config import DatasetConfig, SplitConfig
from core.data import Dataset, Split, load_dataset
from core.errors import ConfigError, DataError


class _Python2(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings without a detour over `_codecs.encode`."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    """As in the published files: protocol 2, byte strings, `numpy.core`."""
    stream = io.BytesIO()
    _Python2(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(num: int, seed: int) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": rng.integers(0, 10, num).tolist(),
        b"data": rng.integers(0, 256, (num, 3072), dtype=np.uint8),
        b"filenames": [f"cat_s_{i:06d}.png".encode() for i in range(num)],
    }


BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def write_cifar10(folder: Path, num: int = 3) -> dict[str, dict[bytes, Any]]:
    folder.mkdir(parents=True)
    batches = {name: batch(num, seed) for seed, name in enumerate(BATCHES)}
    for name, plain in batches.items():
        (folder / name).write_bytes(python2_pickle(plain))
    return batches


def cifar10(path: Path, split: Split = "test") -> Dataset:
    return load_dataset(DatasetConfig(name="cifar10", path=str(path)), split)


@pytest.mark.parametrize("above", [False, True])
def test_cifar10_pickles_give_images_labels_and_ids_in_the_order_of_the_batches(tmp_path: Path, above: bool) -> None:
    written = write_cifar10(tmp_path / "cifar-10-batches-py")
    root = tmp_path if above else tmp_path / "cifar-10-batches-py"
    train, test = cifar10(root, "train"), cifar10(root, "test")
    assert train.example_ids[:2] == ("cifar10-train-00000", "cifar10-train-00001")
    assert train.example_ids == tuple(sorted(train.example_ids))
    assert len(train) == 15
    assert (len(test), test.num_classes, test.shape) == (3, 10, (3, 32, 32))
    assert train.labels.tolist() == [label for name in BATCHES[:5] for label in written[name][b"labels"]]
    # Row: 1,024 red, then green, then blue values, each row by row.
    assert np.array_equal(train.image(4), written["data_batch_2"][b"data"][1].reshape(3, 32, 32))
    assert np.array_equal(test.image(2), written["test_batch"][b"data"][2].reshape(3, 32, 32))
    assert cifar10(root, "train").digest() == train.digest() != test.digest()


def test_cifar10_pickled_again_by_python_3_reads_the_same(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path / "a")
    for name, plain in written.items():
        (tmp_path / "a" / name).write_bytes(pickle.dumps({k.decode(): v for k, v in plain.items()}, protocol=4))
    assert np.array_equal(cifar10(tmp_path / "a").image(0).ravel(), written["test_batch"][b"data"][0])


class _Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, call: Any, argument: Any) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, (self.argument,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda proof: _Evil(Path.touch, proof), r"(pathlib\.\S+|__builtin__\.getattr)"),
        (lambda proof: _Evil(os.system, f"touch {proof}"), r"(posix|nt)\.system"),
        (lambda proof: _Evil(eval, f"open({str(proof)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
    ],
)
def test_cifar10_malicious_pickle_runs_nothing_and_names_what_it_asked_for(
    tmp_path: Path, evil: Any, named: str, protocol: int
) -> None:
    write_cifar10(tmp_path / "a")
    proof = tmp_path / "proof"
    content = pickle.dumps({"data": evil(proof), "labels": []}, protocol=protocol)
    pickle.loads(content)  # it does work
    assert proof.exists()
    proof.unlink()
    (tmp_path / "a" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=rf"test_batch' is a pickle that asks for {named},.*refused, not run"):
        cifar10(tmp_path / "a")
    assert not proof.exists()


@pytest.mark.parametrize("name", ["_frombuffer", "load", "fromfile", "__builtins__"])
def test_cifar10_pickle_other_names_of_numpy_are_refused(tmp_path: Path, name: str) -> None:
    write_cifar10(tmp_path / "a")
    (tmp_path / "a" / "test_batch").write_bytes(f"cnumpy\n{name}\n.".encode())
    with pytest.raises(DataError, match=rf"asks for numpy\.{name}"):
        cifar10(tmp_path / "a")


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_cifar10_truncated_pickle_names_the_file(tmp_path: Path, length: int) -> None:
    write_cifar10(tmp_path / "a")
    file = tmp_path / "a" / "test_batch"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(DataError, match=r"test_batch' is not a whole pickle \("):
        cifar10(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": np.zeros((3, 3071), np.uint8)}, r"data is u1 \(3, 3071\), expected u1 \(uint8\) \(N, 3072\)"),
        ({b"data": np.zeros((3, 3, 1024), np.uint8)}, r"data is u1 \(3, 3, 1024\)"),
        ({b"data": np.zeros((3, 3072), np.float32)}, r"data is f4 \(3, 3072\)"),
        ({b"data": np.zeros((3072, 3), np.uint8).T}, r"data is u1 in Fortran order"),
        ({b"data": "text"}, r"data is str None"),
        ({b"labels": [1, 2]}, r"labels are 2 entries, expected a list of 3 integers"),
        ({b"labels": [1, 2, "x"]}, r"labels are 3 entries, expected a list of 3 integers"),
        ({b"labels": [1, 2, 10]}, r"'cifar10-test-00002' has label 10, expected 0 to 9"),
        ({b"labels": [1, 2, 10**30]}, r"a label is beyond 64 bits"),
        ({b"labels": None}, r"labels are NoneType"),
    ],
)
def test_cifar10_wrong_batch_says_what_it_holds(tmp_path: Path, change: dict[bytes, Any], message: str) -> None:
    write_cifar10(tmp_path / "a")
    (tmp_path / "a" / "test_batch").write_bytes(python2_pickle({**batch(3, 0), **change}))
    with pytest.raises(DataError, match=message):
        cifar10(tmp_path / "a")


def test_cifar10_wrong_files_say_what_is_there(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "a")
    (tmp_path / "a" / "test_batch").write_bytes(python2_pickle({b"label_names": [b"airplane"]}))
    with pytest.raises(DataError, match=r"holds no data and no labels, only \['label_names'\]: not a batch"):
        cifar10(tmp_path / "a")
    (tmp_path / "a" / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3' is not there: .*dataset\.layout=parquet; set dataset\.path"):
        cifar10(tmp_path / "a", "train")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cifar-10-python.tar.gz").touch()
    with pytest.raises(DataError, match=r"unpack cifar-10-python\.tar\.gz there"):
        cifar10(tmp_path / "b")
    with pytest.raises(DataError, match=r"nowhere' is not there; set dataset\.path"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"'s3://bucket/cifar' is not a local path: load it with distributed\.files\.datasets"
    ):
        load_dataset(DatasetConfig(name="cifar10", path="s3://bucket/cifar"), "test")


def write_cifar10_c(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(rng.integers(0, 10, 4), 5)
    folder.mkdir()
    np.save(folder / "fog.npy", images)
    np.save(folder / "snow.npy", images[::-1])
    np.save(folder / "labels.npy", labels)
    return images, labels


def test_cifar10_c_takes_the_severity_that_is_asked_for(tmp_path: Path) -> None:
    images, labels = write_cifar10_c(tmp_path / "c")
    for severity in range(1, 6):
        config = DatasetConfig(name="cifar10-c", path=str(tmp_path / "c"), corruption="fog", severity=severity)
        data = load_dataset(config, "test")
        assert data.example_ids == tuple(f"cifar10-c-fog-{severity}-{i:05d}" for i in range(4))
        assert np.array_equal(data.labels, labels[:4])
        for index in range(4):
            assert np.array_equal(data.image(index), images[4 * (severity - 1) + index].transpose(2, 0, 1))
        assert data.shape == (3, 32, 32)


def test_cifar10_c_trains_on_the_clean_set(tmp_path: Path) -> None:
    write_cifar10_c(tmp_path / "c")
    write_cifar10(tmp_path / "clean")
    plain: dict[str, Any] = {"name": "cifar10-c", "path": str(tmp_path / "c"), "corruption": "fog", "severity": 1}
    with pytest.raises(ConfigError, match=r"cifar10-c has test images only; set dataset\.train\.path to the training"):
        load_dataset(DatasetConfig(**plain), "train")
    train = load_dataset(DatasetConfig(**plain, train=SplitConfig(path=str(tmp_path / "clean"))), "train")
    assert train.example_ids == cifar10(tmp_path / "clean", "train").example_ids


def test_cifar10_c_wrong_files_say_what_is_there(tmp_path: Path) -> None:
    images, labels = write_cifar10_c(tmp_path / "c")

    def load(corruption: str) -> Dataset:
        config = DatasetConfig(name="cifar10-c", path=str(tmp_path / "c"), corruption=corruption, severity=1)
        return load_dataset(config, "test")

    with pytest.raises(DataError, match=r"no rain\.npy in .*corruptions there: fog, snow"):
        load("rain")
    np.save(tmp_path / "c" / "snow.npy", images[:19])
    with pytest.raises(DataError, match=r"snow\.npy' holds uint8 \(19, 32, 32, 3\), expected uint8 \(5 N"):
        load("snow")
    np.save(tmp_path / "c" / "snow.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"snow\.npy' is not a whole NumPy array: Object arrays"):
        load("snow")
    (tmp_path / "c" / "snow.npy").write_bytes((tmp_path / "c" / "fog.npy").read_bytes()[:-7])
    with pytest.raises(DataError, match=r"snow\.npy' is not a whole NumPy array"):
        load("snow")
    np.save(tmp_path / "c" / "labels.npy", labels[:4])
    with pytest.raises(DataError, match=r"labels\.npy beside .* holds int64 \(4,\), expected integers \(20,\)"):
        load("fog")
