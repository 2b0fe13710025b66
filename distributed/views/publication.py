"""Certificates for others: the rows, what they are, and the report, without what concerns this machine alone."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from core.files import write_whole
from core.report import ReportData
from core.report.pages import Block, Heading, Section, Text, markdown_page
from core.report.render import accuracy_table, write_report
from distributed.execution.launch import step_of, stores
from distributed.methods import method_of
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["public", "published_stores", "unfinished_stores", "write_publication"]

_PLACE: Final = re.compile(r"(?<![\w.~/:-])(?:[A-Za-z][\w+.-]*://|~?/|\.\.?/|[A-Za-z]:\\)[^\s'\",;()\[\]{}]+")


def public(value: Any) -> Any:
    """Plain JSON with each path and address cut to its last part: they name folders, users, buckets and hosts."""
    if isinstance(value, Mapping):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if _PLACE.match(value) and "\n" not in value:  # as a whole: a path may have spaces
        return _last(value)
    return _PLACE.sub(lambda found: _last(found[0]), value)


def _last(place: str) -> str:
    return ".../" + re.split(r"[/\\]", place.partition("?")[0].rstrip("/\\"))[-1]


def published_stores(directory: RunDirectory) -> list[str]:
    """Its folders of test-time certificates."""
    return [name for name in stores() if name != "dataset" and ShardStore(directory.folder, name).committed()]


def unfinished_stores(directory: RunDirectory) -> list[str]:
    """Those that a run needs, or has begun, and has not finished."""
    needed = ["certificates/standard", f"certificates/{directory.config.certify.routed}"]
    steps = directory.manifest["steps"]
    return [name for name in dict.fromkeys([*needed, *published_stores(directory)]) if step_of(name) not in steps]


def write_publication(
    directory: RunDirectory, data: ReportData, sections: Sequence[Section], target: Path, said: str
) -> list[str]:
    """Write README.md (the data set card), manifest.json, certificates/ and report/.

    `data`: of its report, with a manifest that is `public`; `target`: an empty local folder; `said`: of the audit.

    Returns:
        The names of the files of rows.
    """
    written, configs = [], []
    for name in published_stores(directory):
        store = ShardStore(directory.folder, name)
        for file in store.files():
            write_whole(target / name / file, store.folder.read(file))
            written.append(f"{name}/{file}")
        files = [{"split": "test", "path": f"{name}/*.parquet"}]
        configs.append({"config_name": name.rpartition("/")[2], "data_files": files})
    write_report(data, target / "report", sections)
    write_whole(target / "manifest.json", (json.dumps(data.manifest, indent=4) + "\n").encode())
    header = {
        "pretty_name": f"Certificates of robustness: {data.labels}",
        "task_categories": ["image-classification"],
        "tags": ["certified-robustness", "randomized-smoothing", "dual-rs"],
        "configs": configs,
    }
    card = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{_card(directory, data, said)}"
    write_whole(target / "README.md", card.encode())
    return written


def _card(directory: RunDirectory, data: ReportData, said: str) -> str:
    found: Any = data.manifest.get("data", {})
    digest = found.get("test", {}).get("digest", "unknown")
    sigmas = ", ".join(f"{sigma:g}" for sigma in data.sigmas)
    blocks: list[Block] = [
        Text(
            f"Certified {data.law.norm} radii of {data.num_examples:,} test examples of {data.labels} (digest "
            f"{digest}), in the pixel scale [0, 1], by smoothing at noise levels {sigmas}: n0 = {data.num_selection:,} "
            f"selection draws and n = {data.num_estimation:,} estimation draws per certificate, failure probability "
            f"{data.alpha:g} per example. Claim of Dual RS: {directory.config.certify.claim}. No image is included."
        ),
        Text(said),
        accuracy_table(data),
        Heading("Files"),
        *(Text(f"{name}/*.parquet: {method_of(name).title}.") for name in published_stores(directory)),
        Text(
            "A row an example (standard: an example and noise level) with the raw votes, so that other radii or "
            "another alpha need no new draws. example_id, label, prediction (-1: abstained), correct, radius (0 where "
            "abstaining), p_lower, counts_selection, counts_estimation (votes by class), status (error: could not be "
            "run, claims nothing)."
        ),
        Text(
            "manifest.json: configuration, seed, versions, SHA-256 of the networks and, for each finished step, of its "
            "files of rows. report/report.html: tables and curves; report/examples.html: each example."
        ),
    ]
    return markdown_page(f"Certificates of robustness: {data.labels}", blocks, None)
