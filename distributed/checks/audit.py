"""Checking a run afterwards: every row from its votes, every file from its hash, a sample from its seeds."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from core.data import Dataset
from core.errors import ConfigError, DataError
from core.progress import Progress
from core.records import Stop
from distributed.execution.launch import step_of, stores, work_of
from distributed.execution.work import Work, build_engine, make_task
from distributed.methods.method import Method, Terms, Votes
from distributed.methods.rows import ERROR, OK
from distributed.store.datasets import load_dataset
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

__all__ = ["Finding", "audit", "replay"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        store: the folder, or "" for the run as a whole.
        row: which row or file.
        problem: what was found and what was expected.
    """

    store: str
    row: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.store, self.row, self.problem) if part)


def audit(directory: RunDirectory) -> tuple[list[Finding], dict[str, int]]:
    """Check a run directory without a forward pass.

    The manifest against its own fingerprint, models and shards against their hashes, rows against the plan (missing,
    unexpected, repeated), and each row against its votes: ranges, split of alpha, radius to the last bit.

    Returns:
        What was found, and the number of rows that were checked per store.

    Raises:
        ConfigError: when the run holds no certificates at all.
    """
    findings: list[Finding] = []
    checked: dict[str, int] = {}
    if directory.manifest.get("fingerprint") != directory.config.fingerprint():
        findings.append(Finding("", "manifest.json", "its fingerprint is not that of its configuration"))
    steps = directory.manifest["steps"]
    present = [name for name in stores() if step_of(name) in steps or ShardStore(directory.folder, name).files()]
    if not present:
        raise ConfigError(f"{str(directory.folder)!r} holds no certificates to audit")
    for name in present:
        try:
            work, hashes = work_of(directory, name)
        except ConfigError as error:
            findings.append(Finding(name, "", str(error)))
            continue
        found, rows = _audit_store(directory, work, hashes)
        findings += found
        checked[name] = rows
    return findings, checked


def _audit_store(directory: RunDirectory, work: Work, hashes: Mapping[str, str]) -> tuple[list[Finding], int]:
    store = ShardStore(work.root, work.store)
    data = load_dataset(work.config.dataset, work.split)
    findings = [Finding(work.store, *pair) for pair in _files(directory, store, hashes)]
    rows: list[dict[str, Any]] = []
    for file in store.files():
        try:
            rows += store.read_file(file).to_pylist()
        except DataError as error:
            findings.append(Finding(work.store, file, str(error)))
    findings += [Finding(work.store, *pair) for pair in _against_plan(rows, data, work)]
    terms = work.terms
    labels = dict(zip(data.example_ids, data.labels.tolist(), strict=True))
    for row in rows:
        name = _row_name(row)
        try:
            problems = list(_against_votes(row, labels, data.num_classes, terms, work.method))
        except (ValueError, IndexError, KeyError, TypeError, ConfigError) as error:
            problems = [f"cannot be recomputed from its votes ({error})"]
        findings += [Finding(work.store, name, problem) for problem in problems]
    return findings, len(rows)


def _files(directory: RunDirectory, store: ShardStore, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Plan and shards against the manifest."""
    try:
        plan = store.read_plan()
    except (ConfigError, DataError) as error:
        yield "plan", str(error)
        return
    if plan is None or dict(plan.origin) != {"fingerprint": directory.config.fingerprint(), "models": dict(hashes)}:
        yield store.plan_file, "was made for another configuration or other models than the manifest says"
    record = directory.manifest["steps"].get(step_of(store.name))
    if record is None:
        yield "", "the step is not finished: its shards cannot be checked against recorded hashes"
        return
    if plan is not None and record.get("batch_size", plan.batch_size) != plan.batch_size:
        yield store.plan_file, f"names batch size {plan.batch_size}, the manifest {record['batch_size']}"
    recorded, files = record["sha256"], set(store.files())
    for name in sorted(recorded.keys() | files):
        if name not in files:
            yield name, "is missing"
        elif name not in recorded:
            yield name, "is not in the manifest"
        elif store.folder.sha256(name) != recorded[name]:
            yield name, "has another SHA-256 than the manifest says"


def _against_plan(rows: Sequence[Mapping[str, Any]], data: Dataset, work: Work) -> Iterator[tuple[str, str]]:
    """Each example (and each sigma of Sigma) exactly once."""
    found = Counter((row["example_id"], row["sigma"] if work.method.per_level else None) for row in rows)
    wanted = {(example_id, sigma) for example_id in data.example_ids for sigma in work.levels}
    for key in sorted(found.keys() | wanted, key=str):
        if found[key] != (1 if key in wanted else 0):
            what = "is not planned" if key not in wanted else f"is there {found[key]} times, expected once"
            yield _row_name({"example_id": key[0], "sigma": key[1]}), what


def _against_votes(
    row: Mapping[str, Any], labels: Mapping[str, int], num_classes: int, terms: Terms, method: Method
) -> Iterator[str]:
    """One row against what its votes and the settings make of it."""
    label = labels.get(row["example_id"])
    if row["status"] == ERROR:
        if label is not None:
            expected = method.error_row(row["example_id"], label, row["sigma"] if method.per_level else None, terms)
            yield from _differences(row, expected, method.schema)
        return
    for votes in method.votes(row, terms, num_classes):
        yield from _out_of_range(votes)
    for ending in method.endings:
        stop, most = row[f"stop_reason{ending}"], terms.sampling.num_estimation
        drawn = row[f"num_estimation{ending}"]
        if (stop == Stop.FULL) != (drawn == most) and stop not in (Stop.REACHED, Stop.SKIPPED):
            yield f"stopped as {stop!r} after {drawn} of {most} draws"
    if label is None:
        return  # reported against the plan
    expected = method.row(row["example_id"], label, method.recompute(row, terms))
    yield from _differences(row, expected, method.schema)
    if (spent := method.spent(row, terms)) > terms.sampling.alpha or row["alpha"] != terms.sampling.alpha:
        yield f"spends {spent!r} of alpha, the run allows {terms.sampling.alpha!r}"


def _out_of_range(votes: Votes) -> Iterator[str]:
    """Votes that so many draws cannot give, or for another number of classes."""
    if any(vote < 0 for vote in votes.counts) or sum(votes.counts) > votes.draws:
        yield f"{votes.column} {votes.counts} do not fit {votes.draws} draws"
    if len(votes.counts) not in votes.widths:
        yield f"{votes.column} has {len(votes.counts)} classes, expected {max(votes.widths)}"


def _differences(row: Mapping[str, Any], expected: Mapping[str, Any], schema: pa.Schema) -> Iterator[str]:
    """Columns that differ, bit for bit."""
    plain = pa.Table.from_pylist([dict(expected)], schema=schema).to_pylist()[0]
    for name, value in plain.items():
        if row[name] != value:
            yield f"{name} is {row[name]!r}, its votes give {value!r}"


def _row_name(row: Mapping[str, Any]) -> str:
    sigma = "" if row["sigma"] is None else f", sigma {row['sigma']:g}"
    return f"{row['example_id']}{sigma}"


def replay(directory: RunDirectory, num: int, seed: int | None, interval_s: float = 10.0) -> list[Finding]:
    """Draw `num` random rows again from their seeds, on this machine, and compare every column.

    The choice of rows is not part of the run's seed, so that nothing in the run can prepare for it.

    Args:
        directory: the run.
        num: rows, spread over the stores by their size.
        seed: of the choice; None for a fresh one.
        interval_s: seconds between two progress lines where there is no terminal.

    Raises:
        ConfigError: when the run was made on a device that is not here.
    """
    rows = [
        (name, index)
        for name in stores()
        if (files := ShardStore(directory.folder, name)).files()
        for index, status in enumerate(files.read().column("status").to_pylist())
        if status == OK
    ]
    chosen = random.Random(seed).sample(rows, min(num, len(rows)))  # noqa: S311 - no secret
    findings: list[Finding] = []
    with Progress(len(chosen), "replay", "rows", interval_s=interval_s) as progress:
        for name in stores():
            if places := [index for store, index in chosen if store == name]:
                findings += _replay_store(directory, name, places, progress)
    return findings


def _replay_store(directory: RunDirectory, name: str, places: Sequence[int], progress: Progress) -> list[Finding]:
    store = ShardStore(directory.folder, name)
    plan = store.read_plan()
    if plan is None:
        raise ConfigError(f"{name} has no plan: {store.plan_file!r} is missing")
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{name} was made on a GPU: its noise can only be drawn again on one")
    work, _ = work_of(directory, name)
    work = replace(work, device=plan.device)
    data = load_dataset(work.config.dataset, work.split)
    position = {example_id: index for index, example_id in enumerate(data.example_ids)}
    table = store.read()
    rows = [row for place in places for row in table.slice(place, 1).to_pylist()]
    method = work.method
    made = method.procedures(work.terms)
    engine = build_engine(work, data.num_classes, plan.batch_size)

    def tasks() -> Iterator[Any]:
        for number, row in enumerate(rows):
            index = position[row["example_id"]]
            which = work.config.sigmas.index(row["sigma"]) if method.per_level else 0
            yield make_task((number, index), data, index, made[which])

    findings = []
    for finished in engine.run(tasks()):
        number, index = finished.key
        drawn = method.row(data.example_ids[index], int(data.labels[index]), finished.result)
        for problem in _differences(rows[number], drawn, method.schema):
            findings.append(Finding(name, _row_name(rows[number]), f"drawn again: {problem}"))
        progress.update(1)
    return findings
