"""Parquet shards: rows of certificates, atomic commits, reading back, proving that all are there, joining.

Exactly once by construction: the plan is written first and never changes, a shard's name is its place in the plan, its
rows depend on nothing but the seed and the models, and it appears whole (written aside, then renamed). Whoever
writes a shard twice writes the same rows under the same name; resuming is listing the names that are there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError, DataError
from distributed.methods import method_of
from distributed.methods.rows import ERROR_SCHEMA
from distributed.store.parquet import from_bytes, to_bytes
from distributed.store.plan import Plan
from distributed.store.storage import Folder
from distributed.store.verify import Verified, Verifier

__all__ = ["ShardStore"]


class ShardStore:
    """The shards of one step, in one folder of a run directory.

    shard-NNNNNN.parquet           rows of shard N of the plan
    part-NNNNNN-MMMMMM.parquet     rows of the shards N to M, written when all are there (`finish`)

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
            schema: of the store's method.
            device: type and name; goes into the file's metadata.
            errors: of ERROR_SCHEMA, one for each row whose status is `error`.
        """
        name = _shard_name(shard)
        if errors:  # before the rows that they explain
            self.errors.write(name, to_bytes(ERROR_SCHEMA, [_table(errors, ERROR_SCHEMA)]))
        self.folder.write(name, to_bytes(schema, [_table(rows, schema)], lambda: {"device": device}))
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
        tables = [from_bytes(self.errors.read(file.name), file.name)[0] for file in self.errors.files()]
        return pa.concat_tables([ERROR_SCHEMA.empty_table(), *tables])

    def shards_with_errors(self) -> set[int]:
        """Shards with rows whose status is `error`."""
        return {shard for file in self.errors.files() for shard in _shards_of(file.name)}

    def read_file(self, name: str) -> pa.Table:
        """The rows of one file, its checksums verified.

        Raises:
            DataError: when it cannot be read.
        """
        return self._table(name, self.folder.read(name))[0]

    def _table(self, name: str, content: bytes) -> tuple[pa.Table, str]:
        """Rows, and the device that they were made on; nothing where a foreign tool has written the file."""
        table, metadata = from_bytes(content, self.folder.where(name))
        if table.schema != method_of(self.name).schema:
            raise DataError(f"{self.folder.where(name)!r} has other columns than {self.name}: {table.schema.names}")
        return table, metadata.get("device", "")

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
        verifier = Verifier(plan, example_ids, sigmas, method_of(self.name))
        for name in self._complete(plan):
            self._checked(name, verifier)
        return verifier.result()

    def finish(
        self, plan: Plan, example_ids: Sequence[str], sigmas: Sequence[float | None], part_rows: int
    ) -> Verified:
        """`verify`, and join the shards into parts of about `part_rows` rows; each file is read once.

        The parts follow from the plan alone. Shards with errors stay as they are: they may be tried again. A part
        replaces its shards the moment it appears, and readers of this class do not look at shards that a part covers;
        those are removed at once. A crash in between is mended by the next call.

        Returns:
            What `verify` of the files that are left would return.

        Raises:
            DataError: as `verify`. The file that it names is left alone, and so are its neighbours of the same part.
        """
        verifier, visible = Verifier(plan, example_ids, sigmas, method_of(self.name)), self._complete(plan)
        parts = dict(self._parts(plan, part_rows, visible))
        joining = {name for shards in parts.values() for name in shards}
        for name in visible:
            if name not in joining:
                self._checked(name, verifier)
        for name in {file.name for file in self.folder.files()} - set(visible):
            if _shards_of(name):  # covered by a part, which holds its rows
                self.folder.remove(name)
        for part, shards in parts.items():
            self._join(shards, part, verifier)
        return verifier.result()

    def _join(self, shards: Sequence[str], part: str, verifier: Verifier) -> None:
        devices: set[str] = set()

        def tables() -> Iterator[pa.Table]:
            for name in shards:
                table, device = self._checked(name, verifier)
                devices.update(device.split(", "))
                yield table

        rest = tables()
        first = next(rest)
        content = to_bytes(first.schema, chain([first], rest), lambda: {"device": ", ".join(sorted(devices))})
        self.folder.write(part, content)
        verifier.joined(shards, part, content)
        for name in shards:
            self.folder.remove(name)

    def _complete(self, plan: Plan) -> list[str]:
        """The files of a store that lacks no shard."""
        files = self.files()
        missing = sorted(set(range(len(plan))) - {shard for name in files for shard in _shards_of(name)})
        if missing:
            raise DataError(f"{len(missing)} shards of {self.name} are missing, the first is {missing[0]}")
        return files

    def _checked(self, name: str, verifier: Verifier) -> tuple[pa.Table, str]:
        content = self.folder.read(name)
        table, device = self._table(name, content)
        verifier.add(name, _shards_of(name), content, table, device, self.folder.where(name))
        return table, device

    def copy_from(self, source: "ShardStore", sigmas: Sequence[float]) -> None:
        """Take over the rows at these noise levels, and why some have errors, from a store with the same shards.

        File by file, each whole or not at all. Without the plan, which is the caller's to write first.

        Args:
            source: a finished store of standard RS.
            sigmas: a subset of its noise levels.
        """
        levels = pa.array(sigmas, pa.float64())

        def part(table: pa.Table) -> pa.Table:
            return table.filter(pc.is_in(table.column("sigma"), levels))

        for file in source.errors.files():
            messages = part(from_bytes(source.errors.read(file.name), source.errors.where(file.name))[0])
            if messages.num_rows:
                self.errors.write(file.name, to_bytes(ERROR_SCHEMA, [messages]))
        for name in source.files():
            table, device = source._table(name, source.folder.read(name))
            self.folder.write(name, to_bytes(table.schema, [part(table)], {"device": device}.copy))

    def _parts(self, plan: Plan, part_rows: int, visible: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """The parts that are still to be made, and the shards that each one joins."""
        per_part = max(1, part_rows // max(1, int(plan.sizes.max(initial=1)) * plan.rows_per_example))
        names, failed = set(visible), self.shards_with_errors()
        for first in range(0, len(plan), per_part):
            last = min(first + per_part, len(plan)) - 1
            shards = [_shard_name(shard) for shard in range(first, last + 1)]
            if last > first and names.issuperset(shards) and not failed & set(range(first, last + 1)):
                yield f"part-{first:06d}-{last:06d}.parquet", shards


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def _shards_of(name: str) -> range:
    """The shards that a file holds, by its name; none for a foreign file."""
    kind, *numbers = name.removesuffix(".parquet").split("-")
    if kind not in ("shard", "part") or not all(number.isdigit() for number in numbers) or not numbers:
        return range(0)
    return range(int(numbers[0]), int(numbers[-1]) + 1)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([*map(dict, rows)], schema=schema)
