"""Parquet shards: the plan that says which examples belong to which shard, the rows, atomic commits, reading back.

Exactly once by construction: the plan is written first and never changes, a shard's name is its place in the plan, its
rows depend on nothing but the seed and the models, and it appears whole (written aside, then renamed). Whoever
writes a shard twice writes the same rows under the same name; resuming is listing the names that are there.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError, DataError
from core.files import write_whole
from core.records import Certificate, DualCertificate, Stop

__all__ = ["CERTIFICATE_SCHEMA", "DUAL_SCHEMA", "Plan", "ShardStore", "certificate_row", "dual_row"]

_COUNTS = pa.list_(pa.int64())

CERTIFICATE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("label", pa.int64()),
        ("sigma", pa.float64()),
        ("prediction", pa.int64()),
        ("correct", pa.bool_()),
        ("radius", pa.float64()),
        ("p_lower", pa.float64()),
        ("num_selection", pa.int64()),
        ("num_estimation", pa.int64()),
        ("counts_selection", _COUNTS),
        ("counts_estimation", _COUNTS),
        ("alpha", pa.float64()),
        ("abstained", pa.bool_()),
        ("num_draws", pa.int64()),
        ("stop_reason", pa.string()),
        ("alpha_early", pa.float64()),
        ("target", pa.float64()),
    ]
)
"""A row per (example, sigma). `prediction` is -1 and `radius` 0 where it abstained; radii in the pixel scale [0, 1].
`stop_reason`, `alpha_early`, `target`: see `core.records.Certificate`. `num_estimation` is what was drawn."""

DUAL_SCHEMA = pa.schema(
    [
        *CERTIFICATE_SCHEMA,
        ("sigma_e", pa.float64()),
        ("sigma_index", pa.int64()),
        ("radius_sigma", pa.float64()),
        ("radius_class", pa.float64()),
        ("bounded_by", pa.string()),
        ("alpha_sigma", pa.float64()),
        ("alpha_class", pa.float64()),
        ("p_lower_sigma", pa.float64()),
        ("num_estimation_sigma", pa.int64()),
        ("stop_reason_sigma", pa.string()),
        ("alpha_early_sigma", pa.float64()),
        ("target_sigma", pa.float64()),
        ("num_shared", pa.int64()),
        ("counts_selection_sigma", _COUNTS),
        ("counts_estimation_sigma", _COUNTS),
    ]
)
"""A row per example. Unmarked counts are the classifier's (empty when it was not run), `_sigma` the estimator's.
`sigma` is null when the estimator abstained; `sigma_index` is its selection draws' choice all the same."""


def certificate_row(example_id: str, label: int, certificate: Certificate) -> dict[str, Any]:
    """One row of `CERTIFICATE_SCHEMA`."""
    c = certificate
    return {
        "example_id": example_id,
        "label": label,
        "sigma": c.sigma,
        "prediction": c.prediction,
        "correct": c.prediction == label,
        "radius": c.radius,
        "p_lower": c.p_lower,
        "num_selection": c.num_selection,
        "num_estimation": c.num_estimation,
        "counts_selection": c.counts_selection,
        "counts_estimation": c.counts_estimation,
        "alpha": c.alpha,
        "abstained": c.abstained,
        "num_draws": c.num_draws,
        "stop_reason": c.stop.value,
        "alpha_early": c.alpha_early,
        "target": c.target,
    }


def dual_row(example_id: str, label: int, certificate: DualCertificate) -> dict[str, Any]:
    """One row of `DUAL_SCHEMA`."""
    c, level, label_stage = certificate, certificate.sigma_stage, certificate.class_stage
    return {
        "example_id": example_id,
        "label": label,
        "sigma": c.sigma,
        "prediction": c.prediction,
        "correct": c.prediction == label,
        "radius": c.radius,
        "p_lower": c.p_lower,
        "num_selection": level.num_selection,
        "num_estimation": label_stage.num_estimation if label_stage else 0,
        "counts_selection": c.counts_selection,
        "counts_estimation": c.counts_estimation,
        "alpha": c.alpha,
        "abstained": c.abstained,
        "num_draws": c.num_draws,
        "stop_reason": label_stage.stop.value if label_stage else Stop.SKIPPED.value,
        "alpha_early": label_stage.alpha_early if label_stage else 0.0,
        "target": label_stage.target if label_stage else None,
        "sigma_e": level.sigma,
        "sigma_index": level.top_class,
        "radius_sigma": c.radius_sigma,
        "radius_class": c.radius_class,
        "bounded_by": c.bounded_by.value,
        "alpha_sigma": c.alpha_sigma,
        "alpha_class": c.alpha_class,
        "p_lower_sigma": level.p_lower,
        "num_estimation_sigma": level.num_estimation,
        "stop_reason_sigma": level.stop.value,
        "alpha_early_sigma": level.alpha_early,
        "target_sigma": level.target,
        "num_shared": c.num_shared,
        "counts_selection_sigma": level.counts_selection,
        "counts_estimation_sigma": level.counts_estimation,
    }


@dataclass(frozen=True)
class Plan:
    """Which examples belong to which shard.

    Attributes:
        shards: for each shard, the places of its examples in the data set.
        rows_per_example: rows that an example gives.
        origin: what the rows are made from (configuration fingerprint, model hashes); plain JSON.
    """

    shards: tuple[tuple[int, ...], ...]
    rows_per_example: int
    origin: Mapping[str, Any]

    @classmethod
    def divide(cls, num_examples: int, shard_examples: int, rows_per_example: int, origin: Mapping[str, Any]) -> "Plan":
        """Consecutive examples, `shard_examples` to a shard."""
        starts = range(0, num_examples, shard_examples)
        shards = tuple(tuple(range(start, min(start + shard_examples, num_examples))) for start in starts)
        return cls(shards, rows_per_example, dict(origin))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan file.

        Raises:
            DataError: when it is not one.
        """
        try:
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[b"plan"])
            columns = table.to_pydict()
            members: list[list[int]] = [[] for _ in range(facts["num_shards"])]
            for shard, index in zip(columns["shard"], columns["index"], strict=True):
                members[shard].append(index)
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{str(path)!r} is not a plan: {error}") from error
        return cls(tuple(map(tuple, members)), facts["rows_per_example"], facts["origin"])

    def write(self, path: Path, example_ids: Sequence[str]) -> None:
        """Write the plan, whole or not at all; `example_ids` make it readable by itself."""
        flat = [(shard, index) for shard, members in enumerate(self.shards) for index in members]
        table = pa.table(
            {
                "shard": [shard for shard, _ in flat],
                "index": [index for _, index in flat],
                "example_id": [example_ids[index] for _, index in flat],
            }
        )
        facts = {
            "num_shards": len(self.shards),
            "rows_per_example": self.rows_per_example,
            "origin": dict(self.origin),
        }
        _write(table.replace_schema_metadata({"plan": json.dumps(facts, sort_keys=True)}), path)


class ShardStore:
    """One folder of shards and its plan.

    Args:
        root: the run directory.
        name: the folder inside it, for example `dataset` or `certificates/dual`.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.folder = root / name
        self.plan_file = root / "plan" / f"{name.replace('/', '-')}.parquet"

    def plan(self, wanted: Plan, example_ids: Sequence[str]) -> Plan:
        """The plan on disk, or `wanted` after writing it.

        An existing plan wins over another division into shards, so that a resumed run keeps its names.

        Raises:
            ConfigError: when the rows on disk are made from something else (another configuration, other weights).
        """
        if not self.plan_file.exists():
            if any(self.folder.glob("*.parquet")):
                raise ConfigError(f"{str(self.folder)!r} holds shards without a plan; move it away to start again")
            wanted.write(self.plan_file, example_ids)
            return wanted
        stored = Plan.read(self.plan_file)
        if dict(stored.origin) != dict(wanted.origin):
            changed = sorted(
                key
                for key in stored.origin.keys() | wanted.origin.keys()
                if stored.origin.get(key) != wanted.origin.get(key)
            )
            raise ConfigError(
                f"the shards in {str(self.folder)!r} were made from other inputs ({', '.join(changed)} differ); "
                f"remove that folder and {str(self.plan_file)!r} to make them again, or use another --out"
            )
        return stored

    def shard_file(self, shard: int) -> Path:
        """Where a shard is."""
        return self.folder / f"shard-{shard:06d}.parquet"

    def commit(self, shard: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, device: str) -> None:
        """Write a shard, whole or not at all; `device` (type and name) goes into its metadata."""
        table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({"device": device}))
        _write(table, self.shard_file(shard))

    def devices(self) -> set[str]:
        """Devices that the committed shards were made on, as given to `commit`."""
        metadata = (pq.read_schema(path).metadata for path in self.files())
        return {entry[b"device"].decode() for entry in metadata}

    def files(self) -> list[Path]:
        """The committed shards, in order."""
        return sorted(self.folder.glob("shard-*.parquet"))

    def committed(self) -> set[int]:
        """The shards that are there."""
        return {int(path.stem.removeprefix("shard-")) for path in self.files()}

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

    def read_file(self, file: Path) -> pa.Table:
        """The rows of one shard.

        Raises:
            DataError: when it cannot be read.
        """
        try:
            return pq.read_table(file).replace_schema_metadata()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"cannot read the shard {str(file)!r}: {error}") from error

    def check(self, plan: Plan, example_ids: Sequence[str]) -> int:
        """Prove that the shards hold each planned row exactly once; returns the number of rows.

        Raises:
            DataError: names the first missing, unexpected or repeated ones.
        """
        missing = sorted(set(range(len(plan.shards))) - self.committed())
        if missing:
            raise DataError(f"{len(missing)} shards of {self.name} are missing, the first is {missing[0]}")
        table = self.read()
        found = Counter(table.column("example_id").to_pylist())
        wanted = Counter({example_ids[i]: plan.rows_per_example for members in plan.shards for i in members})
        # Rows of an example are of different sigmas: a repeated pair cannot stand in for a missing one.
        pairs = table.select(["example_id", "sigma"]).group_by(["example_id", "sigma"]).aggregate([])
        distinct = Counter(pairs.column("example_id").to_pylist())
        names = found.keys() | wanted.keys()
        if odd := sorted(name for name in names if not found[name] == distinct[name] == wanted[name]):
            raise DataError(
                f"{self.name}: {len(odd)} examples do not have their rows exactly once, the first is {odd[0]!r}"
            )
        return int(table.num_rows)


def _write(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())
