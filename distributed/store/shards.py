"""Parquet shards: rows of certificates, atomic commits, reading back, proving that all are there, joining.

Exactly once by construction: the plan is written first and never changes, a shard's name is its place in the plan, its
rows depend on nothing but the seed and the models, and it appears whole (written aside, then renamed). Whoever
writes a shard twice writes the same rows under the same name; resuming is listing the names that are there.
"""

import json
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError, DataError
from distributed.files.ahead import ahead
from distributed.files.parquet import from_bytes, metadata_of_file, to_bytes
from distributed.files.storage import Folder
from distributed.methods import method_of
from distributed.methods.rows import ERROR_SCHEMA
from distributed.store.names import odd_names, part_name, shard_name, shards_of
from distributed.store.origin import against_manifest, check_file, metadata_of, odd
from distributed.store.plan import Plan
from distributed.store.verify import IMAGES_CHECKED, Verifier, kinds_of

__all__ = ["ShardStore"]


class ShardStore:
    """The shards of one step, in one folder of a run directory.

    shard-NNNNNN.parquet           rows of shard N of the plan
    part-NNNNNN-MMMMMM.parquet     rows of the shards N to M, written when all are there (`finish`)

    Each file names what it was made from (`origin`). Whatever reads one here compares that with the plan, and `read`
    the plan with the manifest.
    """

    def __init__(self, root: "Folder | Path | str", name: str) -> None:
        self._root = root = Folder(root)
        self.name = name
        self.folder = root / name
        self._plans, self._plan_name = root / "plan", f"{name.replace('/', '-')}.parquet"
        self.errors = root / "errors" / name.replace("/", "-")
        """Messages of the examples that failed: files of `ERROR_SCHEMA`, one per shard that has some."""
        self._attempts = root / "attempts" / name.replace("/", "-")
        self._known: Plan | None = None

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
        if (plan := self._plan()) is None and self.files():
            raise ConfigError(f"{str(self.folder)!r} holds shards without a plan; move it away to start again")
        return plan

    def _plan(self) -> Plan | None:
        """The plan, read once: it never changes."""
        if self._known is None and self._plans.exists(self._plan_name):
            self._known = Plan.from_bytes(self._plans.read(self._plan_name), self.plan_file)
        return self._known

    def write_plan(self, plan: Plan, example_ids: Sequence[str]) -> None:
        """Write the plan, before any shard. It never changes: names of shards are places in it."""
        self._plans.write(self._plan_name, plan.to_bytes(example_ids))
        self._known = plan

    def check_origin(self, plan: Plan, origin: Mapping[str, Any]) -> None:
        """Refuse to go on with shards that were made from something else.

        Raises:
            ConfigError: names what differs (the configuration, the models, the data).
        """
        if problem := odd(plan.origin, origin):
            raise ConfigError(
                f"the shards in {str(self.folder)!r} were made from other inputs ({problem}); "
                f"to make them again remove that folder, {self.plan_file!r}, {str(self.errors)!r} and "
                f"{str(self._attempts)!r}, or use another --out"
            )

    def check_files(self) -> None:
        """Refuse files that are not the plan's, by their names and what they say of their origin; reads no rows.

        Raises:
            DataError: names the first, and what is wrong with it.
            ConfigError: as `check_manifest`, and when there are files but no plan.
        """
        self.check_manifest()
        for name, metadata in ahead(partial(metadata_of_file, self.folder), self._named(self._plan())):
            self._check(name, metadata)

    def check_manifest(self) -> None:
        """Refuse a plan that was made for something else than the manifest beside it states; both may be missing.

        Raises:
            ConfigError: names what differs.
        """
        name = "manifest.json"
        if not self._root.exists(name) or (plan := self.read_plan()) is None:
            return  # derived from a run, and no run itself
        if problem := against_manifest(plan, self.name, json.loads(self._root.read(name))):
            raise ConfigError(
                f"{self._root.where(name)!r} is not what {self.name} was made from, by {self.plan_file!r}: {problem}; "
                "one of them was edited: put it back, or make the rows anew in another --out"
            )

    def odd_files(self, plan: Plan | None) -> list[tuple[str, str]]:
        """Files that are none of the plan's by their names, and why."""
        return odd_names([file.name for file in self.folder.files()], None if plan is None else len(plan))

    def _named(self, plan: Plan | None) -> list[str]:
        """`files`, if there is no odd one."""
        for name, problem in self.odd_files(plan):
            raise DataError(
                f"{self.folder.where(name)!r} {problem}; expected shard-NNNNNN.parquet and part-NNNNNN-MMMMMM.parquet, "
                "each shard in one of them: move the file away and start the job again"
            )
        return self.files()

    def begin(self, shard: int, replica: str) -> int:
        """Note that a replica begins with a shard; returns how many times it has been begun, this one included."""
        folder = self._attempts / f"{shard:06d}"
        folder.write(replica, b"-")
        return len(folder.files())

    def attempts(self) -> dict[int, int]:
        """How many times each shard was begun by some replica: more than once after a loss."""
        return dict(Counter(int(name.partition("/")[0]) for name in self._attempts.walk()))

    def at_work(self) -> set[str]:
        """Replicas with shards that are not there yet; those that were lost with one are among them until it is."""
        begun, there = (name.partition("/") for name in self._attempts.walk()), self.committed()
        return {replica for shard, _, replica in begun if int(shard) not in there}

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
        name = shard_name(shard)
        if errors:  # before the rows that they explain
            self.errors.write(name, to_bytes(ERROR_SCHEMA, [_table(errors, ERROR_SCHEMA)]))
        plan = self._plan()
        about = {"device": device} | ({} if plan is None else metadata_of(plan, self.name, [shard]))
        self.folder.write(name, to_bytes(schema, [_table(rows, schema)], about.copy))
        if not errors:
            self.errors.remove(name)  # of an earlier attempt

    def files(self) -> list[str]:
        """Names of the committed files, in order, each row in one of them."""
        names = [file.name for file in self.folder.files()]
        covered = {shard for name in names for shard in shards_of(name) if name.startswith("part-")}
        return [name for name in names if name.startswith("part-") or set(shards_of(name)) - covered]

    def committed(self) -> set[int]:
        """The shards that are there."""
        return {shard for name in self.files() for shard in shards_of(name)}

    def commits(self) -> list[tuple[float, tuple[int, ...]]]:
        """When each file was committed (seconds since the epoch) and its shards, in order of time."""
        visible = set(self.files())
        return sorted(
            (file.modified, tuple(shards_of(file.name))) for file in self.folder.files() if file.name in visible
        )

    def read(self) -> pa.Table:
        """All committed rows, ordered by example and sigma.

        Raises:
            DataError: when there are none, or a file cannot be read or is not the plan's.
            ConfigError: as `check_manifest`.
        """
        if not self.files():
            raise DataError(f"no shards in {str(self.folder)!r}: the job that writes them has not run")
        self.check_manifest()
        tables = [self.read_file(file) for file in self._named(self._plan())]
        return pa.concat_tables(tables).sort_by([("example_id", "ascending"), ("sigma", "ascending")])

    def read_errors(self) -> pa.Table:
        """Messages of the examples that failed and have not succeeded since, `ERROR_SCHEMA`."""
        tables = [from_bytes(self.errors.read(file.name), file.name)[0] for file in self.errors.files()]
        return pa.concat_tables([ERROR_SCHEMA.empty_table(), *tables])

    def shards_with_errors(self) -> set[int]:
        """Shards with rows whose status is `error`."""
        return {shard for file in self.errors.files() for shard in shards_of(file.name)}

    def read_file(self, name: str) -> pa.Table:
        """The rows of one file, its checksums verified and its origin compared with the plan.

        Raises:
            DataError: when it cannot be read, or is not the plan's.
        """
        return self._table(name, self.folder.read(name))[0]

    def devices(self) -> set[str]:
        """Kinds of device that the rows were made on: `cpu`, `cuda`."""
        abouts = (metadata_of_file(self.folder, name) for name in self._named(self._plan()))
        return set().union(*(kinds_of(about.get("device", "")) for about in abouts))

    def images(self, num: int = IMAGES_CHECKED) -> Iterator[tuple[str, str]]:
        """`example_id` and `image_hash` of `num` committed examples, chosen afresh; reads at most so many files.

        Where a share s of the images has changed since, all of that is missed with probability (1 - s)^num. Examples
        without a hash (errors, and rows from before they had it) are passed over.

        Raises:
            DataError: as `read_file`.
        """
        if (plan := self._plan()) is None:
            return
        files, columns = self._named(plan), ["example_id", "image_hash"]
        starts = np.cumsum([0, *(int(plan.sizes[list(shards_of(name))].sum()) for name in files)])
        places = random.SystemRandom().sample(range(int(starts[-1])), min(num, int(starts[-1])))
        chosen: dict[str, list[int]] = defaultdict(list)
        for place, file in zip(places, np.searchsorted(starts, places, side="right") - 1, strict=True):
            chosen[files[file]].append((place - int(starts[file])) * plan.rows_per_example)
        for name, content in ahead(self.folder.read, chosen):
            table, metadata = from_bytes(content, self.folder.where(name), columns)
            self._check(name, metadata)
            if table.schema.names == columns:
                there = [row for row in chosen[name] if row < table.num_rows]
                yield from (tuple(row.values()) for row in table.take(there).drop_null().to_pylist())

    def _table(self, name: str, content: bytes) -> tuple[pa.Table, dict[str, str]]:
        """Rows, and what the file says of them: device and origin, where a foreign tool has not written it."""
        table, metadata = from_bytes(content, self.folder.where(name))
        self._check(name, metadata)
        schema = method_of(self.name).schema
        if set(schema.names) ^ set(table.schema.names) == {"image_hash"}:  # from before rows had it
            table = table.append_column("image_hash", pa.nulls(table.num_rows, pa.string())).select(schema.names)
        if table.schema != method_of(self.name).schema_with(table.schema.names):
            raise DataError(f"{self.folder.where(name)!r} has other columns than {self.name}: {table.schema.names}")
        return table, metadata

    def _check(self, name: str, metadata: Mapping[str, str]) -> None:
        if (plan := self._plan()) is not None and (shards := shards_of(name)):
            check_file(plan, self.name, shards, metadata, self.folder.where(name))

    def read_shard(self, shard: int) -> pa.Table | None:
        """The rows of one shard, None when it is not there (or already part of a larger file)."""
        try:
            return self.read_file(shard_name(shard))
        except FileNotFoundError:
            return None

    def verify(self, plan: Plan, example_ids: Sequence[str], sigmas: Sequence[float | None]) -> Verifier:
        """Prove that the shards hold each planned row exactly once, one file at a time.

        `example_ids`: of the whole split; `sigmas`: of an example's rows, `(None,)` for one row of any level.

        Raises:
            DataError: names the first missing, unexpected or repeated row, or a file that cannot be read.
        """
        verifier = Verifier(plan, example_ids, sigmas, method_of(self.name))
        deque(self._checked(self._complete(plan), verifier), maxlen=0)
        return verifier

    def finish(
        self, plan: Plan, example_ids: Sequence[str], sigmas: Sequence[float | None], part_rows: int
    ) -> Verifier:
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
        deque(self._checked([name for name in visible if name not in joining], verifier), maxlen=0)
        covered = {file.name for file in self.folder.files() if shards_of(file.name)} - set(visible)
        self._remove(covered)  # a part holds their rows
        for part, shards in parts.items():
            self._join(plan, shards, part, verifier)
        return verifier

    def _join(self, plan: Plan, shards: Sequence[str], part: str, verifier: Verifier) -> None:
        devices, named = set[str](), list[bool]()

        def tables() -> Iterator[pa.Table]:
            for table, metadata in self._checked(shards, verifier):
                devices.update(metadata["device"].split(", "))
                named.append("origin" in metadata)
                yield table

        def about() -> dict[str, str]:
            origin = metadata_of(plan, self.name, shards_of(part)) if all(named) else {}
            return {"device": ", ".join(sorted(devices)), **origin}

        rest = tables()
        first = next(rest)
        content = to_bytes(first.schema, chain([first], rest), about)
        self.folder.write(part, content)
        verifier.joined(shards, part, content)
        self._remove(shards)

    def _remove(self, names: Iterable[str]) -> None:
        deque(ahead(self.folder.remove, names), maxlen=0)

    def _complete(self, plan: Plan) -> list[str]:
        """The files of a store that lacks no shard."""
        files = self._named(plan)
        missing = sorted(set(range(len(plan))) - {shard for name in files for shard in shards_of(name)})
        if missing:
            raise DataError(
                f"{len(missing)} shards of {self.name} are missing, the first is {missing[0]}; start the job again: it "
                "makes them"
            )
        return files

    def _checked(self, names: Iterable[str], verifier: Verifier) -> Iterator[tuple[pa.Table, dict[str, str]]]:
        """`_table` of each of these files, once the verifier has seen it."""
        for name, content in ahead(self.folder.read, names):
            table, metadata = self._table(name, content)
            verifier.add(name, shards_of(name), content, table, metadata.get("device", ""), self.folder.where(name))
            yield table, metadata

    def copy_from(self, source: "ShardStore", sigmas: Sequence[float]) -> None:
        """Take over the rows at these noise levels, and why some have errors, from a store with the same shards.

        File by file, each whole or not at all. The plan is the caller's to write first.
        """
        levels = pa.array(sigmas, pa.float64())

        def part(table: pa.Table) -> pa.Table:
            return table.filter(pc.is_in(table.column("sigma"), levels))

        for file in source.errors.files():
            messages = part(from_bytes(source.errors.read(file.name), source.errors.where(file.name))[0])
            if messages.num_rows:
                self.errors.write(file.name, to_bytes(ERROR_SCHEMA, [messages]))
        for name in source.files():
            table, about = source._table(name, source.folder.read(name))
            if "origin" in about and (plan := self._plan()) is not None:
                about |= metadata_of(plan, self.name, shards_of(name))
            self.folder.write(name, to_bytes(table.schema, [part(table)], about.copy))

    def _parts(self, plan: Plan, part_rows: int, visible: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """The parts that are still to be made, and the shards that each one joins."""
        per_part = max(1, part_rows // max(1, int(plan.sizes.max(initial=1)) * plan.rows_per_example))
        names, failed = set(visible), self.shards_with_errors()
        for first in range(0, len(plan), per_part):
            last = min(first + per_part, len(plan)) - 1
            shards = [shard_name(shard) for shard in range(first, last + 1)]
            if last > first and names.issuperset(shards) and not failed & set(range(first, last + 1)):
                yield part_name(first, last), shards


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([*map(dict, rows)], schema=schema)
