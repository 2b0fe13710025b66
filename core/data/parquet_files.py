"""Which Parquet files hold a split, told by their names as the Hugging Face hub and common writers give them."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from core.data.classes import shown
from core.data.images import Preparation
from core.data.storage import Storage, hidden
from core.errors import DataError

__all__ = ["ParquetPart", "check_whole", "files_of_split", "parquet_files"]

_NUMBERED = r"([-_.]?\d+([-_]of[-_]\d+)?([-_][0-9a-f]+)?)?(\.\w+)?\.parquet"
"""What follows the split's name: `-00000-of-00014.parquet`, `_3.parquet`, `.snappy.parquet`."""
_PART_OF = re.compile(r"(.*?)[-_.]?(\d+)[-_]of[-_](\d+)(?:[-_][0-9a-f]+)?(?:\.\w+)?\.parquet")
_ONE_OF = re.compile(r"(.*?)(?:([-_.]?)\d+(?:[-_]of[-_]\d+)?(?:[-_][0-9a-f]+)?)?(\.\w+)?\.parquet")
"""Its groups: the name, what stands between it and the number (None: there is no number), a second ending."""
_SPLITS = ("train", "test", "validation", "val")


class ParquetPart(NamedTuple):
    """Parquet files that hold one split, and how to read them.

    Attributes:
        location: folder or address, or one file.
        files: inside it, in the order of the rows; ("",) where the location is itself the file.
        label: what made-up ids begin with.
        digits: of the row number in made-up ids.
        columns: names of the image's, the label's and the id's column (None: made up from the row number).
        classes: the run's classes in the order of the labels, by which labels are numbered; None where nothing names
            them.
        num_classes: None to take it from `classes`.
    """

    location: str
    files: tuple[str, ...]
    label: str
    digits: int
    columns: tuple[str, str, str | None]
    classes: tuple[str, ...] | None
    num_classes: int | None
    preparation: Preparation
    notes: tuple[str, ...] = ()


def parquet_files(storage: Storage) -> list[str]:
    """All Parquet files of a folder; [""] for one that is itself the file."""
    files = storage.files()
    return files if files == [""] else [path for path in files if path.endswith(".parquet") and not hidden(path)]


def files_of_split(files: Sequence[str], label: str) -> list[str]:
    """`train/0.parquet`, `data/train-00000-of-00014.parquet`, `train.parquet`; not `train_extra-0.parquet`."""
    named = re.compile(re.escape(label) + _NUMBERED)
    return [path for path in files if label in path.split("/")[:-1] or named.fullmatch(path.rpartition("/")[2])]


def check_whole(files: Sequence[str], location: str, key: str) -> None:
    """Let files pass that are one set: in one folder and, where their names count parts, all parts of one family.

    Raises:
        DataError: for files of two folders, families or splits, or a part that is missing.
    """
    folders = sorted({path.rpartition("/")[0] for path in files})
    if len(folders) > 1:
        raise DataError(
            f"{key}: {location!r} holds Parquet files of this split in {len(folders)} folders "
            f"({shown([folder or '.' for folder in folders])}), which may be two configurations; set dataset.path, or "
            f"{key}.path, to one of them"
        )
    families = defaultdict[tuple[str, str], set[int]](set)
    for path in files:
        if found := _PART_OF.fullmatch(path):
            families[found[1], found[3]].add(int(found[2]))
    ways = defaultdict[str, set[Any]](set)  # of writing a name: `test.parquet`, `test-1.parquet`, `test.snappy.parquet`
    for path in files:
        if found := _ONE_OF.fullmatch(path):
            ways[found[1]].add((found[2], found[3]))
    if (
        len(families) > 1
        or (families and sum(map(len, families.values())) != len(files))
        or any(len(each) > 1 for each in ways.values())
        or sum(bool(files_of_split([path.rpartition("/")[2] for path in files], split)) for split in _SPLITS) > 1
    ):
        raise DataError(
            f"{key}: the Parquet files of this split in {location!r} are not the parts of one set: "
            f"{shown(_firsts(files))}; set {key}.split to how the right ones begin, or {key}.path to one file, or move "
            "the others away"
        )
    for (_, total), parts in families.items():
        if missing := sorted(set(range(int(total))) - parts):
            raise DataError(
                f"{key}: {len(missing)} of the {int(total)} parts of this split are not in {location!r}, the first is "
                f"number {missing[0]} (there: {shown(files)}); fetch them, or name one file in {key}.path"
            )


def _firsts(files: Sequence[str]) -> list[str]:
    """The first file of each family."""
    firsts = dict[str, str]()
    for path in files:
        found = _PART_OF.fullmatch(path)
        firsts.setdefault(f"{found[1]}-of-{found[3]}" if found else path, path)
    return list(firsts.values())
