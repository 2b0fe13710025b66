"""Loading a data set from wherever it is: `core.data` plus Parquet files and object stores."""

import urllib.parse
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from core.config import DatasetConfig, SplitConfig
from core.data import Dataset, LocalStorage, Split, Storage
from core.data import load_dataset as load_local
from core.data.loading import ParquetReader
from core.data.loading import class_names as local_class_names
from core.data.storage import hidden
from core.errors import DataError
from distributed.files.parquet_images import read_class_names, read_parquet
from distributed.files.storage import file_system

__all__ = ["ArrowStorage", "absolute", "class_names", "load_dataset", "open_storage"]

_PARQUET = ParquetReader(read_parquet, read_class_names)


def load_dataset(config: DatasetConfig, split: Split) -> Dataset:
    """Load one split of the configured data set; arguments and errors as for `core.data.load_dataset`.

    Images that are stored encoded stay where they are until somebody asks for them.
    """
    return load_local(config, split, open_storage=open_storage, parquet=_PARQUET)


def class_names(config: DatasetConfig) -> tuple[str, ...] | None:
    """See `core.data.loading.class_names`."""
    return local_class_names(config, open_storage=open_storage, parquet=_PARQUET)


def absolute(config: DatasetConfig) -> DatasetConfig:
    """The same data set with all its files by absolute paths: Ray's workers have another working directory."""

    def full(part: DatasetConfig | SplitConfig, *keys: str) -> dict[str, Any]:
        named = {key: getattr(part, key) for key in keys}
        return {key: str(Path(name).absolute()) for key, name in named.items() if name and "://" not in name}

    splits = {key: getattr(config, key) for key in ("train", "test")}
    there = {key: part.model_copy(update=full(part, "path", "ids_file")) for key, part in splits.items()}
    return config.model_copy(update={**full(config, "path", "class_file"), **there})


class ArrowStorage:
    """A folder behind a URI; see `core.data.Storage`.

    Args:
        root: its address; credentials come from the environment, as pyarrow takes them.

    Raises:
        DataError: when it is not there or cannot be reached.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._system, self._path = file_system(root)
        if self._info("").type == pafs.FileType.NotFound:
            raise DataError(f"{root!r} is not there; set dataset.path to where the data set is")

    def files(self, folder: str = "") -> list[str]:
        """See `core.data.Storage`."""
        if folder == "" and self._is_file:
            return [""]
        found = self._list(folder, recursive=True)
        # A store may list a folder's marker, an object that ends in "/", among the files.
        return sorted({_outside(path) for path, kind in found if kind == pafs.FileType.File and path[-1:] != "/"})

    def twin(self, path: str) -> str | None:
        """See `core.data.Storage`: object stores have no links."""
        return None

    def folders(self, folder: str = "") -> list[str]:
        """See `core.data.Storage`."""
        found = self._list(folder, recursive=False)
        names = [path.rpartition("/")[2] for path, kind in found if kind == pafs.FileType.Directory]
        return sorted(name for name in names if not hidden(name))

    def read(self, path: str) -> bytes:
        """See `core.data.Storage`."""
        with self._system.open_input_stream(self._full(path), compression=None) as stream:
            return bytes(stream.read())

    @cached_property
    def _is_file(self) -> bool:
        return bool(self._info("").type == pafs.FileType.File)

    def _full(self, path: str) -> str:
        return f"{self._path}/{path}" if path else self._path

    def _info(self, path: str) -> pafs.FileInfo:
        try:
            return self._system.get_file_info(self._full(path))
        except OSError as error:
            raise DataError(f"cannot reach {self.root!r}: {error}; check address, network and credentials") from error

    def _list(self, folder: str, recursive: bool) -> list[tuple[str, pafs.FileType]]:
        """Paths relative to the root, and what they are."""
        selector = pafs.FileSelector(self._full(folder), allow_not_found=True, recursive=recursive)
        try:
            found = self._system.get_file_info(selector)
        except OSError as error:
            raise DataError(f"cannot list {self.root!r}: {error}; check network and credentials") from error
        start = len(self._path) + 1
        return [(info.path[start:], info.type) for info in found]


def open_storage(root: str) -> Storage:
    """A local folder or an address."""
    if root.startswith("file://"):
        return LocalStorage(urllib.parse.unquote(root.removeprefix("file://")))
    return ArrowStorage(root) if "://" in root else LocalStorage(root)


def _outside(path: str) -> str:
    """The path, or the hidden folder that it lies in, with a "/" at its end."""
    parts = path.split("/")
    place = next((number for number, part in enumerate(parts[:-1]) if hidden(part)), None)
    return path if place is None else "/".join(parts[: place + 1]) + "/"
