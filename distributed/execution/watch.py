"""Signs of life: what each replica says of itself, and the driver's watch, which knows what a run waits for.

A replica that has stopped, a device that no longer answers and a file system that blocks look the same from outside:
nothing moves. So nothing else is looked at. Nobody but the watch ends a replica: Ray starts another one in its place
and hands its shards on, as after any loss.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from core.config import ComputeConfig
from core.errors import ModelError
from core.progress import clock
from distributed.store import lock

__all__ = ["Board", "Pulse", "Scout", "Seen", "Sign", "Watch"]

_log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between two signs of a replica, and between two looks of the driver."""
QUIET_S = 60.0
"""Without a commit for so long, a run says what it waits for; then after twice as long, ten minutes at most."""
SLOW = 10
"""A shard is reported when it takes so many times as long as the slowest so far, and longer than `QUIET_S`."""


@dataclass(frozen=True)
class Sign:
    """What a replica says of itself.

    Attributes:
        key: of its actor, which Ray starts again after a loss; empty without Ray.
        replica: its id, another one after each start.
        host, node_id, pid: where it is; `node_id` is Ray's.
        stage: `loading`, `measuring` or `working`; `starting` where it was ended and no other one has signed yet.
        progress: grows with all that it gets done.
        shards: those that it has begun, and for how many seconds it has had each.
        handle: of the actor, weak: it keeps none alive.
    """

    key: str
    replica: str
    host: str
    node_id: str
    pid: int
    stage: str
    progress: int
    shards: Mapping[int, float]
    handle: Any = None

    def __str__(self) -> str:
        shards = f" with shard {', '.join(map(str, self.shards))}" if self.shards else ""
        stage = f", {self.stage}" if self.stage != "working" else ""
        return f"replica {self.replica} on {self.host} (process {self.pid}{stage}){shards}"


@dataclass(frozen=True)
class Seen:
    """A replica's last sign, seconds since it entered its stage, and since it got something done.

    One that has nothing to do is not silent as long as its signs come.
    """

    sign: Sign
    stage_s: float
    silent_s: float


class Board:
    """Where replicas leave their signs: an actor beside the driver, or an object of this process without Ray.

    The times are its own: clocks of machines differ.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[Sign, float, float]] = {}

    def sign(self, sign: Sign) -> None:
        """Take a replica's sign."""
        now = time.monotonic()
        before, entered, moved = self._last.get(sign.key, (None, now, now))
        if before is not None and before.stage == "starting" and before.replica == sign.replica:
            return  # its last words
        if before is None or (before.replica, before.stage) != (sign.replica, sign.stage):
            entered = moved = now
        elif before.progress != sign.progress or (sign.stage == "working" and not sign.shards):
            moved = now
        self._last[sign.key] = (sign, entered, moved)

    def ended(self, key: str) -> None:
        """Wait for another replica in a place whose one was ended."""
        if key in self._last:
            now = time.monotonic()
            self._last[key] = (replace(self._last[key][0], stage="starting", shards={}), now, now)

    def look(self) -> list[Seen]:
        """The replicas, as of now."""
        now = time.monotonic()
        return [Seen(sign, now - entered, now - moved) for sign, entered, moved in self._last.values()]

    def end(self, seen: Seen) -> bool:
        """End a replica; False where that is not possible, as for that of this process."""
        return False

    def room(self) -> str:
        """Why there is no replica, as far as it can be told."""
        return "the replica of this process has not begun"


class Pulse:
    """A thread of a replica that signs a board, from now until `end`.

    Args:
        board: a `Board`, or the name of its actor: a handle among its arguments could be gone when one starts again.
        compute: how often follows from `hang_s`.
        replica: its id.
        state: stage, progress and shards of `Sign`, at this moment.
    """

    def __init__(
        self,
        board: Board | str,
        compute: ComputeConfig,
        replica: str,
        state: Callable[[], tuple[str, int, dict[int, float]]],
    ) -> None:
        self._board, self._every_s, self._replica, self._state = board, _beat(compute), replica, state
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="pulse", daemon=True).start()

    def end(self) -> None:
        """Sign no more."""
        self._ended.set()

    def _live(self) -> None:
        key, node_id, handle = "", "", None
        notice: Callable[[], None] | None = None
        if isinstance(self._board, Board):
            send = self._board.sign
        else:
            import ray

            from distributed.cluster.notice import Notice

            context, board = ray.get_runtime_context(), ray.get_actor(self._board)
            key, node_id, handle = str(context.get_actor_id()), context.get_node_id(), context.current_actor
            send, notice = board.sign.remote, Notice(node_id).look
        while True:
            stage, progress, shards = self._state()
            send(Sign(key, self._replica, socket.gethostname(), node_id, os.getpid(), stage, progress, shards, handle))
            if notice is not None:
                notice()
            if self._ended.wait(self._every_s):
                return


class Scout:
    """An actor that takes a replica's place to answer a question; one that hangs is ended as a replica is."""

    def ask(self, question: Callable[..., Any], board: str, work: Any, *args: Any) -> Any:
        """The answer to `question(work, *args)`."""
        pulse = Pulse(board, work.config.compute, "that measures", lambda: ("measuring", 0, {}))
        try:
            return question(work, *args)
        finally:
            pulse.end()


@dataclass
class Watch:
    """The driver's thread that reports silent replicas and slow shards, ends what hangs, and says what is waited for.

    Context manager. What is waited for is also in the run's lock, for `jobs.status`.

    Args:
        store: which step it is.
        compute: `hang_s`, `max_attempts`.
        replicas: what they say of themselves, and how one is ended.
        slots: how many there are at most.
    """

    store: str
    compute: ComputeConfig
    replicas: Board
    slots: int
    failure: ModelError | None = None
    """Why the step is ended: so many replicas in a row have hung that nothing is to be hoped for."""
    _slowest_s: float = 0.0
    _hung: int = 0
    _told: set[tuple[str, str | int]] = field(default_factory=set)
    _committed: float = field(default_factory=lambda: time.monotonic())
    _say_at_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        threading.Thread(target=self._live, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self._ended.set()
        lock.waits_for("")
        # Whose handler of SIGTERM is in place (ours, or that of Ray, which exits) is not for this to know.
        if isinstance(error, KeyboardInterrupt | SystemExit) and self.failure is not None:
            raise self.failure from None

    def committed(self, seconds: float) -> None:
        """A shard is there; it took a replica so long."""
        self._slowest_s = max(self._slowest_s, seconds)
        self._committed, self._say_at_s, self._hung = time.monotonic(), 0.0, 0
        lock.waits_for("")

    def _live(self) -> None:
        while not self._ended.wait(_beat(self.compute)):
            try:
                self.check()
            except Exception as error:  # whoever watches must not end what it watches
                _log.warning("cannot tell how the replicas of %s are: %s", self.store, error)

    def check(self) -> None:
        """Look once."""
        seen, hang_s = self.replicas.look(), self.compute.hang_s
        for one in seen:
            if hang_s and one.silent_s > hang_s:
                self._end(one)
            elif one.silent_s > self._patience_s and one.sign.stage != "starting":
                self._tell(one, "silent", f"is silent for {clock(one.silent_s)}")
            for shard, seconds in one.sign.shards.items():
                if self._slowest_s and seconds > max(self._patience_s, SLOW * self._slowest_s):
                    took = f"takes {clock(seconds)} for shard {shard}, the slowest so far took {self._slowest_s:.1f} s"
                    self._tell(one, shard, took)
        quiet_s = time.monotonic() - self._committed
        if quiet_s > self._patience_s:
            lock.waits_for(text := f"no shard of {self.store} committed for {clock(quiet_s)}: {self._reasons(seen)}")
            if quiet_s > self._say_at_s:
                print(text, flush=True)
                self._say_at_s = quiet_s + min(quiet_s, 600.0)

    @property
    def _patience_s(self) -> float:
        return min(QUIET_S, self.compute.hang_s / 2) if self.compute.hang_s else QUIET_S

    def _tell(self, one: Seen, what: str | int, text: str) -> None:
        if (key := (one.sign.replica, what)) not in self._told:
            self._told.add(key)
            _log.warning("%s: %s %s", self.store, one.sign, text)

    def _end(self, one: Seen) -> None:
        if one.sign.stage == "starting":  # for want of room, or it hangs before it signs: asking again does no harm
            self.replicas.end(one)
            return
        text = f"has hung for {clock(one.silent_s)} (compute.hang_s={self.compute.hang_s:g})"
        if not self.replicas.end(one):
            self._tell(one, "hung", f"{text}; nothing ends it but the end of this process")
            return
        _log.error("%s: %s %s and was ended; what it had goes to another one", self.store, one.sign, text)
        self._hung += 1
        if self._hung >= self.compute.max_attempts * self.slots:
            self.failure = ModelError(
                f"{self._hung} replicas of {self.store} have hung in a row and nothing was committed; the last: "
                f"{one.sign}; look at that node, or, if a batch takes so long, raise compute.hang_s"
            )
            lock.interrupt()

    def _reasons(self, seen: Sequence[Seen]) -> str:
        """What is waited for."""
        starting = [one.stage_s for one in seen if one.sign.stage == "starting"]
        there = [one for one in seen if one.sign.stage != "starting"]
        silent = [one for one in there if one.silent_s > self._patience_s]
        rest = [one for one in there if one.silent_s <= self._patience_s]
        loading = [one.stage_s for one in rest if one.sign.stage != "working"]
        parts = [f"{one.sign} is silent for {clock(one.silent_s)}" for one in silent[:3]]
        parts += [f"{len(silent) - 3} more are silent"] if silent[3:] else []
        parts += [f"{len(loading)} replicas load or measure, for {clock(max(loading))}"] if loading else []
        parts += [f"{len(rest) - len(loading)} replicas are at work"] if len(rest) > len(loading) else []
        parts += [f"{len(starting)} replicas start again, for {clock(max(starting))}"] if starting else []
        return "; ".join(parts if there else [*parts, self.replicas.room()])


def _beat(compute: ComputeConfig) -> float:
    return min(BEAT_S, compute.hang_s / 4) if compute.hang_s else BEAT_S
