"""Images in Parquet files: an image column (encoded bytes, or Hugging Face's struct of bytes and path) and a label."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.data import Dataset, StoredImages
from core.data.classes import canonical, check_numbers, numbers_of, shown
from core.data.parquet_files import ParquetPart
from core.errors import ConfigError, DataError
from distributed.files.storage import file_system

__all__ = ["read_class_names", "read_parquet", "read_unlabelled"]


def read_parquet(name: str, part: ParquetPart) -> Dataset:
    """A split in Parquet files. Reads labels and ids; images stay in the files.

    An image that is asked for brings its whole row group into memory, and the last two stay there: reading in order is
    quick, jumping about is not. Ids are those of the id column, or `<name>-<split>-00000042`, the row counted through
    the files.

    Raises:
        DataError: for a file that cannot be read, a missing column (lists those there are) or label; names the file.
        ConfigError: when the number of classes, or their names, are needed and not known.
    """
    files = [_File(part, file) for file in part.files]
    described = next((names for file in files if (names := file.class_names(part.columns[1]))), ())
    labels = np.concatenate([_numbers(file, part, described) for file in files])
    if part.num_classes is None:
        raise ConfigError(
            f"{part.location!r} does not say how many classes there are; set dataset.num_classes (labels there: "
            f"{labels.min(initial=0)} to {labels.max(initial=0)})"
        )
    return Dataset(name, *_images(files, part), labels, part.num_classes, part.classes, part.notes)


def read_class_names(part: ParquetPart) -> tuple[str, ...] | None:
    """Names of the classes, as the first file that has any lists them.

    Raises:
        DataError: for a file that cannot be read.
    """
    column = part.columns[1]
    return next((names for file in part.files if (names := _File(part, file).class_names(column))), None)


def read_unlabelled(part: ParquetPart) -> tuple[tuple[str, ...], StoredImages]:
    """Ids and images of Parquet files, whatever else is in them; `part` names no label column ("").

    Raises:
        DataError: as `read_parquet`.
    """
    return _images([_File(part, file) for file in part.files], part)


def _images(files: "Sequence[_File]", part: ParquetPart) -> tuple[tuple[str, ...], StoredImages]:
    image_column, _, id_column = part.columns
    if id_column is None:
        num = sum(file.num_rows for file in files)
        ids = tuple(f"{part.label}-{row:0{part.digits}d}" for row in range(num))
    else:
        ids = tuple(str(value) for file in files for value in file.column(id_column))
    images = _Images(files, image_column)
    return ids, StoredImages(np.arange(len(ids)), images.fetch, images.describe, part.preparation)


class _File:
    """One Parquet file: its columns, and where its row groups begin."""

    def __init__(self, part: ParquetPart, file: str) -> None:
        self.name = f"{part.location.rstrip('/')}/{file}" if file else part.location
        self._system, root = file_system(part.location)
        self._path = f"{root}/{file}" if file else root
        try:
            with self._system.open_input_file(self._path) as stream, pq.ParquetFile(stream) as parquet:
                self._schema = parquet.schema_arrow
                groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError, UnicodeError) as error:  # Arrow opens no name that is not UTF-8
            raise DataError(f"{self.name!r} cannot be read as Parquet: {error}") from error
        self.starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        image, *_ = part.columns
        for key, column in zip(("image_column", "label_column", "id_column"), part.columns, strict=True):
            if column and column not in self._schema.names:
                raise DataError(
                    f"{self.name!r} has no column {column!r}; set dataset.{key} to one of: "
                    f"{', '.join(self._schema.names)}"
                )
        kind = whole = self._schema.field(image).type
        self._nested = pa.types.is_struct(whole) and whole.get_field_index("bytes") >= 0
        if self._nested:
            kind = whole.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"{self.name!r}: column {image!r} is {whole}, expected encoded images: binary, or a struct with binary "
                "`bytes`; paths are not followed, write the files' bytes into the column"
            )

    @property
    def num_rows(self) -> int:
        """Rows of all its groups."""
        return int(self.starts[-1])

    def column(self, name: str) -> list[Any]:
        """All values of a column; DataError for one that is missing."""
        try:
            with self._system.open_input_file(self._path) as stream:
                values = pq.read_table(stream, columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.name!r}: cannot read column {name!r}: {error}") from error
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{self.name!r} row {row}: {name!r} is empty (null)")
        return list(values.to_pylist())

    def class_names(self, column: str) -> tuple[str, ...]:
        """Names of the classes, if Hugging Face's `datasets` wrote the file; otherwise none."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
            return tuple(canonical(str(name)) for name in features[column]["names"])
        except (KeyError, TypeError, ValueError):
            return ()

    def images(self, column: str, group: int) -> pa.ChunkedArray:
        """Encoded images of one row group; OSError when they cannot be read."""
        try:
            with self._system.open_input_file(self._path) as stream, pq.ParquetFile(stream) as parquet:
                values = parquet.read_row_group(group, columns=[f"{column}.bytes" if self._nested else column])
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        values = values.column(column)
        return pc.struct_field(values, "bytes") if self._nested else values


class _Images:
    """Random access to the images of several files; one row group at a time."""

    def __init__(self, files: Sequence[_File], column: str) -> None:
        self._files = files
        self._column = column
        self._starts = np.cumsum([0, *(file.num_rows for file in files)])
        self._group = lru_cache(maxsize=2)(self._read_group)

    def _read_group(self, number: int, group: int) -> pa.ChunkedArray:
        return self._files[number].images(self._column, group)

    def _find(self, place: int) -> tuple[int, int]:
        """The file, and the row in it."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return number, place - int(self._starts[number])

    def fetch(self, place: int) -> bytes:
        """Encoded bytes, none of a null; OSError when they cannot be read."""
        number, row = self._find(place)
        starts = self._files[number].starts
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = self._group(number, group)[row - int(starts[group])].as_py()
        return bytes(value or b"")

    def describe(self, place: int) -> str:
        """File and row."""
        number, row = self._find(place)
        return f"{self._files[number].name!r} row {row}"


def _numbers(file: _File, part: ParquetPart, described: tuple[str, ...]) -> NDArray[np.int64]:
    """Labels as numbers in the run's list of classes: by name, where a file of the split has names (`described`)."""
    column = part.columns[1]
    values, names = file.column(column), file.class_names(column)
    odd = next((value for value in values if type(value) is not int), None)
    if odd is None:
        if described and not names:
            raise DataError(
                f"{file.name!r} does not name the classes of its labels, and another file of its split does "
                f"({shown(described)}); write both with the same description"
            )
        try:
            labels = np.array(values, np.int64)
        except OverflowError as error:
            raise DataError(f"{file.name!r}: a label in column {column!r} is beyond 64 bits") from error
        if names and part.classes is not None and names != part.classes:
            check_numbers(labels, names, repr(file.name))
            return numbers_of(names, part.classes, repr(file.name))[labels]
        return labels
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{file.name!r}: label {odd!r:.60} in column {column!r}, expected integers or class names")
    if part.classes is None:
        raise ConfigError(
            f"{file.name!r}: labels in column {column!r} are names ({odd!r}); list all of them in "
            "dataset.class_file, in the order of their numbers"
        )
    different = sorted(set(values))
    place = dict(zip(different, numbers_of(different, part.classes, repr(file.name)).tolist(), strict=True))
    return np.array([place[value] for value in values], np.int64)
