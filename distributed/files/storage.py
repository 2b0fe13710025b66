"""Folders on a local disk, a shared file system or an object store, with files that appear whole or not at all."""

import hashlib
import logging
import os
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from core.addresses import check_address, is_address
from core.errors import ConfigError, DataError
from core.files import cache_folder, file_sha256, known_sha256, write_whole
from distributed.files.stores import endpoint, file_system

__all__ = ["Folder", "Stored", "file_system"]

T = TypeVar("T")
_log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long an object store may fail before we do: what it is given cost GPU time."""
FIRST_S = 30.0
"""How long one may that has never answered: probably it is not there. The last request may take a minute more."""


@dataclass(frozen=True)
class Stored:
    """A file as its folder lists it.

    Attributes:
        name: relative to the folder.
        size: bytes.
        modified: seconds since the epoch.
    """

    name: str
    size: int
    modified: float


class Folder:
    """A folder, by path or URI; it need not exist yet. Small and picklable.

    Local paths (and shared file systems mounted on all machines) are written aside, flushed and renamed; objects of a
    store appear whole by themselves. A store that fails or hangs is tried again for `PATIENCE_S` seconds, or for
    `FIRST_S` where it has not answered yet.

    Args:
        where: a path, or a URI that pyarrow.fs understands: `s3://bucket/key` (also with `?endpoint_override=host:port`
            and `scheme=http`, or the environment's AWS_ENDPOINT_URL), `gs://...`.

    Raises:
        ConfigError: for a URI with credentials; by every method, when the store does not answer at first.
    """

    _answered: ClassVar[set[str]] = set()
    """Stores that have, in this process or in the one that a folder comes from."""

    def __init__(self, where: "str | os.PathLike[str] | Folder") -> None:
        text = where.uri if isinstance(where, Folder) else os.fspath(where)
        check_address(text)
        scheme = text.partition("://")[0] if is_address(text) else ""
        if scheme == "file":
            text, scheme = urllib.parse.unquote(text.removeprefix("file://")), ""
        self.uri: str = text if scheme else str(Path(text).absolute())
        self.local: Path | None = None if scheme else Path(self.uri)
        """The folder itself, where it is local."""

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __str__(self) -> str:
        return self.uri

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __getstate__(self) -> tuple[str, bool]:
        return self.uri, self._store in self._answered  # a connection does not travel

    def __setstate__(self, state: tuple[str, bool]) -> None:
        uri, answered = state
        Folder.__init__(self, uri)
        if answered:
            self._answered.add(self._store)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.uri.partition("?")[0].rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> "Folder":
        path, sign, query = self.uri.partition("?") if self.local is None else (self.uri, "", "")
        return Folder(f"{path.rstrip('/')}/{name}{sign}{query}")

    @property
    def parent(self) -> "Folder":
        """The folder that holds this one."""
        path, sign, query = self.uri.partition("?") if self.local is None else (self.uri, "", "")
        return Folder(f"{path.rstrip('/').rpartition('/')[0] or '/'}{sign}{query}")

    def where(self, name: str) -> str:
        """Path or URI of a file, for messages and other tools."""
        return (self / name).uri

    @cached_property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        return file_system(self.uri)

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: when it is not there.
        """

        def read() -> bytes:
            system, base = self._place
            with system.open_input_file(f"{base}/{name}") as file:
                return bytes(file.read())

        try:
            return self._patiently(read, f"read {name}")
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, error.strerror, self.where(name)) from error

    def opened(self, name: str) -> pa.NativeFile:
        """A file to read parts of; a context manager."""
        system, base = self._place
        return self._patiently(lambda: system.open_input_file(f"{base}/{name}"), f"open {name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; an existing one is replaced."""
        if self.local is not None:
            write_whole(self.local / name, content)
            return

        def write() -> None:
            system, base = self._place
            with system.open_output_stream(f"{base}/{name}") as file:
                file.write(content)

        self._patiently(write, f"write {name}")

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it is there; False when it is.

        Atomic on local disks. An object store has no such step here: of two writers at the same moment both may be
        told True, and one of them finds the other's content when it looks again.
        """
        if self.local is None:
            if self.exists(name):
                return False
            self.write(name, content)
            return True
        self.local.mkdir(parents=True, exist_ok=True)
        aside = self.local / f".{name}.{os.getpid()}.{time.monotonic_ns()}"
        aside.write_bytes(content)
        try:
            os.link(aside, self.local / name)  # fails if there is one, and what appears is complete
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

        def exists() -> bool:
            system, base = self._place
            return bool(system.get_file_info(f"{base}/{name}").type == pafs.FileType.File)

        return self._patiently(exists, f"look for {name}")

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when there is none."""
        if self.exists(name):
            system, base = self._place
            with suppress(FileNotFoundError):
                self._patiently(lambda: system.delete_file(f"{base}/{name}"), f"remove {name}")

    def remove_all(self) -> None:
        """Remove the folder with everything in it, if it is there."""
        system, base = self._place
        with suppress(FileNotFoundError):
            self._patiently(lambda: system.delete_dir(base), "remove the folder")

    def files(self) -> list[Stored]:
        """The files directly inside, by name, without hidden ones; none when there is no such folder."""
        infos = [info for info in self._infos() if info.type == pafs.FileType.File and info.base_name[:1] != "."]
        listed = [(info.base_name, info.size or 0, info.mtime.timestamp() if info.mtime else 0.0) for info in infos]
        return [Stored(*each) for each in sorted(listed)]

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted, without hidden ones; none when there is no such folder."""
        names = (info.base_name for info in self._infos() if info.type == pafs.FileType.Directory)
        return sorted(name for name in names if not name.startswith("."))

    def walk(self) -> list[str]:
        """Names of all files at any depth, relative to the folder."""
        files = (info.path for info in self._infos(recursive=True) if info.type == pafs.FileType.File)
        return sorted(path.removeprefix(self._place[1]).lstrip("/") for path in files)

    def _infos(self, recursive: bool = False) -> list[pafs.FileInfo]:
        def look() -> list[pafs.FileInfo]:
            system, base = self._place
            return list(system.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=recursive)))

        return self._patiently(look, "list it")

    def sha256(self, name: str) -> str:
        """Hex digest of a file's bytes."""
        if self.local is not None:
            return file_sha256(self.local / name)
        return hashlib.sha256(self.read(name)).hexdigest()

    def fetch(self, name: str, sha256: str) -> Path:
        """A local file with the content of `name`: the file itself, or a copy in this machine's temporary folder.

        A copy is kept under the digest for the other processes of this machine.

        Raises:
            DataError: when it has another digest.
        """
        if self.local is not None:
            if not self.exists(name) or known_sha256(self.local / name) != sha256:
                raise DataError(
                    f"{self.where(name)!r} is not the file that this run wrote (another SHA-256 than {sha256}): put it "
                    "back, or start another --out"
                )
            return self.local / name
        copy = cache_folder() / f"{sha256}{Path(name).suffix}"
        if not copy.exists() or known_sha256(copy) != sha256:
            content = self.read(name)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DataError(f"{self.where(name)!r} has another SHA-256 than {sha256}")
            write_whole(copy, content)
        return copy

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local folder to write files into: this one, or a temporary one that is uploaded at the end."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            yield self.local
            return
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside)
            for name in Folder(aside).walk():
                self.write(name, (Path(aside) / name).read_bytes())

    def check_writable(self) -> None:
        """Write, read and remove a small file, and the folders that this made.

        Raises:
            ConfigError: says why it does not work.
        """
        probe = f"probe-{os.getpid()}-{time.monotonic_ns()}"
        try:
            if self.local is not None:
                made = [folder for folder in (self.local, *self.local.parents) if not folder.exists()]
                try:
                    write_whole(self.local / probe, b"-")
                    (self.local / probe).unlink()
                finally:
                    with suppress(OSError):  # somebody else has put something there
                        for folder in made:
                            folder.rmdir()
                return
            self._probe_store(probe)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write to {self.uri!r}: {error}") from error

    def _probe_store(self, probe: str) -> None:
        system, base = self._place
        prefixes = [base.rsplit("/", depth)[0] if depth else base for depth in range(base.count("/"))]  # not the bucket
        made = [info.path for info in system.get_file_info(prefixes) if info.type == pafs.FileType.NotFound]
        with system.open_output_stream(f"{base}/{probe}") as file:
            file.write(b"-")
        with system.open_input_file(f"{base}/{probe}") as file:
            file.read()
        system.delete_file(f"{base}/{probe}")  # leaves an empty object in place of the folder
        for folder in made:
            if not system.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
                system.delete_dir(folder)

    @property
    def _store(self) -> str:
        """What answers or does not: scheme, bucket and options."""
        path, _, query = self.uri.partition("?")
        return f"{'/'.join(path.split('/')[:3])}?{query}"

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        """Repeat what fails until it works or `PATIENCE_S` has passed (`FIRST_S`, where nothing ever worked).

        A local disk does not come back.
        """
        if self.local is not None:
            return action()
        start, pause = time.monotonic(), 0.5
        first = self._store not in self._answered
        patience = FIRST_S if first else PATIENCE_S
        while True:
            try:
                result = action()
            except OSError as error:
                if _is_answer(error):
                    self._answered.add(self._store)
                    raise
                if (took := time.monotonic() - start) + pause > patience:
                    if first:
                        raise ConfigError(self._unreachable(error, took)) from error
                    raise
                _log.warning(
                    "%s: could not %s, trying again in %.1f s, for %.0f s in all: %s",
                    self.uri, what, pause, patience, error,
                )  # fmt: skip
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
            else:
                self._answered.add(self._store)
                return result

    def _unreachable(self, error: OSError, seconds: float) -> str:
        named = endpoint(self.uri)
        server = f" at {named['scheme']}://{named['endpoint_override']}" if named else ""
        return (
            f"cannot reach {self.uri!r}{server}, tried for {seconds:.0f} s: {error}; check the address, the endpoint "
            "(AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, endpoint_override), the network and the credentials"
        )


def _is_answer(error: OSError) -> bool:
    """Whether it is an answer (no such file or bucket, no right to it) and not a failure."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    return any(word in str(error) for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "HTTP status 403", "HTTP status 404"))
