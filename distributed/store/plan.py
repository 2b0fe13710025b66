"""The plan of a step: which examples belong to which shard. Written before any work, it never changes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.errors import DataError
from distributed.files.parquet import from_bytes, to_bytes

__all__ = ["Plan"]

_SCHEMA = pa.schema([("shard", pa.int64()), ("index", pa.int64()), ("example_id", pa.string())])
_AT_ONCE = 2**13
"""Rows of a plan that are made at once."""


@dataclass(frozen=True)
class Plan:
    """Which examples belong to which shard: shard `i` holds the places `order[bounds[i]:bounds[i + 1]]`.

    Attributes:
        order: int64, places in the data set, each once.
        bounds: int64, ascending from 0 to len(order).
        rows_per_example: rows that an example gives.
        origin: what the rows are made from, see `distributed.store.origin`; plain JSON.
        device: `cpu` or `cuda`, where it was begun; where the noise is of version 1, they draw other noise and must not
            be mixed.
        batch_size: rows of every forward pass, whoever makes the rows; None in a plan from before it was kept, which
            means the configured number.
        settings: the configuration's identity in full, so that one that was edited since can be named by its keys.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    rows_per_example: int
    origin: Mapping[str, Any]
    device: str
    batch_size: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

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
        settings: Mapping[str, Any] | None = None,
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
        return cls(order, bounds, rows_per_example, dict(origin), device, batch_size, settings or {})

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, shard: int) -> NDArray[np.int64]:
        """Places in the data set of a shard's examples."""
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]

    @cached_property
    def digest(self) -> str:
        """Of all that the plan says, 16 hexadecimal digits; every file of its rows names it."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.order, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self.bounds, "<i8").tobytes())
        return digest.hexdigest()[:16]

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
            table, metadata = from_bytes(content, name, ["shard", "index"])
            facts = json.loads(metadata["plan"])
            shard = table.column("shard").to_numpy()
            order = table.column("index").to_numpy().astype(np.int64)
            bounds = np.searchsorted(shard, np.arange(facts["num_shards"] + 1)).astype(np.int64)
            each, origin = facts["rows_per_example"], facts["origin"]
            settings = facts.get("settings", {})
            return cls(order, bounds, each, origin, facts["device"], facts.get("batch_size"), settings)
        except (DataError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{name!r} is not a plan: {error}") from error

    def to_bytes(self, example_ids: Sequence[str]) -> bytes:
        """The plan as a Parquet file; `example_ids` make it readable by itself."""
        return to_bytes(_SCHEMA, self._tables(example_ids), lambda: {"plan": json.dumps(self._facts())})

    def _facts(self) -> dict[str, Any]:
        return {
            "num_shards": len(self),
            "rows_per_example": self.rows_per_example,
            "origin": dict(self.origin),
            "device": self.device,
            "batch_size": self.batch_size,
            "settings": dict(self.settings),
        }

    def _tables(self, example_ids: Sequence[str]) -> Iterator[pa.Table]:
        """Some rows at a time: the ids of a large split are in memory once already."""
        for first in range(0, len(self.order), _AT_ONCE):
            places = self.order[first : first + _AT_ONCE]
            shard = np.searchsorted(self.bounds, np.arange(first, first + len(places)), side="right") - 1
            yield pa.table([shard, places, [example_ids[place] for place in places.tolist()]], schema=_SCHEMA)
