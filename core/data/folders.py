"""Images in one folder per class: ImageNet, ImageNet-C, and sets of one's own."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from core.data.arrays import file_of
from core.data.classes import numbers_of, readable
from core.data.dataset import Dataset
from core.data.formats import ENDINGS
from core.data.images import Preparation, StoredImages
from core.data.storage import Storage, hidden
from core.errors import DataError

__all__ = ["image_files", "left_out", "named", "read_folders"]


def image_files(storage: Storage, folder: str = "") -> tuple[list[str], list[str]]:
    """Paths of the image files below `folder`, sorted, and paths of all else that could hold an image.

    An image is told by the ending of its name (`ENDINGS`); the second list holds other files, hidden images, and
    folders that are not looked into (with a "/" at the end).

    Raises:
        DataError: for a file, or a folder, that links put there twice.
    """
    images: list[str] = []
    others: list[str] = []
    for path in storage.files(folder):
        last = path.rstrip("/").rpartition("/")[2]  # what lies in hidden folders is not listed
        image, own = last.lower().endswith(ENDINGS), not hidden(last)
        if path.endswith("/") and own:
            raise DataError(
                f"{named(storage, path)} is a link to a folder whose images are there already, or that holds it; "
                "remove the link"
            )
        if image and own:
            images.append(path)
        elif image or own or path.endswith("/"):
            others.append(path)
    among = set(images)
    for path in images:
        if (other := storage.twin(path)) in among:
            raise DataError(f"{named(storage, path)} is a link to {readable(other or '')!r}, the same image; remove it")
    return images, others


def left_out(paths: Sequence[str]) -> tuple[str, ...]:
    """In words: how many of which kind, and which is the first; nothing where there are none."""
    kinds = defaultdict[str, list[str]](list)
    for path in map(readable, paths):
        stem, dot, ending = path.rpartition("/")[2].rpartition(".")
        kind = f"'.{ending.lower()}'" if dot and stem else "without ending"
        kinds["folders" if path.endswith("/") else "hidden" if hidden(path) else kind].append(path)
    words = ", ".join(f"{len(found):,} {kind} ({found[0]!r})" for kind, found in sorted(kinds.items()))
    return (f"left out, no images by their names: {words}",) if words else ()


def read_folders(
    name: str, storage: Storage, folder: str, label: str, classes: Sequence[str], preparation: Preparation
) -> Dataset:
    """All images at `folder`/<class>/... of a storage ("" for all of it), sorted by path; nothing is decoded yet.

    Labels are the places of the class folders in `classes`. Ids are the paths below `folder` after `label`:
    `val/n01440764/ILSVRC2012_val_00000293.JPEG`.

    Raises:
        DataError: when there are no images, a class folder is not among `classes` or holds nothing but other files, or
            an image lies beside the class folders.
    """
    where = f"{storage.root.rstrip('/')}/{folder}"
    names = storage.folders(folder)
    index = dict(zip(names, numbers_of(names, classes, repr(where)).tolist(), strict=True))
    start = f"{folder}/" if folder else ""
    paths, others = image_files(storage, folder)
    if beside := [path for path in paths if "/" not in path[len(start) :]]:
        raise DataError(
            f"{named(storage, beside[0])} and {len(beside) - 1:,} more images lie beside the class folders, expected "
            "<class>/<image>; move them away"
        )
    if not paths:
        raise DataError(f"no images in class folders below {where!r}; expected <class>/<image>.JPEG (or .png, ...)")
    owners = [path[len(start) :].partition("/")[0] for path in paths]
    full = set(owners)
    for path in others:
        owner, inside, _ = path[len(start) :].partition("/")
        if inside and owner in index and owner not in full and not hidden(path[len(start) :]):
            raise DataError(
                f"{named(storage, start + owner)} holds files, but no image by its name ({readable(path)!r}; endings "
                f"that are read: {', '.join(ENDINGS)}); convert or rename them, or move the folder away"
            )
    # The same text for path and id where they are equal: there may be a million of them.
    ids = tuple(
        path if path.isascii() and start == f"{label}/" else readable(f"{label}/{path[len(start) :]}") for path in paths
    )
    images = StoredImages(
        places=np.arange(len(paths)),
        fetch=lambda place: storage.read(paths[place]),
        describe=lambda place: named(storage, paths[place]),
        preparation=preparation,
    )
    labels = np.array([index[owner] for owner in owners], np.int64)
    return Dataset(name, ids, images, labels, len(classes), tuple(classes), left_out(others))


def named(storage: Storage, path: str) -> str:
    """What messages call a file of a storage."""
    return repr(readable(file_of(storage, path)))
