"""The proof that files hold each planned row exactly once, one file at a time; and that they are about these images."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.data import Dataset, image_hash
from core.errors import DataError
from distributed.methods.method import Method, num_votes
from distributed.methods.rows import ERROR
from distributed.store.origin import devices_mix
from distributed.store.plan import Plan

__all__ = ["IMAGES_CHECKED", "Verifier", "changed_images", "kinds_of"]

IMAGES_CHECKED = 32
"""Images that are compared with the rows there are, store by store, before more are made: what changed a tenth of them
is missed with probability 0.03."""


class Verifier:
    """Looks at the files of a step one after the other; what it says is of all files so far.

    Args:
        plan: of the step.
        example_ids: of the whole split.
        sigmas: of an example's rows; `(None,)` for one row of any level.
        method: that made the rows.

    Attributes:
        rows, error_rows: in all, and those whose status is `error`.
        sha256: of each file, by name.
        devices: that the shards were made on.
        non_finite_draws: draws that voted for no class.
        votes: for a class, of all heads and phases.

    Raises:
        DataError: for a plan that does not hold every example once.
    """

    def __init__(self, plan: Plan, example_ids: Sequence[str], sigmas: Sequence[float | None], method: Method) -> None:
        whole = np.array_equal(np.sort(plan.order), np.arange(len(example_ids)))
        if not whole or plan.rows_per_example != len(sigmas):
            raise DataError(
                f"the plan is for {len(plan.order)} places and {plan.rows_per_example} rows of each, expected each of "
                f"the {len(example_ids)} examples once and {len(sigmas)} rows: it is not the plan that this run wrote; "
                "put it back, or make the rows anew in another --out"
            )
        self._plan, self._ids, self._method = plan, example_ids, method
        self._levels = None if list(sigmas) == [None] else np.asarray(sigmas, np.float64)
        self.rows = self.error_rows = self.non_finite_draws = self.votes = 0
        self.sha256: dict[str, str] = {}
        self.devices: set[str] = set()

    def add(self, name: str, shards: Sequence[int], content: bytes, table: pa.Table, device: str, where: str) -> None:
        """Check a file.

        `shards`: that it holds; `device`: that its rows were made on, several separated by ", "; `where`: for messages.

        Raises:
            DataError: names the first missing, unexpected or repeated row, or a file that does not say its device.
        """
        if not device:
            raise DataError(
                f"{where!r} does not say on which device it was made, so it is not as a replica wrote it; remove the "
                "file and start the job again: it makes the file anew"
            )
        wanted = np.sort(np.concatenate([self._plan.members(shard) for shard in shards]))
        odd = _first_odd(table, [self._ids[place] for place in wanted.tolist()], self._levels)
        if odd is not None:
            raise DataError(
                f"{where!r} does not hold its rows exactly once, the first is {odd!r}; remove the file and start the "
                "job again: it makes the file anew"
            )
        kinds = kinds_of(device)
        expected = {"cpu", "cuda"} if devices_mix(self._plan) else {self._plan.device}
        if not kinds <= expected:
            raise DataError(
                f"{where!r} was made on {device!r}, expected {' or '.join(sorted(expected))}; remove the file and "
                "start the job again: it makes the file anew"
            )
        if torn := _torn(table):
            raise DataError(
                f"{where!r} has rows of {torn!r} that were computed from different images: it has changed meanwhile; "
                "remove the file and start the job again: it makes the file anew"
            )
        self.sha256[name] = hashlib.sha256(content).hexdigest()
        self.devices |= set(device.split(", "))
        self.rows += table.num_rows
        self.error_rows += int(pc.sum(pc.equal(table.column("status"), ERROR)).as_py() or 0)
        self.non_finite_draws += self._method.non_finite(table)
        self.votes += sum(num_votes(table, name) for name in table.column_names if name.startswith("counts_"))

    def joined(self, names: Sequence[str], part: str, content: bytes) -> None:
        """Files that were checked have become one, with the same rows."""
        for name in names:
            del self.sha256[name]
        self.sha256[part] = hashlib.sha256(content).hexdigest()

    def facts(self, draws: int, retries: int, duration_s: float) -> dict[str, Any]:
        """What the manifest keeps of a step with these files: `draws` of the call that made the last of them, shards
        that were begun again, and how long it took.
        """
        return {
            "rows": self.rows,
            "shards": len(self._plan),
            "draws_this_call": draws,
            "non_finite_draws": self.non_finite_draws,
            "error_rows": self.error_rows,
            "retries": retries,
            "devices": sorted(self.devices),
            "batch_size": self._plan.batch_size,
            "plan": self._plan.digest,
            "duration_s": duration_s,
            "sha256": dict(sorted(self.sha256.items())),
        }


def kinds_of(device: str) -> set[str]:
    """The kinds among what a file says of its devices: `cuda` of `cuda: H100 (micro-batch 16 of 64)`."""
    return {each.partition(":")[0].partition(" ")[0] for each in device.split(", ")}


def _torn(table: pa.Table) -> str | None:
    """The first example with rows from different images."""
    count = table.group_by("example_id").aggregate([("image_hash", "count_distinct")])
    odd = count.filter(pc.greater(count.column("image_hash_count_distinct"), 1)).column("example_id")
    return min(odd.to_pylist(), default=None)


def changed_images(rows: Iterable[tuple[str, str | None]], data: Dataset) -> Iterator[str]:
    """Look at the images that rows were computed from, and say which are others now.

    Rows (`example_id`, `image_hash`) without a hash are passed over.

    Raises:
        DataError: for an image that can no longer be read.
    """
    place = {example_id: index for index, example_id in enumerate(data.example_ids)}
    for example_id, stored in dict.fromkeys(rows):
        if stored is None or example_id not in place:
            continue
        if (found := image_hash(data.image(place[example_id]))) != stored:
            yield f"{example_id}: its image has changed (hash {found}) since its row was computed (from {stored})"


def _first_odd(table: pa.Table, ids: Sequence[str], levels: NDArray[np.float64] | None) -> str | None:
    """The first example whose rows are not there exactly once; None when all are."""
    width = 1 if levels is None else len(levels)
    ordered = table.select(["example_id", "sigma"]).sort_by([("example_id", "ascending"), ("sigma", "ascending")])
    wanted = pa.array(np.repeat(np.array(sorted(ids), object), width), pa.string())
    found = ordered.column("example_id").combine_chunks()
    if found.equals(wanted):
        if levels is None:
            return None
        wrong = np.flatnonzero(ordered.column("sigma").to_numpy() != np.tile(levels, len(ids)))
        return None if not len(wrong) else str(found[int(wrong[0])])
    count = Counter(found.to_pylist())
    count.subtract(Counter(wanted.to_pylist()))
    return min((name for name, number in count.items() if number), default=None)
