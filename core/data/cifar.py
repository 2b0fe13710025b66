"""CIFAR-10 as its authors publish it (Python pickles), and CIFAR-10-C (NumPy arrays)."""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.arrays import file_of, load_array, read_file
from core.data.dataset import Dataset, Split
from core.data.storage import Storage
from core.errors import DataError

__all__ = ["CLASSES", "read_cifar10", "read_cifar10_c", "read_pickle"]

_FOLDER = "cifar-10-batches-py"
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of the labels."""
_SEVERITIES = 5


def read_cifar10(name: str, storage: Storage, split: Split) -> Dataset:
    """CIFAR-10 from `cifar-10-batches-py` (or from the folder above it).

    Ids are `cifar10-train-00042`: the place in the order of the batches 1 to 5.

    Raises:
        DataError: for a batch that is missing or is not one; names the file.
    """
    present = set(storage.files())
    folder = "" if "test_batch" in present or "data_batch_1" in present else f"{_FOLDER}/"
    parts = []
    for batch in _BATCHES[split]:
        file = file_of(storage, folder + batch)
        if folder + batch not in present:
            packed = "; unpack cifar-10-python.tar.gz there" if "cifar-10-python.tar.gz" in present else ""
            raise DataError(
                f"{file!r} is not there: CIFAR-10 is read from {_FOLDER}/ (data_batch_1 to 5, test_batch), or "
                f"from Parquet files with dataset.layout=parquet; set dataset.path to their folder{packed}"
            )
        parts.append(_batch(read_pickle(read_file(storage, folder + batch), file), file))
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    ids = tuple(f"cifar10-{split}-{i:05d}" for i in range(len(images)))
    return Dataset(name, ids, images, labels, len(CLASSES), CLASSES)


def read_cifar10_c(name: str, storage: Storage, corruption: str, severity: int) -> Dataset:
    """One severity of one corruption of CIFAR-10-C: `<corruption>.npy` and `labels.npy`.

    Each array holds the five severities one after the other. Ids are `cifar10-c-fog-3-00042`, with the place of the
    clean image in CIFAR-10's test set.

    Raises:
        DataError: for a corruption that is not there (lists those that are), or arrays of another shape or type.
    """
    names = [path.removesuffix(".npy") for path in storage.files() if path.endswith(".npy") and "/" not in path]
    if corruption not in names:
        known = ", ".join(name for name in names if name != "labels") or "none"
        raise DataError(f"no {corruption}.npy in {storage.root!r} (dataset.corruption); corruptions there: {known}")
    files = (f"{corruption}.npy", "labels.npy")
    images, labels = (load_array(read_file(storage, path), file_of(storage, path)) for path in files)
    file = file_of(storage, files[0])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) % _SEVERITIES:
        raise DataError(
            f"{file!r} holds {images.dtype} {images.shape}, expected uint8 (5 N, H, W, 3), five severities of N images"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels.npy beside {file!r} holds {labels.dtype} {labels.shape}, expected integers ({len(images)},)"
        )
    num = len(images) // _SEVERITIES
    part = slice((severity - 1) * num, severity * num)
    return Dataset(
        name=name,
        example_ids=tuple(f"cifar10-c-{corruption}-{severity}-{index:05d}" for index in range(num)),
        images=np.ascontiguousarray(images[part].transpose(0, 3, 1, 2)),
        labels=labels[part].astype(np.int64),
        num_classes=len(CLASSES),
        class_names=CLASSES,
    )


def read_pickle(content: bytes, file: str) -> Any:
    """Unpickle plain data and NumPy arrays without running anything that the file names.

    A pickle is a program; this machine knows three names, those of NumPy's arrays, and even for these it calls
    stand-ins and not NumPy, whose own unpickling trusts the sizes and flags that it is told.

    Returns:
        dict, list, str, bytes, numbers; an array is an object with `shape`, `code` (of its dtype) and `raw` bytes.

    Raises:
        DataError: for any other global (names it), or bytes that are not a whole pickle.
    """

    # Made anew for each file, since a hostile one may set attributes on them.
    class DType:
        def __init__(self, code: Any, *_: Any) -> None:
            self.code = code

        def __setstate__(self, state: Any) -> None:
            pass

    class Array:
        def __init__(self, *_: Any) -> None:
            self.shape: Any = None
            self.code: Any = None
            self.raw: Any = None

        def __setstate__(self, state: Any) -> None:
            _, self.shape, dtype, fortran, self.raw = state
            code = dtype.code.decode() if isinstance(dtype.code, bytes) else dtype.code
            self.code = f"{code} in Fortran order" if fortran else code

    known = {
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy._core.multiarray", "_reconstruct"): Array,
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
        ("numpy", "dtype"): DType,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise DataError(
                    f"{file!r} is a pickle that asks for {module}.{name}, which no file of CIFAR-10 needs: refused, "
                    "not run; get the file anew from where its authors publish it"
                )
            return known[module, name]

    try:
        return Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{file!r} is not a whole pickle ({type(error).__name__}: {error}); get it anew") from error


def _batch(plain: Any, file: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 ``(N, 3, 32, 32)`` and labels of one batch."""
    entries = plain if isinstance(plain, dict) else {}
    # Python 2 wrote the keys as bytes.
    entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in entries.items()}
    if missing := [key for key in ("data", "labels") if key not in entries]:
        raise DataError(
            f"{file!r} holds no {' and no '.join(missing)}, only {sorted(map(str, entries))}: not a batch of CIFAR-10"
        )
    data, labels = entries["data"], entries["labels"]
    code, shape, raw = (getattr(data, field, None) for field in ("code", "shape", "raw"))
    if (
        code != "u1"
        or not (isinstance(shape, tuple) and len(shape) == 2 and shape[1] == 3 * 32 * 32)
        or not isinstance(raw, bytes)
        or len(raw) != shape[0] * shape[1]
    ):
        raise DataError(f"{file!r}: data is {code or type(data).__name__} {shape}, expected u1 (uint8) (N, 3072)")
    if not isinstance(labels, list) or len(labels) != shape[0] or not all(type(label) is int for label in labels):
        found = f"{len(labels)} entries" if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"{file!r}: labels are {found}, expected a list of {shape[0]} integers")
    try:
        return np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32), np.array(labels, np.int64)
    except OverflowError as error:
        raise DataError(f"{file!r}: a label is beyond 64 bits, expected 0 to 9") from error
