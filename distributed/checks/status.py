"""How far a run is, from its directory alone: from any machine that sees it, while it runs or afterwards."""

from dataclasses import dataclass

from distributed.execution.launch import step_of, stores
from distributed.store.run_directory import RunDirectory
from distributed.store.shards import ShardStore

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
        errors: examples that could not be run so far.
        retries: shards that were begun again after a loss.
        lost_devices: replicas of the run that gave up their device.
    """

    store: str
    done: int
    total: int
    finished: bool
    rate: float | None
    idle_s: float | None
    errors: int
    retries: int
    lost_devices: int

    @property
    def eta_s(self) -> float | None:
        """Seconds that the rest will take at this rate."""
        return (self.total - self.done) / self.rate if self.rate and not self.finished else None


def status(directory: RunDirectory, now: float) -> list[StoreStatus]:
    """The stores that have been begun, in the order of the pipeline; `now` is seconds since the epoch."""
    found = []
    for name in stores():
        store = ShardStore(directory.folder, name)
        if (plan := store.read_plan()) is None:
            continue
        sizes = plan.sizes
        commits = [(moment, int(sizes[list(shards)].sum())) for moment, shards in store.commits()]
        recent = [pair for pair in commits if pair[0] >= commits[-1][0] - _RECENT_S]
        span = recent[-1][0] - recent[0][0] if recent else 0.0
        record = directory.manifest["steps"].get(step_of(name))
        attempts = store.attempts()
        found.append(
            StoreStatus(
                store=name,
                done=sum(examples for _, examples in commits),
                total=len(plan.order),
                finished=record is not None,
                # The first of them was begun before the span; its examples are not part of the rate.
                rate=sum(examples for _, examples in recent[1:]) / span if span > 0 and record is None else None,
                idle_s=max(0.0, now - commits[-1][0]) if commits else None,
                errors=len(set(store.read_errors().column("example_id").to_pylist())),
                retries=record["retries"] if record else sum(attempts.values()) - len(attempts),
                lost_devices=len((directory.folder / "errors" / "replicas").files()),
            )
        )
    return found
