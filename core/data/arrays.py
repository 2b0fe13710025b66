"""Images and labels that lie in arrays: what their shapes, types and numbers must be."""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.data.storage import Storage
from core.errors import DataError

__all__ = ["Arrays", "as_labels", "as_pixels", "file_of", "load_array", "numbering", "read_file"]

_CHANNELS = (1, 3)
_EXACT = 1e-3
"""Of a grey level: how far 255 x may lie from a whole number in an x that was one of 8 bits."""


class Arrays(NamedTuple):
    """One split of a set that is kept as arrays.

    Attributes:
        labels: int64 ``(N,)`` as they are stored, not negative.
        images: reads the images, uint8 ``(N, C, H, W)``.
    """

    labels: NDArray[np.int64]
    images: Callable[[], NDArray[np.uint8]]
    notes: tuple[str, ...] = ()


def file_of(storage: Storage, path: str) -> str:
    """What messages call a file."""
    return f"{storage.root.rstrip('/')}/{path}" if path else storage.root


def read_file(storage: Storage, path: str) -> bytes:
    """The bytes of a file; DataError when they cannot be read."""
    try:
        return storage.read(path)
    except OSError as error:
        raise DataError(f"cannot read {file_of(storage, path)!r}: {error}") from error


def load_array(content: bytes, file: str) -> NDArray[Any]:
    """The array of an `.npy` file, without running anything that it holds.

    Raises:
        DataError: for Python objects, bytes that are not a whole array, or more bytes than that; names `file`.
    """
    stream = io.BytesIO(content)
    try:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # a broken header raises nearly anything
        raise DataError(f"{file!r} is not a whole NumPy array: {error}") from error
    if extra := len(content) - stream.tell():
        raise DataError(f"{file!r} holds {extra:,} bytes after its array; get it anew")
    return array


def as_labels(array: NDArray[Any], file: str) -> NDArray[np.int64]:
    """Labels ``(N,)`` or ``(N, 1)`` as int64 ``(N,)``.

    Raises:
        DataError: for another shape or type, none at all, or one that is negative or beyond 63 bits.
    """
    if array.dtype.kind not in "iu" or array.shape not in ((array.size,), (array.size, 1)):
        raise DataError(
            f"{file!r} holds {array.dtype} {array.shape}, expected labels as integers (N,) or (N, 1), one class for "
            "each image (of one-hot rows: argmax(axis=1))"
        )
    labels = array.reshape(-1).astype(np.int64)
    if not labels.size or labels.min() < 0:
        found = f"label {labels.min()}" if labels.size else "no label"
        raise DataError(f"{file!r} holds {found}, expected labels from 0 or 1 on; is this a split without labels?")
    return labels


def as_pixels(array: NDArray[Any], num: int, file: str) -> NDArray[np.uint8]:
    """Images as uint8 ``(N, C, H, W)``.

    Args:
        array: ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels; uint8, or floats in [0, 1] that
            are 8-bit values divided by 255.
        num: of the labels.
        file: what messages call it.

    Raises:
        DataError: for another number, shape or type, or axes or a scale that cannot be told apart.
    """
    got = f"{file!r} holds {array.dtype} {array.shape}"
    if array.ndim not in (3, 4) or not array.size or len(array) != num:
        raise DataError(f"{got}, expected {num:,} images, as many as labels: (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if array.ndim == 3:
        array = array[:, None]
    else:
        first, last = (array.shape[axis] in _CHANNELS for axis in (1, 3))
        if first == last:
            which = "either the first or the last axis of an image may be" if first else "no axis of an image is"
            raise DataError(f"{got}: {which} its channels (1 or 3); store it so that one is: (N, H, W) for grey images")
        array = array if first else array.transpose(0, 3, 1, 2)
    if array.dtype.kind == "f":
        return _from_floats(array, got)
    if array.dtype != np.uint8:
        raise DataError(f"{got}, expected uint8 (0 to 255), or floats in [0, 1]; convert it")
    if array.max() <= 1:
        raise DataError(f"{got} and no pixel is above 1: is white 1 or 255? Store 0 to 255")
    return np.array(array, order="C")  # a copy, which may be written to


def numbering(labels: Sequence[NDArray[np.int64]], num_classes: int | None, where: str) -> tuple[int, int]:
    """The label of the first class (0 or 1), and how many classes there are: as many as labels occur, where that is not
    known.

    Labels, given for each split that is there, count from 1 where the label N occurs and 0 does not, of N classes.

    Raises:
        DataError: for labels that are neither 0 to N - 1 nor 1 to N; all of them occur, where N is not known.
    """
    found = np.unique(np.concatenate(labels))
    num, low, high = num_classes or len(found), int(found[0]), int(found[-1])
    first = int(low >= 1 and high == num)
    if high >= num + first:
        raise DataError(
            f"{where}: {len(found):,} labels occur, from {low} to {high}, expected "
            f"{'all of ' * (num_classes is None)}0 to {num - 1} or 1 to {num}; set dataset.num_classes or "
            "dataset.class_file to the classes that there are"
        )
    return first, num


def _from_floats(array: NDArray[np.floating[Any]], got: str) -> NDArray[np.uint8]:
    pixels = np.empty(array.shape, np.uint8)
    for place, image in enumerate(array):  # one at a time: a copy of all may not fit
        scaled = 255.0 * image.astype(np.float64)
        if not (scaled.min() >= 0.0 and scaled.max() <= 255.0 + _EXACT):  # not a number: refused
            raise DataError(
                f"{got}, image {place} spans [{image.min()!s}, {image.max()!s}], expected [0, 1]; store uint8 (0 to "
                "255), without normalisation: that belongs into the network"
            )
        rounded = np.rint(scaled)
        if (worst := np.abs(scaled - rounded).max()) > _EXACT:
            raise DataError(
                f"{got}, image {place} has a pixel {worst:.3f} grey levels from the next of 8 bits; rounding is a "
                "choice: store np.rint(255 * images).astype(np.uint8)"
            )
        pixels[place] = rounded
    return pixels
