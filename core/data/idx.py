"""The MNIST family as its authors publish it: MNIST, Fashion-MNIST, KMNIST, EMNIST in idx files, packed or not."""

import gzip
import io
import math
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.arrays import Arrays, as_labels, as_pixels, file_of, read_file
from core.data.classes import shown
from core.data.dataset import Split
from core.data.storage import Storage, hidden
from core.errors import DataError

__all__ = ["read_idx"]

_FILE = re.compile(r"((.*-)?(train|t10k|test))-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_CALLED = {"train": ("train",), "test": ("t10k", "test")}
_MOST = 1032
"""Deflate makes no byte of less than one in so many."""


def read_idx(storage: Storage, split: Split, label: str | None) -> Arrays:
    """One split: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-...`, `emnist-letters-train-...`.

    `.idx3-ubyte` and `.gz` are read, too; where a file lies there packed and unpacked, both must hold the same. Images
    of EMNIST, which are stored transposed, are turned upright. Their names begin with `label`; None where one set alone
    lies there.

    Raises:
        DataError: for files that are missing, of several sets, truncated or longer than their headers say, or of
            another type or number; names the file.
    """
    present = storage.files()
    label = label or _label(storage, present, split)
    labels, file = _array(storage, present, label, "labels", 1, split)
    numbers, transposed = as_labels(labels, file), label.lower().startswith("emnist")

    def images() -> NDArray[np.uint8]:
        pixels, file = _array(storage, present, label, "images", 3, split)
        return as_pixels(pixels.transpose(0, 2, 1) if transposed else pixels, len(numbers), file)

    return Arrays(numbers, images, ("EMNIST stores images transposed: turned upright",) * transposed)


def _label(storage: Storage, present: list[str], split: Split) -> str:
    """What names of the split begin with: one, in a folder of one set."""
    matches = [found for path in present if (found := _FILE.fullmatch(path)) and "/" not in path and not hidden(path)]
    labels = sorted({found[1] for found in matches if found[3] in _CALLED[split]})
    sets = sorted({found[2] or "" for found in matches})
    if len(sets) > 1 or len(labels) > 1:
        raise DataError(
            f"{storage.root!r} holds idx files of several sets ({shown(sorted({found[1] for found in matches}))}); set "
            f"dataset.train.split and dataset.test.split to how the names of one begin: what stands before -images"
        )
    return labels[0] if labels else _CALLED[split][0]


def _array(
    storage: Storage, present: list[str], label: str, what: str, axes: int, split: Split
) -> tuple[NDArray[Any], str]:
    """One array, and what messages call its file."""
    named = re.compile(rf"{re.escape(label)}-{what}[-.]idx{axes}-ubyte(\.gz)?")
    paths = [path for path in present if named.fullmatch(path)]
    if not paths:
        there = [path for path in present if _FILE.fullmatch(path.rpartition("/")[2])]
        raise DataError(
            f"no {label}-{what}-idx{axes}-ubyte (or .gz) in {storage.root!r}; set dataset.path to the folder of the "
            f"four files, or dataset.{split}.split to how the names begin; idx files there: {shown(there) or 'none'}"
        )
    files = [file_of(storage, path) for path in paths]
    arrays = [_parse(read_file(storage, path), file, axes) for path, file in zip(paths, files, strict=True)]
    for array, file in zip(arrays[1:], files[1:], strict=True):
        if not np.array_equal(arrays[0], array):
            raise DataError(f"{files[0]!r} and {file!r} do not hold the same {what}; remove one")
    return arrays[0], files[0]


def _parse(content: bytes, file: str, axes: int) -> NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes; never unpacks more than its header says, and a byte."""
    packed = content[:2] == b"\x1f\x8b"
    try:
        with gzip.open(io.BytesIO(content)) if packed else io.BytesIO(content) as stream:
            header = stream.read(4 + 4 * axes)
            if len(header) < 4 + 4 * axes or header[:4] != bytes((0, 0, 8, axes)):
                raise DataError(
                    f"{file!r} begins with {header[:4].hex() or 'nothing'}, expected an idx file of unsigned bytes "
                    f"with {axes} axes (0000080{axes}); get it anew"
                )
            shape = tuple(np.frombuffer(header, ">u4", axes, 4).tolist())
            size = math.prod(shape)
            raw = stream.read(min(size + 1, _MOST * len(content)))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file!r} is not a whole gzip file: {error}; get it anew") from error
    if len(raw) != size:
        found = f"only {len(raw):,} bytes" if len(raw) < size else "more bytes"
        raise DataError(f"{file!r} holds {found}, expected {size:,} as its header says {shape}; get it anew")
    return np.frombuffer(raw, np.uint8).reshape(shape)
