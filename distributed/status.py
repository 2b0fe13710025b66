"""How far a run is, from its directory alone: from any machine that sees it, while it runs or afterwards."""

from dataclasses import dataclass

from distributed.launch import STORES, step_of
from distributed.run_directory import RunDirectory
from distributed.shards import Plan, ShardStore

__all__ = ["StoreStatus", "status"]

_RECENT_S = 600.0


@dataclass(frozen=True)
class StoreStatus:
    """One store.

    Attributes:
        store: its folder.
        done, total: examples committed and planned.
        finished: whether the step that fills it has checked and recorded it.
        rate: examples per second over the last ten minutes of work; None before two shards are there.
        idle_s: seconds since the last shard was committed; None before the first.
    """

    store: str
    done: int
    total: int
    finished: bool
    rate: float | None
    idle_s: float | None

    @property
    def eta_s(self) -> float | None:
        """Seconds that the rest will take at this rate."""
        return (self.total - self.done) / self.rate if self.rate and not self.finished else None


def status(directory: RunDirectory, now: float) -> list[StoreStatus]:
    """The stores that have been begun, in the order of the pipeline; `now` is seconds since the epoch."""
    found = []
    for name in STORES:
        store = ShardStore(directory.path, name)
        if not store.plan_file.exists():
            continue
        plan = Plan.read(store.plan_file)
        sizes = {number: len(members) for number, members in enumerate(plan.shards)}
        commits = sorted((store.shard_file(number).stat().st_mtime, number) for number in store.committed())
        recent = [pair for pair in commits if pair[0] >= commits[-1][0] - _RECENT_S]
        span = recent[-1][0] - recent[0][0] if recent else 0.0
        # The first of them was begun before the span; its examples are not part of the rate.
        rate = sum(sizes[number] for _, number in recent[1:]) / span if span > 0 else None
        found.append(
            StoreStatus(
                store=name,
                done=sum(sizes[number] for _, number in commits),
                total=sum(sizes.values()),
                finished=step_of(name) in directory.manifest["steps"],
                rate=rate,
                idle_s=max(0.0, now - commits[-1][0]) if commits else None,
            )
        )
    return found
