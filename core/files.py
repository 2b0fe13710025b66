"""Files that appear whole or not at all."""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from core.errors import DataError

__all__ = ["cache_folder", "file_sha256", "known_sha256", "write_files", "write_whole"]

_known: dict[Path, tuple[tuple[int, ...], str]] = {}


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` aside, flush it to the disk and give it its name in one step; makes the folder if needed.

    A crash leaves the old file, the new one, or a hidden one beside them that nobody reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """`write_whole` of each, in their order; the paths written."""
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """`file_sha256`, remembered in this process for as long as nothing has touched the file."""
    info = path.stat()
    state = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    if path not in _known or _known[path][0] != state:
        _known[path] = state, file_sha256(path)
    return _known[path][1]


def cache_folder() -> Path:
    """Where this machine keeps copies of what is elsewhere: a temporary folder that nobody else may read or write.

    Raises:
        DataError: when it belongs to somebody else.
    """
    cache = Path(tempfile.gettempdir()) / f"dual-rs-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise DataError(f"{str(cache)!r} belongs to somebody else: set TMPDIR to a folder of your own")
    return cache
