"""Parquet files in memory, small enough to be written and read as a whole, with checksums on their pages."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import DataError
from distributed.files.storage import Folder

__all__ = ["from_bytes", "metadata_of_file", "to_bytes"]

_GROUP_ROWS = 2**15
"""Rows that are encoded at once: what a file takes in memory beside its compressed bytes."""


def to_bytes(
    schema: pa.Schema, tables: Iterable[pa.Table], metadata: Callable[[], Mapping[str, str]] | None = None
) -> bytes:
    """A Parquet file of these tables, one after the other.

    Tables are taken one by one, so that they need not be in memory together; then the file's metadata is asked for.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table.replace_schema_metadata())
            if sum(part.num_rows for part in waiting) >= _GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
        if metadata is not None:
            writer.add_key_value_metadata(metadata())
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(content: bytes, name: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, str]]:
    """The rows of a Parquet file, its checksums verified, and its metadata.

    `name`: what messages call it; `columns`: that are read, None takes all.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        # On this thread alone: for files of a thousand rows, handing columns to others costs more than it saves.
        table = file.read(columns=columns, use_threads=False).replace_schema_metadata()
        return table, _pairs(file.metadata)
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:  # a wrong size asks for any memory
        raise DataError(
            f"cannot read the shard {name!r}: {error}; remove it and start the job again: it makes the file anew"
        ) from error


def metadata_of_file(folder: Folder, name: str) -> dict[str, str]:
    """The metadata of a Parquet file, without its rows.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        with folder.opened(name) as file:
            return _pairs(pq.read_metadata(file))
    except (pa.ArrowException, UnicodeError, MemoryError) as error:
        raise DataError(
            f"cannot read the shard {folder.where(name)!r}: {error}; remove it and start the job again: it makes the "
            "file anew"
        ) from error


def _pairs(metadata: pq.FileMetaData) -> dict[str, str]:
    pairs = (metadata.metadata or {}).items()
    return {key.decode(): value.decode() for key, value in pairs if key != b"ARROW:schema"}
