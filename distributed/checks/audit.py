"""Checking a run afterwards: every row from its votes, every file from its hash, a sample from its seeds."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from core.data import Dataset
from core.errors import ConfigError, DataError, NoiseError
from core.procedures.confidence import probability_missed
from core.progress import Progress
from core.records import Stop
from distributed.execution.launch import step_of, stores, work_of
from distributed.execution.work import Work, build_engine, hash_of, make_task, sound_noise
from distributed.methods.method import Method, Terms, Votes
from distributed.methods.rows import ERROR, OK
from distributed.store.imported_labels import imported_radii
from distributed.store.origin import devices_mix, is_named, odd, origin_of
from distributed.store.plan import Plan
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore
from distributed.store.verify import IMAGES_CHECKED, changed_images

__all__ = ["Finding", "Replayed", "audit", "replay"]


NEAR_TIES = 0.002
"""Share of a phase's votes (one at least) that may go to another class where the same noise meets another kind of
device: the last bits of logits differ there."""


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

    Models and shards against their hashes, plan and files against the origin that the manifest states, the step's facts
    against the files, rows against the plan (missing, unexpected, repeated), each row against its votes (ranges, split
    of alpha, radius to the last bit), and some images against the hash in their rows, all where they are in memory.

    Returns:
        What was found, and the number of rows that were checked per store.

    Raises:
        ConfigError: when the run holds no certificates at all.
    """
    findings: list[Finding] = []
    checked: dict[str, int] = {}
    steps = directory.manifest["steps"]
    present = [name for name in stores() if step_of(name) in steps or ShardStore(directory.folder, name).files()]
    if not present:
        raise ConfigError(f"{str(directory.folder)!r} holds no certificates to audit")
    try:
        sound_noise(directory.config, "cpu")
    except NoiseError as error:
        findings.append(Finding("", "noise", str(error)))
    images: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in present:
        try:
            work, hashes = work_of(directory, name)
            data = directory.data(work.split)
            if name == "dataset" and imported_radii(directory) is not None:
                continue  # it is the file that was imported; there are no rows
        except (ConfigError, DataError) as error:
            findings.append(Finding(name, "", str(error)))
            continue
        found, rows = _audit_store(directory, work, data, hashes)
        findings += found
        checked[name] = len(rows)
        for row in rows:
            if row["image_hash"] is not None:
                images[work.split, row["example_id"]].setdefault(row["image_hash"], name)
    for (_, example_id), there in images.items():
        if len(there) > 1:
            said = ", ".join(f"{digest} in {name}" for digest, name in there.items())
            findings.append(Finding("", example_id, f"its rows were computed from different images: {said}"))
    return findings, checked


def _audit_store(
    directory: RunDirectory, work: Work, data: Dataset, hashes: Mapping[str, str]
) -> tuple[list[Finding], list[dict[str, Any]]]:
    store = ShardStore(work.root, work.store)
    try:
        plan = store.read_plan()
        if plan is None:
            raise ConfigError(f"the plan {store.plan_file!r} is missing")
    except (ConfigError, DataError) as error:
        return [Finding(work.store, "plan", str(error))], []
    findings, tables = [], []
    for file in store.files():
        try:
            tables.append(store.read_file(file))
        except DataError as error:
            findings.append(Finding(work.store, file, str(error)))
    if not findings:
        findings += [Finding(work.store, *pair) for pair in _facts(directory, store, plan, data, work)]
    findings += [Finding(work.store, *pair) for pair in _files(directory, store, plan, work, hashes)]
    rows: list[dict[str, Any]] = [row for table in tables for row in table.to_pylist()]
    images = sorted({(row["example_id"], row["image_hash"]) for row in rows if row["image_hash"] is not None})
    if not isinstance(data.images, np.ndarray):
        images = random.SystemRandom().sample(images, min(IMAGES_CHECKED, len(images)))
    findings += [Finding(work.store, "", problem) for problem in changed_images(images, data)]
    work = work.under(plan)
    findings += [Finding(work.store, *pair) for pair in _against_plan(rows, data, work)]
    terms = work.terms
    labels = dict(zip(data.example_ids, data.labels.tolist(), strict=True))
    for row in rows:
        name = _row_name(row)
        try:
            problems = list(_against_votes(row, labels, data.num_classes, terms, work.method, is_named(plan)))
        except (ValueError, IndexError, KeyError, TypeError, ConfigError) as error:
            problems = [f"cannot be recomputed from its votes ({error})"]
        findings += [Finding(work.store, name, problem) for problem in problems]
    return findings, rows


def _facts(
    directory: RunDirectory, store: ShardStore, plan: Plan, data: Dataset, work: Work
) -> Iterator[tuple[str, str]]:
    """What the manifest says of a finished step against its plan and files."""
    if (record := directory.manifest["steps"].get(step_of(store.name))) is None:
        return
    facts: dict[str, Any] = {"shards": len(plan), "batch_size": plan.batch_size, "plan": plan.digest}
    try:
        found = store.verify(plan, data.example_ids, work.levels).facts(0, 0, 0.0)
        facts |= {key: found[key] for key in ("rows", "error_rows", "devices", "non_finite_draws")}
    except DataError as error:
        yield "", str(error)
    for key, value in facts.items():
        if record.get(key, value) != value:
            yield "manifest.json", f"{key} is {record[key]!r}, plan and files say {value!r}"


def _files(
    directory: RunDirectory, store: ShardStore, plan: Plan, work: Work, hashes: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Plan and files against the manifest."""
    noted = directory.manifest.get("data", {}).get(work.split, {}).get("digest", "not noted")
    expected = origin_of(directory.config, hashes, noted, begun=plan)
    if problem := odd(plan.origin, expected):
        yield store.plan_file, f"was made for something else than the manifest says: {problem}"
    yield from store.odd_files(plan)
    record = directory.manifest["steps"].get(step_of(store.name))
    if record is None:
        yield "", "the step is not finished: its shards cannot be checked against recorded hashes"
        return
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
    row: Mapping[str, Any], labels: Mapping[str, int], num_classes: int, terms: Terms, method: Method, named: bool
) -> Iterator[str]:
    """One row against what its votes and the settings make of it."""
    label = labels.get(row["example_id"])
    if row["status"] == ERROR:
        if label is not None:
            expected = method.error_row(row["example_id"], label, row["sigma"] if method.per_level else None, terms)
            yield from _differences(row, expected, method.columns(terms))
        return
    for votes in method.votes(row, terms, num_classes):
        yield from _out_of_range(votes)
    most = {terms.sampling.at(sigma).num_estimation for sigma in (*terms.sigmas, terms.sigma_e)}
    for stop, drawn in method.ends(row):
        full = (stop == Stop.FULL) == (drawn in most) or stop == Stop.REACHED
        if not full or (stop == Stop.SKIPPED) != (drawn == 0):
            yield f"stopped as {stop!r} after {drawn} of {max(most)} draws"
    if label is None:
        return  # reported against the plan
    yield from _differences(row, method.again({**row, "label": label}, terms), method.columns(terms))
    if row["image_hash"] is None and named:
        yield "does not name the image that it was computed from"
    if (spent := method.spent(row, terms)) > terms.sampling.alpha:
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


@dataclass(frozen=True)
class Replayed:
    """What was drawn again of a store.

    Attributes:
        store: which.
        drawn, rows: how many rows, out of how many that are not errors.
        elsewhere: whether this is another kind of device than some of them were made on.
    """

    store: str
    drawn: int
    rows: int
    elsewhere: bool = False

    def __str__(self) -> str:
        """With which probability forged rows would have been missed: one, or a share of all."""
        each = dict.fromkeys((1, *(math.ceil(self.rows * share) for share in (0.01, 0.1))))
        missed = (f"{probability_missed(self.rows, odd, self.drawn):.2g} ({odd:,})" for odd in each)
        return (
            f"{self.drawn:,} of {self.rows:,} rows drawn again; probability of missing forged rows, by their number: "
            f"{', '.join(missed)}"
            + f"; made on another device: up to {NEAR_TIES:.1%} of the votes of a phase, or one, may differ"
            * self.elsewhere
        )


def replay(
    directory: RunDirectory,
    num: int,
    seed: int,
    interval_s: float = 10.0,
    tell: Callable[[Replayed], None] | None = None,
) -> list[Finding]:
    """Draw `num` random rows of each store again from their seeds, on this machine, and compare every column.

    The choice of rows is no part of the run, so that nothing in the run can prepare for it.

    Args:
        directory: the run.
        num: rows of each store; certificates come first.
        seed: of the choice, one that nobody could foresee.
        interval_s: seconds between two progress lines where there is no terminal.
        tell: is told of each store how much of it was looked at.

    Raises:
        ConfigError: when the run was made on a device that is not here.
    """
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(stores()):  # certificates first
        if (store := ShardStore(directory.folder, name)).files():
            table = store.read()
            there = table.filter(pc.equal(table.column("status"), OK))
            places = random.Random(f"{seed} {name}").sample(range(len(there)), min(num, len(there)))  # noqa: S311
            chosen[name] = there.take(places).to_pylist()
            if tell is not None:
                tell(Replayed(name, len(places), len(there), store.devices() != {_device(store)}))
    findings: list[Finding] = []
    with Progress(sum(map(len, chosen.values())), "replay", "rows", interval_s=interval_s) as progress:
        for name, rows in chosen.items():
            findings += _replay_store(directory, name, rows, progress)
    return findings


def _device(store: ShardStore) -> str:
    """Where rows of a store are drawn again: where they were begun, or here, if the noise is the same.

    Raises:
        ConfigError: when there is no GPU, and their noise was that of one.
    """
    plan = store.read_plan()
    if plan is None or plan.device == "cpu" or torch.cuda.is_available():
        return plan.device if plan is not None else "cpu"
    if not devices_mix(plan):
        raise ConfigError(f"{store.name} was made on a GPU: its noise can only be drawn again on one")
    return "cpu"


def _near(row: Sequence[Votes], drawn: Sequence[Votes]) -> bool:
    """Whether near-ties can make the difference between the votes of a row."""
    pairs = list(zip(row, drawn, strict=False))
    alike = [(a.column, a.draws, len(a.counts)) == (b.column, b.draws, len(b.counts)) for a, b in pairs]
    moved = [sum(abs(one - two) for one, two in zip(a.counts, b.counts, strict=False)) / 2 for a, b in pairs]
    return (
        len(row) == len(drawn)
        and all(alike)
        and all(num <= max(1, NEAR_TIES * a.draws) for num, (a, _) in zip(moved, pairs, strict=True))
    )


def _replay_store(
    directory: RunDirectory, name: str, rows: Sequence[Mapping[str, Any]], progress: Progress
) -> list[Finding]:
    store = ShardStore(directory.folder, name)
    plan = store.read_plan()
    if plan is None:
        raise ConfigError(f"{name} has no plan")
    work, _ = work_of(directory, name)
    work = replace(work.under(plan), device=_device(store))
    elsewhere = store.devices() != {work.device}
    data = directory.data(work.split)
    position = {example_id: index for index, example_id in enumerate(data.example_ids)}
    method = work.method
    made = method.procedures(work.terms)
    engine = build_engine(work, data.num_classes, plan.batch_size)
    hashes: dict[int, str] = {}

    def tasks() -> Iterator[Any]:
        for number, row in enumerate(rows):
            index = position[row["example_id"]]
            which = work.config.sigmas.index(row["sigma"]) if method.per_level else 0
            task = make_task((number, index), data, index, made[which])
            hashes[number] = hash_of(task)
            yield task

    findings = []
    for finished in engine.run(tasks()):
        number, index = finished.key
        image = hashes[number] if is_named(plan) or rows[number]["image_hash"] is not None else None
        drawn = method.row(data.example_ids[index], int(data.labels[index]), finished.result) | {"image_hash": image}
        near = elsewhere and _near(
            *(list(method.votes(row, work.terms, data.num_classes)) for row in (rows[number], drawn))
        )
        # Where the votes are near, what follows from them is not compared again: `audit` has.
        expected = drawn | {key: rows[number][key] for key in drawn if key != "image_hash"} if near else drawn
        for problem in _differences(rows[number], expected, method.columns(work.terms)):
            findings.append(Finding(name, _row_name(rows[number]), f"drawn again: {problem}"))
        progress.update(1)
    return findings
