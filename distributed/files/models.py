"""Models of the user's own wherever they are: copies on this machine, and what is hashed of them. Nothing is run."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from core.addresses import is_address, shown
from core.errors import DataError, ModelError
from core.files import cache_folder, known_sha256
from core.models.hub import FOLDERS, WEIGHTS, files_of, local_path
from distributed.files.storage import Folder, Stored

__all__ = ["fetch_model", "has_weights", "model_sha256"]


def fetch_model(source: str) -> Path:
    """The file or folder of a model on this machine.

    An object is copied into the temporary folder of this machine, once for all processes, and again when its size or
    date changes; of a folder only what a model's folder may hold (`core.models.hub.files_of`).

    Args:
        source: a path, an address (s3://, gs://, file://, ...), or a name on the Hugging Face hub.

    Raises:
        ModelError: when there is nothing, or it cannot be fetched.
        ConfigError: for a store that does not answer, or an address with a secret.
    """
    if not is_address(source):
        return local_path(source).absolute()
    folder = Folder(source)
    if folder.local is not None:
        return local_path(folder.local)
    beside = {file.name: file for file in folder.parent.files()}
    single = folder.name in beside
    root, files = (folder.parent, _with_notes(folder.name, beside)) if single else (folder, _listed(folder))
    key = json.dumps([folder.uri, *((name, file.size, file.modified) for name, file in sorted(files.items()))])
    target = cache_folder() / "models" / hashlib.sha256(key.encode()).hexdigest()[:32] / root.name
    for name, file in files.items():
        _download(root, name, target / name, file.size)
    return target / folder.name if single else target


def has_weights(source: str) -> bool:
    """Whether there is something to load at `source`: a file, or a folder with weights in it."""
    try:
        path = fetch_model(source)
    except ModelError:
        return False
    return path.is_file() or any(file.suffix in (".safetensors", ".bin") for file in path.rglob("*"))


def _download(folder: Folder, name: str, target: Path, size: int) -> None:
    """Copy a file piece by piece, whole or not at all, unless it is there already."""
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {shown(folder.where(name))} ({size / 1e6:,.0f} MB)", flush=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with folder.opened(name) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 24)
        if (got := partial.stat().st_size) != size:
            raise DataError(f"{shown(folder.where(name))!r}: got {got:,} bytes of {size:,}: start the job again")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _with_notes(file: str, there: Mapping[str, Stored]) -> dict[str, Stored]:
    """A file, and what stands beside weights of a folder of the hub: it says how their pixels are normalised."""
    return {name: each for name, each in there.items() if name == file or (file in WEIGHTS and name.endswith(".json"))}


def _listed(folder: Folder) -> dict[str, Stored]:
    """The files of a model's folder, by name."""
    found = {
        f"{part}/{file.name}" if part else file.name: file
        for part in FOLDERS
        for file in (folder / part if part else folder).files()
        if fnmatch(file.name, "*.json") or file.name in WEIGHTS
    }
    if not any(Path(name).name in WEIGHTS for name in found):
        raise ModelError(
            f"no checkpoint at {shown(folder.uri)!r}: no such file, and no folder with one of {', '.join(WEIGHTS)}"
        )
    return {
        name: file
        for name, file in found.items()
        if not name.endswith(".bin") or not any(name.replace(Path(name).name, other) in found for other in WEIGHTS[:2])
    }


def model_sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder that of the names and hashes of the files in it which may be read. Likewise of
    weights that are named themselves, and what is said beside them.
    """
    if not path.is_dir() and path.name not in WEIGHTS:
        return known_sha256(path)
    root, names = (path, ("*.json", *WEIGHTS)) if path.is_dir() else (path.parent, ("*.json", path.name))
    lines = [f"{known_sha256(root / name)}  {name.as_posix()}\n" for name in files_of(root, names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
