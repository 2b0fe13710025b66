"""Where the files of a data set lie: a folder here; `distributed.store.datasets` adds object stores."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from core.errors import DataError

__all__ = ["LocalStorage", "OpenStorage", "Storage"]


class Storage(Protocol):
    """A folder of files, wherever it is. Paths are relative to it, with "/"; hidden files are not seen."""

    @property
    def root(self) -> str:
        """What messages call the folder."""
        ...

    def files(self, folder: str = "") -> list[str]:
        """All files below `folder`, sorted by their path; the file itself where `folder` is one; none if neither."""
        ...

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right below `folder`, sorted; none if it is not there."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of one file; OSError when they cannot be read."""
        ...


OpenStorage = Callable[[str], Storage]


class LocalStorage:
    """A folder on this machine (or one that is mounted here).

    Args:
        root: the folder, or a single file.

    Raises:
        DataError: when it is not there, or is the address of an object store.
    """

    def __init__(self, root: str) -> None:
        if "://" in root:
            raise DataError(f"{root!r} is not a local path: load it with distributed.store.datasets.load_dataset")
        self.root = root
        self._root = Path(root)
        if not self._root.exists():
            raise DataError(f"{root!r} is not there; set dataset.path to where the data set is on this machine")

    def files(self, folder: str = "") -> list[str]:
        """See `Storage`."""
        top = self._root / folder
        if top.is_file():
            return [folder]
        found = []
        for parent, folders, names in os.walk(top, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(parent).relative_to(self._root).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            found += [prefix + name for name in names if not name.startswith(".")]
        return sorted(found)

    def folders(self, folder: str = "") -> list[str]:
        """See `Storage`."""
        top = self._root / folder
        if not top.is_dir():
            return []
        return sorted(entry.name for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def read(self, path: str) -> bytes:
        """See `Storage`."""
        return (self._root / path if path else self._root).read_bytes()
