"""What an attacker with an editor does to a run directory."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa

from distributed.checks.audit import audit
from distributed.files.parquet import from_bytes, to_bytes
from distributed.store.run_directory import RunDirectory

STANDARD, DUAL = "certificates/standard", "certificates/dual"


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest by hand."""
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


def stop(run: Path, store: str = STANDARD, lost: int = 1) -> None:
    """Leave a step as a kill leaves it: not recorded, a shard missing."""
    edit(run, lambda manifest: manifest["steps"].pop(f"certify-{store.rpartition('/')[2]}"))
    (run / store / f"shard-{lost:06d}.parquet").unlink()


def rewrite(
    file: Path,
    rows: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    about: Callable[[dict[str, str]], object] = lambda about: None,
) -> None:
    """Change a file of rows and what it says of them, in place."""
    table, metadata = from_bytes(file.read_bytes(), file.name)
    there = table.to_pylist()
    rows(there)
    about(metadata)
    changed = pa.Table.from_pylist(there, schema=table.schema)
    file.write_bytes(to_bytes(table.schema, [changed], lambda: metadata))


def findings(run: Path) -> str:
    """What the audit finds, a line each."""
    found, _ = audit(RunDirectory(run, None, "look"))
    assert {type(text) for finding in found for text in astuple(finding)} <= {str}
    return "\n".join(map(str, found))
