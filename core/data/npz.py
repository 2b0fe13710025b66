"""NumPy arrays of images and labels: an `.npz` archive, or a folder of `.npy` files."""

import io
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.data.arrays import Arrays, as_labels, as_pixels, file_of, load_array, read_file
from core.data.classes import shown
from core.data.dataset import Split
from core.data.storage import Storage, hidden
from core.errors import DataError

__all__ = ["read_npz"]

_ROLES = (("x", "images", "image", "imgs", "data"), ("y", "labels", "label", "targets", "target"))
_UNNAMED = ("arr_0", "arr_1")
"""As `numpy.savez(file, images, labels)` calls them."""


def read_npz(storage: Storage, split: Split, label: str, alone: bool) -> Arrays:
    """One split, of an archive or a folder of `<name>.npy`: `x_train` and `y_train` (Keras), `train_images` and
    `train_labels` (MedMNIST), and the like; where it is `alone` there, `images` and `labels`, or `arr_0` and `arr_1`,
    will do.

    Raises:
        DataError: for arrays that are missing, that several names could mean, that are not whole, or of another number,
            shape or type; names them.
    """
    names, read = _open(storage)
    plain = [name.lower() for name in names]
    called = [_of_split(roles, label.lower()) for roles in _ROLES]
    if alone and not any(name in wanted for name in plain for wanted in called):
        called = [{*roles, unnamed} for roles, unnamed in zip(_ROLES, _UNNAMED, strict=True)]
    places = [[place for place, name in enumerate(plain) if name in wanted] for wanted in called]
    if [len(found) for found in places] != [1, 1]:
        num_images, num_labels = map(len, places)
        raise DataError(
            f"{storage.root!r} holds {num_images} arrays of images and {num_labels} of labels of the split {label!r} "
            f"by their names, expected one of each: x_{label} and y_{label}, or {label}_images and {label}_labels "
            f"(images and labels in a file of dataset.{split}.path alone); set dataset.{split}.split to what the names "
            f"call it; there: {shown(names) or 'none'}"
        )
    (images,), (labels,) = places
    numbers = as_labels(*read(labels))

    def pixels() -> NDArray[np.uint8]:
        array, file = read(images)
        return as_pixels(array, len(numbers), file)

    return Arrays(numbers, pixels)


def _of_split(roles: Sequence[str], label: str) -> set[str]:
    return {name for role in roles for dash in "_-" for name in (f"{role}{dash}{label}", f"{label}{dash}{role}")}


def _open(storage: Storage) -> tuple[list[str], Callable[[int], tuple[NDArray[np.generic], str]]]:
    """Names of the arrays, and what reads the one at a place: the array, and what messages call it."""
    files = storage.files()
    if files != [""]:
        paths = [path for path in files if path.endswith(".npy") and "/" not in path and not hidden(path)]
        if not paths:
            raise DataError(
                f"no .npy files in {storage.root!r}; set dataset.path to an .npz file, or to a folder of "
                f"<name>.npy; files there: {shown(files) or 'none'}"
            )

        def read(place: int) -> tuple[NDArray[np.generic], str]:
            file = file_of(storage, paths[place])
            return load_array(read_file(storage, paths[place]), file), file

        return [path.removesuffix(".npy") for path in paths], read

    try:
        archive = zipfile.ZipFile(io.BytesIO(read_file(storage, "")))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"{storage.root!r} is not an .npz archive: {error}; name one, or a folder of .npy") from error
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]

    def unpack(place: int) -> tuple[NDArray[np.generic], str]:
        file = f"{storage.root}/{members[place].filename}"
        try:
            content = archive.read(members[place])  # no more than the archive states
        except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), NotImplementedError
            raise DataError(f"{file!r} cannot be unpacked: {error}; get it anew") from error
        return load_array(content, file), file

    return [info.filename.removesuffix(".npy") for info in members], unpack
