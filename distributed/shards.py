"""Parquet shards: the plan that says which examples belong to which shard, atomic commits, reading back.

Exactly once by construction: the plan is written first and never changes, a shard's name is its place in the plan, its
rows depend on nothing but the seed and the models, and it appears whole (written aside, then renamed). Whoever
writes a shard twice writes the same rows under the same name; resuming is listing the names that are there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.errors import ConfigError, DataError
from distributed.rows import CERTIFICATE_SCHEMA, DUAL_SCHEMA, ERROR, ERROR_SCHEMA, MULTISCALE_SCHEMA
from distributed.storage import Folder

__all__ = ["Plan", "ShardStore", "Verified", "non_finite_votes"]


@dataclass(frozen=True)
class Plan:
    """Which examples belong to which shard: shard `i` holds the places `order[bounds[i]:bounds[i + 1]]`.

    Attributes:
        order: int64, places in the data set, each once.
        bounds: int64, ascending from 0 to len(order).
        rows_per_example: rows that an example gives.
        origin: what the rows are made from (configuration fingerprint, model hashes); plain JSON.
        device: `cpu` or `cuda`: the two draw different noise for one key and must not be mixed.
        batch_size: rows of every forward pass, whoever makes the rows; None in a plan from before it was kept, which
            means the configured number.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    rows_per_example: int
    origin: Mapping[str, Any]
    device: str
    batch_size: int | None = None

    @classmethod
    def divide(
        cls,
        num_examples: int,
        shard_examples: int,
        rows_per_example: int,
        origin: Mapping[str, Any],
        device: str = "cpu",
        slots: int = 0,
        batch_size: int | None = None,
    ) -> "Plan":
        """Consecutive examples, `shard_examples` to a shard.

        With `slots` replicas, the shards of the last two rounds are a quarter of the size, so that the replicas end
        together: the costly units come first.
        """
        tail = min(num_examples, 2 * slots * shard_examples) if shard_examples >= 4 else 0
        starts = [
            *range(0, num_examples - tail, shard_examples),
            *range(num_examples - tail, num_examples, max(1, shard_examples // 4)),
        ]
        bounds = np.array([*starts, num_examples] if starts else [0], np.int64)
        order = np.arange(num_examples, dtype=np.int64)
        return cls(order, bounds, rows_per_example, dict(origin), device, batch_size)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, shard: int) -> NDArray[np.int64]:
        """Places in the data set of a shard's examples."""
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples of each shard."""
        return np.diff(self.bounds)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "Plan":
        """Read a plan file.

        Raises:
            DataError: when it is not one.
        """
        try:
            table = pq.read_table(pa.BufferReader(content))
            facts = json.loads(table.schema.metadata[b"plan"])
            shard = table.column("shard").to_numpy()
            order = table.column("index").to_numpy().astype(np.int64)
            bounds = np.searchsorted(shard, np.arange(facts["num_shards"] + 1)).astype(np.int64)
            each, origin = facts["rows_per_example"], facts["origin"]
            return cls(order, bounds, each, origin, facts["device"], facts.get("batch_size"))
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{name!r} is not a plan: {error}") from error

    def to_bytes(self, example_ids: Sequence[str]) -> bytes:
        """The plan as a Parquet file; `example_ids` make it readable by itself."""
        ids = pa.array(example_ids, pa.string())
        table = pa.table(
            {
                "shard": np.repeat(np.arange(len(self)), self.sizes),
                "index": self.order,
                "example_id": ids.take(pa.array(self.order)),
            }
        )
        facts = {
            "num_shards": len(self),
            "rows_per_example": self.rows_per_example,
            "origin": dict(self.origin),
            "device": self.device,
            "batch_size": self.batch_size,
        }
        return _to_bytes(table.replace_schema_metadata({"plan": json.dumps(facts)}))


@dataclass(frozen=True)
class Verified:
    """What `ShardStore.verify` found.

    Attributes:
        rows, error_rows: in all, and those whose status is `error`.
        sha256: of each file, by name.
        devices: that the shards were made on.
        non_finite_draws: draws that voted for no class.
    """

    rows: int
    error_rows: int
    sha256: Mapping[str, str]
    devices: tuple[str, ...]
    non_finite_draws: int


class ShardStore:
    """The shards of one step, in one folder of a run directory.

    shard-NNNNNN.parquet           rows of shard N of the plan
    part-NNNNNN-MMMMMM.parquet     rows of the shards N to M, written when all are there (`compact`)

    Args:
        root: the run directory.
        name: the folder inside it, for example `dataset` or `certificates/dual`.
    """

    def __init__(self, root: "Folder | Path | str", name: str) -> None:
        root = Folder(root)
        self.name = name
        self.folder = root / name
        self._plans, self._plan_name = root / "plan", f"{name.replace('/', '-')}.parquet"
        self.errors = root / "errors" / name.replace("/", "-")
        """Messages of the examples that failed: files of `ERROR_SCHEMA`, one per shard that has some."""
        self._attempts = root / "attempts" / name.replace("/", "-")

    @property
    def plan_file(self) -> str:
        """Where the plan is."""
        return self._plans.where(self._plan_name)

    def read_plan(self) -> Plan | None:
        """The plan on disk, if there is one.

        Raises:
            DataError: when it cannot be read.
            ConfigError: when there are shards without a plan.
        """
        if self._plans.exists(self._plan_name):
            return Plan.from_bytes(self._plans.read(self._plan_name), self.plan_file)
        if self.files():
            raise ConfigError(f"{str(self.folder)!r} holds shards without a plan; move it away to start again")
        return None

    def write_plan(self, plan: Plan, example_ids: Sequence[str]) -> None:
        """Write the plan, before any shard. It never changes: names of shards are places in it."""
        self._plans.write(self._plan_name, plan.to_bytes(example_ids))

    def check_origin(self, plan: Plan, origin: Mapping[str, Any]) -> None:
        """Refuse to go on with shards that were made from something else.

        Raises:
            ConfigError: names what differs (the configuration, the models).
        """
        changed = sorted(key for key in plan.origin.keys() | origin.keys() if plan.origin.get(key) != origin.get(key))
        if changed:
            raise ConfigError(
                f"the shards in {str(self.folder)!r} were made from other inputs ({', '.join(changed)} differ); "
                f"to make them again remove that folder, {self.plan_file!r}, {str(self.errors)!r} and "
                f"{str(self._attempts)!r}, or use another --out"
            )

    def begin(self, shard: int, replica: str) -> int:
        """Note that a replica begins with a shard; returns how many times it has been begun, this one included."""
        folder = self._attempts / f"{shard:06d}"
        folder.write(replica, b"-")
        return len(folder.files())

    def attempts(self) -> dict[int, int]:
        """How many times each shard was begun by some replica: more than once after a loss."""
        return dict(Counter(int(name.partition("/")[0]) for name in self._attempts.walk()))

    def forget_attempts(self) -> None:
        """Remove what `begin` wrote, when the step is finished."""
        self._attempts.remove_all()

    def commit(
        self,
        shard: int,
        rows: Sequence[Mapping[str, Any]],
        schema: pa.Schema,
        device: str,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: its place in the plan.
            rows: of `schema`.
            schema: CERTIFICATE_SCHEMA, DUAL_SCHEMA or MULTISCALE_SCHEMA.
            device: type and name; goes into the file's metadata.
            errors: of ERROR_SCHEMA, one for each row whose status is `error`.
        """
        name = _shard_name(shard)
        if errors:  # before the rows that they explain
            self.errors.write(name, _to_bytes(pa.Table.from_pylist([*map(dict, errors)], schema=ERROR_SCHEMA)))
        table = pa.Table.from_pylist([*map(dict, rows)], schema=schema.with_metadata({"device": device}))
        self.folder.write(name, _to_bytes(table))
        if not errors:
            self.errors.remove(name)  # of an earlier attempt

    def files(self) -> list[str]:
        """Names of the committed files, in order, each row in one of them."""
        names = [file.name for file in self.folder.files()]
        covered = {shard for name in names for shard in _shards_of(name) if name.startswith("part-")}
        return [name for name in names if name.startswith("part-") or set(_shards_of(name)) - covered]

    def committed(self) -> set[int]:
        """The shards that are there."""
        return {shard for name in self.files() for shard in _shards_of(name)}

    def commits(self) -> list[tuple[float, tuple[int, ...]]]:
        """When each file was committed (seconds since the epoch) and its shards, in order of time."""
        visible = set(self.files())
        return sorted(
            (file.modified, tuple(_shards_of(file.name))) for file in self.folder.files() if file.name in visible
        )

    def read(self) -> pa.Table:
        """All committed rows, ordered by example and sigma.

        Raises:
            DataError: when there are none, or a shard cannot be read.
        """
        files = self.files()
        if not files:
            raise DataError(f"no shards in {str(self.folder)!r}: the job that writes them has not run")
        tables = [self.read_file(file) for file in files]
        return pa.concat_tables(tables).sort_by([("example_id", "ascending"), ("sigma", "ascending")])

    def read_errors(self) -> pa.Table:
        """Messages of the examples that failed and have not succeeded since, `ERROR_SCHEMA`."""
        tables = [_from_bytes(self.errors.read(file.name), file.name) for file in self.errors.files()]
        return pa.concat_tables([ERROR_SCHEMA.empty_table(), *tables])

    def shards_with_errors(self) -> set[int]:
        """Shards with rows whose status is `error`."""
        return {shard for file in self.errors.files() for shard in _shards_of(file.name)}

    def read_file(self, name: str) -> pa.Table:
        """The rows of one file, its checksums verified.

        Raises:
            DataError: when it cannot be read.
        """
        return self._table(name, self.folder.read(name)).replace_schema_metadata()

    def _table(self, name: str, content: bytes) -> pa.Table:
        table = _from_bytes(content, self.folder.where(name))
        if table.schema not in (CERTIFICATE_SCHEMA, DUAL_SCHEMA, MULTISCALE_SCHEMA):
            raise DataError(f"{self.folder.where(name)!r} has other columns than certificates: {table.schema.names}")
        return table

    def read_shard(self, shard: int) -> pa.Table | None:
        """The rows of one shard, None when it is not there (or already part of a larger file)."""
        try:
            return self.read_file(_shard_name(shard))
        except FileNotFoundError:
            return None

    def verify(self, plan: Plan, example_ids: Sequence[str], sigmas: Sequence[float | None]) -> Verified:
        """Prove that the shards hold each planned row exactly once, one file at a time.

        Args:
            plan: of the store.
            example_ids: of the whole split.
            sigmas: of an example's rows; `(None,)` for one row of any level.

        Raises:
            DataError: names the first missing, unexpected or repeated row, or a file that cannot be read.
        """
        files = self.files()
        missing = sorted(set(range(len(plan))) - {shard for name in files for shard in _shards_of(name)})
        if missing:
            raise DataError(f"{len(missing)} shards of {self.name} are missing, the first is {missing[0]}")
        ids = pa.array(example_ids, pa.string())
        levels = None if list(sigmas) == [None] else np.asarray(sigmas, np.float64)
        rows = error_rows = non_finite = 0
        digests, devices = {}, set()
        for name in files:
            content = self.folder.read(name)
            digests[name] = hashlib.sha256(content).hexdigest()
            table = self._table(name, content)
            devices |= set(table.schema.metadata[b"device"].decode().split(", "))
            wanted = np.sort(np.concatenate([plan.members(shard) for shard in _shards_of(name)]))
            odd = _first_odd(table, ids.take(pa.array(wanted)), levels)
            if odd is not None:
                raise DataError(
                    f"{self.folder.where(name)!r} does not hold its rows exactly once, the first is {odd!r}; remove "
                    "the file and start the job again: it makes the file anew"
                )
            rows += table.num_rows
            error_rows += int(pc.sum(pc.equal(table.column("status"), ERROR)).as_py() or 0)
            non_finite += non_finite_votes(table)
        return Verified(rows, error_rows, digests, tuple(sorted(devices)), non_finite)

    def compact(self, plan: Plan, part_rows: int) -> None:
        """Join committed shards into parts of about `part_rows` rows; a crash in between is mended by the next call.

        The parts follow from the plan alone. Shards with errors stay as they are: they may be tried again. A
        part replaces its shards the moment it appears; readers of this class do not look at shards that a part covers,
        and those are removed at once.
        """
        per_part = max(1, part_rows // max(1, int(plan.sizes.max(initial=1)) * plan.rows_per_example))
        names, failed = {file.name for file in self.folder.files()}, self.shards_with_errors()
        for first in range(0, len(plan), per_part):
            last = min(first + per_part, len(plan)) - 1
            shards = [name for shard in range(first, last + 1) if (name := _shard_name(shard)) in names]
            part = f"part-{first:06d}-{last:06d}.parquet"
            if part not in names and last > first:
                if len(shards) < last - first + 1 or failed & set(range(first, last + 1)):
                    continue  # or parts of another size are there already
                tables = [self._table(name, self.folder.read(name)) for name in shards]
                devices = sorted({table.schema.metadata[b"device"].decode() for table in tables})
                joined = pa.concat_tables([table.replace_schema_metadata() for table in tables])
                self.folder.write(part, _to_bytes(joined.replace_schema_metadata({"device": ", ".join(devices)})))
                names.add(part)
            if part in names:
                for name in shards:
                    self.folder.remove(name)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def _shards_of(name: str) -> range:
    """The shards that a file holds, by its name; none for a foreign file."""
    kind, *numbers = name.removesuffix(".parquet").split("-")
    if kind not in ("shard", "part") or not all(number.isdigit() for number in numbers) or not numbers:
        return range(0)
    return range(int(numbers[0]), int(numbers[-1]) + 1)


def _first_odd(table: pa.Table, ids: pa.Array, levels: NDArray[np.float64] | None) -> str | None:
    """The first example whose rows are not there exactly once; None when all are."""
    width = 1 if levels is None else len(levels)
    ordered = table.select(["example_id", "sigma"]).sort_by([("example_id", "ascending"), ("sigma", "ascending")])
    each = ids.take(pc.sort_indices(ids))
    wanted = each.take(pa.array(np.repeat(np.arange(len(each)), width)))
    found = ordered.column("example_id").combine_chunks()
    if found.equals(wanted):
        if levels is None:
            return None
        wrong = np.flatnonzero(ordered.column("sigma").to_numpy() != np.tile(levels, len(ids)))
        return None if not len(wrong) else str(found[int(wrong[0])])
    count = Counter(found.to_pylist())
    count.subtract(Counter(wanted.to_pylist()))
    return min((name for name, number in count.items() if number), default=None)


def non_finite_votes(table: pa.Table) -> int:
    """Draws whose logits were not finite: what the votes of each stage lack of its draws."""
    missing = 0
    for ending in ("", "_sigma"):
        if f"counts_estimation{ending}" not in table.column_names:
            continue
        ran = np.asarray(pc.list_value_length(table.column(f"counts_selection{ending}"))) > 0
        for phase in ("selection", "estimation"):
            draws = table.column(f"num_{phase}{ending if phase == 'estimation' else ''}").to_numpy()
            missing += int(draws[ran].sum()) - _votes(table, f"counts_{phase}{ending}")
    if "num_levels" in table.column_names:  # the levels above drew as much as the last one
        above = np.maximum(table.column("num_levels").to_numpy() - 1, 0)
        for phase in ("selection", "estimation"):
            drawn = int((table.column(f"num_{phase}").to_numpy() * above).sum())
            missing += drawn - _votes(table, f"counts_{phase}_above")
    return missing


def _votes(table: pa.Table, column: str) -> int:
    """Sum of a column of votes."""
    return int(pc.sum(pc.list_flatten(table.column(column), recursive=True)).as_py() or 0)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _from_bytes(content: bytes, name: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:  # a wrong size asks for any memory
        raise DataError(
            f"cannot read the shard {name!r}: {error}; remove it and start the job again: it makes the file anew"
        ) from error
