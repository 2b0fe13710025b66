"""Images in one folder per class: ImageNet, ImageNet-C, and sets of one's own."""

from collections.abc import Sequence

import numpy as np

from core.data.dataset import Dataset
from core.data.images import Preparation, StoredImages
from core.data.storage import Storage
from core.errors import DataError

__all__ = ["ENDINGS", "read_folders"]

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of the names of image files."""


def read_folders(
    name: str, storage: Storage, folder: str, label: str, classes: Sequence[str], preparation: Preparation
) -> Dataset:
    """All images at `folder`/<class>/..., sorted by path; nothing is decoded yet.

    Ids are the paths below `folder` after `label`: `val/n01440764/ILSVRC2012_val_00000293.JPEG`.

    Args:
        name: of the data set.
        storage: where it is.
        folder: of the split, inside the storage; "" for all of it.
        label: what ids begin with.
        classes: names of the class folders, in the order of the labels.
        preparation: makes pixels of a file.

    Raises:
        DataError: when there are no images, or a class folder is not among `classes`.
    """
    index = {class_name: number for number, class_name in enumerate(classes)}
    start = f"{folder}/" if folder else ""
    paths = [path for path in storage.files(folder) if path.lower().endswith(ENDINGS) and "/" in path[len(start) :]]
    where = f"{storage.root.rstrip('/')}/{folder}"
    if not paths:
        raise DataError(f"no images in class folders below {where!r}; expected <class>/<image>.JPEG (or .png, ...)")
    labels = np.empty(len(paths), np.int64)
    for place, path in enumerate(paths):
        class_name = path[len(start) :].partition("/")[0]
        if class_name not in index:
            raise DataError(
                f"{where!r} has a folder {class_name!r} that is none of the {len(classes)} classes; add it to "
                "dataset.class_file, or move it away"
            )
        labels[place] = index[class_name]
    # The same text for path and id where they are equal: there may be a million of them.
    ids = tuple(paths if start == f"{label}/" else [f"{label}/{path[len(start) :]}" for path in paths])
    images = StoredImages(
        places=np.arange(len(paths)),
        fetch=lambda place: storage.read(paths[place]),
        describe=lambda place: repr(f"{storage.root.rstrip('/')}/{paths[place]}"),
        preparation=preparation,
    )
    return Dataset(name, ids, images, labels, len(classes))
