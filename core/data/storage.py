"""Where the files of a data set lie: a folder here; `distributed.files.datasets` adds object stores."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from core.errors import DataError

__all__ = ["LocalStorage", "OpenStorage", "Storage", "hidden"]

# What systems and tools put beside one's files, in lower case.
_SYSTEM = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information")
) | frozenset(("lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"))


def hidden(path: str) -> bool:
    """Whether a path is none of the data's: a part of it begins with a dot, or is a name that systems use."""
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in path.split("/"))


class Storage(Protocol):
    """A folder of files, wherever it is. Paths are relative to it, with "/"."""

    @property
    def root(self) -> str:
        """What messages call the folder."""
        ...

    def files(self, folder: str = "") -> list[str]:
        """All files below `folder`, sorted by their path; the file itself where `folder` is one; none if neither.

        With a "/" at its end: a folder that is not looked into, because it is `hidden`, or a link to one that is here
        already, or above.
        """
        ...

    def twin(self, path: str) -> str | None:
        """Another file of the last `files` that is the same one, by a link."""
        ...

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right below `folder` that are not hidden, sorted; none if it is not there."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of one file; OSError when they cannot be read."""
        ...


OpenStorage = Callable[[str], Storage]


class LocalStorage:
    """A folder on this machine (or one that is mounted here), or a single file.

    Raises:
        DataError: when it is not there, or is the address of an object store.
    """

    def __init__(self, root: str) -> None:
        if "://" in root:
            raise DataError(f"{root!r} is not a local path: load it with distributed.files.datasets.load_dataset")
        self.root = root
        self._root = Path(root)
        self._twins: dict[str, str] = {}
        if not self._root.exists():
            raise DataError(f"{root!r} is not there; set dataset.path to where the data set is on this machine")

    def files(self, folder: str = "") -> list[str]:
        """See `Storage`; DataError for a folder that may not be listed."""
        top = self._root / folder
        if not top.is_dir():
            return [folder] if top.is_file() else []
        above = os.path.realpath(top) + "/"
        found: list[str] = []
        linked: list[str] = []  # files
        entered: dict[str, str] = {}  # real path to path
        folders, links = [folder], list[str]()
        while folders or links:  # links last: it is they that are one too many
            path = folders.pop() if folders else links.pop(0)
            real = os.path.realpath(self._root / path)
            if real in entered or (entered and above.startswith(real.rstrip("/") + "/")):
                found.append(f"{path}/")
                continue
            entered[real] = path
            for entry in self._scan(path):
                inside = f"{path}/{entry.name}" if path else entry.name
                if not _is_folder(entry):
                    found.append(inside)
                    linked += [inside] * entry.is_symlink()
                elif hidden(entry.name):
                    found.append(f"{inside}/")
                else:
                    (links if entry.is_symlink() else folders).append(inside)
            links.sort()
        self._twins = self._same(linked, found, entered)
        return sorted(found)

    def twin(self, path: str) -> str | None:
        """See `Storage`."""
        return self._twins.get(path)

    def folders(self, folder: str = "") -> list[str]:
        """See `Storage`."""
        if not (self._root / folder).is_dir():
            return []
        return sorted(entry.name for entry in self._scan(folder) if _is_folder(entry) and not hidden(entry.name))

    def read(self, path: str) -> bytes:
        """See `Storage`."""
        return (self._root / path if path else self._root).read_bytes()

    def _scan(self, folder: str) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(self._root / folder) as entries:
                return list(entries)
        except OSError as error:
            raise DataError(f"cannot list {str(self._root / folder)!r}: {error}; make it readable") from error

    def _same(self, linked: list[str], found: list[str], entered: dict[str, str]) -> dict[str, str]:
        """For each link to a file that is there under another path, too, this path."""
        if not linked:
            return {}
        plain, by_target, twins = set(found) - set(linked), dict[str, str](), dict[str, str]()
        for path in sorted(linked):
            real = os.path.realpath(self._root / path)
            parent, _, name = real.rpartition("/")
            other = f"{entered[parent]}/{name}".lstrip("/") if parent in entered else ""
            twin = other if other in plain else by_target.setdefault(real, path)
            if twin != path:
                twins[path] = twin
        return twins


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
