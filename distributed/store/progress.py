"""What a run keeps of the work at hand: how far a training is, and the device hours that all its starts have taken."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Self

from core.config import ComputeConfig
from core.errors import LimitError
from core.progress import Progress
from distributed.files.storage import Folder

__all__ = ["Meter", "StepProgress", "device_hours", "outermost", "read_progress"]

_MANIFEST, _PROGRESS, _SPENT = "manifest.json", "progress.json", "spent.json"
_WRITE_S = 30.0
"""Seconds between two writes of what was spent: what a SIGKILL forgets, at most."""


def outermost(root: Folder) -> Folder:
    """The run that a later round or a corrupted set belongs to; otherwise the folder itself."""
    while root.parent.name in ("rounds", "shift") and root.parent.parent.exists(_MANIFEST):
        root = root.parent.parent
    return root


def device_hours(root: Folder) -> float:
    """Device hours that all starts of a run have taken, its rounds and corrupted sets included."""
    return _spent_s(outermost(root)) / 3600


def _spent_s(root: Folder) -> float:
    try:
        return float(json.loads(root.read(_SPENT))["device_s"])
    except FileNotFoundError:
        return 0.0


@dataclass
class _Ledger:
    """What a run has spent, shared by all meters of this process that are open on it."""

    spent_s: float
    meters: int = 0
    written: float = field(default_factory=time.monotonic)


class Meter:
    """Context manager that counts device hours, over all starts of a run, and ends the work when they are spent.

    A device is a GPU, or its share where replicas share one; on CPUs a replica, or a training worker. It counts from
    the moment when its process begins to load. What is computed and lost again counts too, as far as it was seen: of
    a replica that dies, what came after its last shard is missing. Several may be open on one run.

    Raises:
        LimitError: on entry when nothing is left of the limit; by `count`, when it is reached.
    """

    _ledgers: ClassVar[dict[Folder, _Ledger]] = {}

    def __init__(self, root: Folder, compute: ComputeConfig) -> None:
        self._folder, self._limit, self._seen = outermost(root), compute.max_device_hours, 0.0

    def __enter__(self) -> Self:
        ledger = self._ledgers.setdefault(self._folder, _Ledger(_spent_s(self._folder)))
        ledger.meters += 1
        self._ledger = ledger
        try:
            self.count(0.0)
        except LimitError:
            self._leave()
            raise
        return self

    def count(self, device_s: float) -> None:
        """Say how many device seconds this meter has seen, from its beginning on."""
        self._ledger.spent_s += device_s - self._seen
        self._seen = device_s
        if time.monotonic() - self._ledger.written >= _WRITE_S:
            self._write()
        if self._limit is not None and self.hours >= self._limit:
            raise LimitError(
                f"compute.max_device_hours = {self._limit:.4g} are spent: {self.hours:.4g} over all starts of this run "
                f"({self._folder.where(_SPENT)!r}); what is committed stays, the same command with a larger limit goes "
                "on from there"
            )

    @property
    def hours(self) -> float:
        """Device hours of the run so far."""
        return self._ledger.spent_s / 3600

    @property
    def left(self) -> float | None:
        """Device hours that are left; None without a limit."""
        return None if self._limit is None else self._limit - self.hours

    def _write(self) -> None:
        if not self._folder.exists(_MANIFEST):  # somebody has taken the folder away: it is not made anew
            return
        self._folder.write(_SPENT, json.dumps({"device_s": round(self._ledger.spent_s, 3)}).encode())
        self._ledger.written = time.monotonic()

    def _leave(self) -> None:
        self._ledger.meters -= 1
        if not self._ledger.meters:
            del self._ledgers[self._folder]

    def __exit__(self, *_: object) -> None:
        try:
            if self._seen:
                self._write()
        finally:
            self._leave()


class StepProgress(Progress):
    """Progress of a training that `jobs.status` shows too, from the run directory, and that is counted by a `Meter`.

    Args:
        folder: of the training: `training/NAME` in the run directory.
        compute: as configured; says how many devices are held.
        total, what, unit, done: as for `Progress`.
    """

    def __init__(
        self, folder: Folder, compute: ComputeConfig, total: int, what: str, unit: str, *, done: int = 0
    ) -> None:
        super().__init__(total, what, unit, done=done, interval_s=compute.progress_interval_s)
        self._root, self._folder, self._said = folder.parent.parent, folder, 0.0
        self._devices, self._meter = max(1, compute.train_workers), Meter(self._root, compute)

    def __enter__(self) -> Self:
        self._meter.__enter__()
        self._say()
        return self

    def update(self, num: int, note: str = "") -> None:
        """As `Progress.update`.

        Raises:
            LimitError: when the run's device hours are spent.
        """
        super().update(num, note)
        if time.monotonic() - self._said >= self.interval_s:
            self._say()
        self._meter.count(self._devices * (time.monotonic() - self._start))

    def _say(self) -> None:
        took = time.monotonic() - self._start
        facts = {
            "what": self.what,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "rate": (self.done - self._initial) / took if self.done > self._initial and took > 0 else None,
            "note": self._note,
            "time": time.time(),
        }
        if self._root.exists(_MANIFEST):
            self._folder.write(_PROGRESS, json.dumps(facts).encode())
        self._said = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._meter.__exit__(kind, error, trace)
        if kind is None:
            self._folder.remove(_PROGRESS)


def read_progress(root: Folder) -> list[Mapping[str, Any]]:
    """What each `StepProgress` of a run said last; none where no training is at work. One that was killed leaves it."""
    names = [name for name in (root / "training").walk() if name.endswith(f"/{_PROGRESS}")]
    found: list[Mapping[str, Any]] = []
    for name in sorted(names):
        with suppress(FileNotFoundError, ValueError):  # it has ended in this moment
            found.append(dict(json.loads((root / "training").read(name))))
    return found
