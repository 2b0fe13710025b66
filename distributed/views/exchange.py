"""Logs of certificates between this project and others: export from shards, import into a run directory."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError, DataError
from core.evaluation.exchange import CertifyLog, format_log, parse_log
from distributed.files.storage import Folder
from distributed.store.shards import ShardStore

__all__ = ["export_logs", "import_log", "imported_logs", "read_log"]

_LOG: Final = "log.tsv"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def export_logs(root: Folder, stores: Sequence[str], target: Folder) -> list[tuple[str, CertifyLog]]:
    """Write the certificates of each store as logs, a file per curve.

    An example that could not be run is written as an abstention. `idx` is the number at the end of its id, as in
    `cifar10-test-00042`, where all ids of the store are numbered like that; otherwise its place in their sorted order,
    and `NAME.ids.txt` says which is which.

    Files of an earlier export in `target` are replaced.

    Returns:
        Name and content of each file: `dual.tsv`, and for standard RS a file per noise level, `standard-0.25.tsv`.

    Raises:
        DataError: for a store without rows.
    """
    written = []
    for store in stores:
        table = ShardStore(root, store).read()
        for name, rows in _curves(table, store.rpartition("/")[2]):
            ids = rows.column("example_id").to_pylist()
            numbers = _numbers(ids)
            log = CertifyLog(
                idx=np.arange(len(ids)) if numbers is None else numbers,
                label=rows.column("label").to_numpy(),
                predict=rows.column("prediction").to_numpy(),
                radius=rows.column("radius").to_numpy(),
                correct=np.array(rows.column("correct").to_pylist(), np.bool_),
            )
            target.write(f"{name}.tsv", format_log(log).encode())
            if numbers is None:
                target.write(f"{name}.ids.txt", ("\n".join(ids) + "\n").encode())
            written.append((f"{name}.tsv", log))
    return written


def _curves(table: pa.Table, name: str) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each curve: those of each noise level of standard RS, or all of a method with a row per example."""
    if not name.startswith(("standard", "dataset")):
        yield name, table
        return
    for sigma in sorted(table.column("sigma").unique().to_pylist()):
        yield f"{name}-{sigma:g}", table.filter(pc.equal(table.column("sigma"), sigma))


def _numbers(ids: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """The numbers that distinguish ids of the form PREFIX-NUMBER with one prefix; None for ids of another form."""
    parts = [example_id.rpartition("-") for example_id in ids]
    if len({prefix for prefix, _, _ in parts}) != 1 or not all(re.fullmatch(r"\d{1,18}", last) for *_, last in parts):
        return None
    numbers = np.array([int(last) for *_, last in parts], np.int64)
    return numbers if len(np.unique(numbers)) == len(numbers) else None


def read_log(file: Path) -> tuple[CertifyLog, bytes]:
    """A log of somebody else's, and its bytes.

    Raises:
        DataError: for a file that cannot be read as a log.
    """
    try:
        content = file.read_bytes()
        return parse_log(content.decode(), str(file)), content
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(file)!r} is not text: {error}") from error


def import_log(root: Folder, name: str, file: Path, num_classes: int | None = None) -> CertifyLog:
    """Check a log of somebody else's and keep it in the run directory, as it is, for the report to show.

    Args:
        root: the run directory.
        name: what the report calls it; letters, digits, `.`, `_`, `+`, `-`. An earlier one of this name is replaced.
        file: the log.
        num_classes: of the run, where known: a log with other classes is one of another data set.

    Raises:
        ConfigError: for another name.
        DataError: for a file that cannot be read as a log, or whose classes the run does not have.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name: expected letters, digits and . _ + -, not beginning with a sign, got {name!r}")
    log, content = read_log(file)
    classes = np.maximum(log.label, log.predict)
    if num_classes is not None and classes.max() >= num_classes:
        worst = int(classes.argmax())
        raise DataError(
            f"{str(file)!r}: idx {log.idx[worst]} has class {classes[worst]}, but this run has {num_classes} classes "
            f"(0 to {num_classes - 1}): a log of another data set; import it into a run on that one"
        )
    about = {
        "source": str(file),
        "sha256": sha256(content).hexdigest(),
        "imported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "examples": len(log.idx),
    }
    folder = root / "imported" / name
    folder.write("about.json", (json.dumps(about, indent=2) + "\n").encode())
    folder.write(_LOG, content)  # last: what the report looks for
    return log


def imported_logs(root: Folder) -> dict[str, CertifyLog]:
    """Every imported log of a run directory, by name.

    Raises:
        DataError: for one that has been damaged since.
    """
    folder, logs = root / "imported", dict[str, CertifyLog]()
    for path in folder.walk():
        name, _, file = path.partition("/")
        if file == _LOG:
            logs[name] = parse_log(folder.read(path).decode(errors="replace"), folder.where(path))
    return logs
