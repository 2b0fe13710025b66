"""Timing that holds on a machine whose speed drifts: contestants take turns, and ratios are taken turn by turn."""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    "Contestant",
    "Line",
    "Spread",
    "Taken",
    "apart",
    "as_markdown",
    "interleaved",
    "machine",
    "ratio",
    "spread",
    "write_json",
]


@dataclass(frozen=True)
class Taken:
    """A turn of a contestant, or several.

    Attributes:
        units: of work that it did, as it says itself.
        wall_s: seconds.
        cpu_s: of all threads of this process; what another process takes from it does not count.
    """

    units: float
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and the smallest and the largest of them."""

    median: float
    low: float
    high: float
    num: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one number."""
    return Spread(float(np.median(values)), float(min(values)), float(max(values)), len(values))


Contestant = Callable[[], "float | Taken"]
"""Returns how much work it did, or what its turn took where another process has to say that."""


def interleaved(
    contestants: Mapping[str, Contestant], repetitions: int, *, rounds: int = 1, warm: bool = True, cuda: bool = False
) -> dict[str, list[Taken]]:
    """Let contestants take turns, in another order each time.

    The shorter a turn, the less the machine drifts between those that are compared; the more of them, the less a
    single disturbance counts.

    Args:
        contestants: by name.
        repetitions: that are counted.
        rounds: turns that each takes in a repetition; they are added up.
        warm: whether each has a turn before, not counted: it fills caches.
        cuda: whether their work is done on a CUDA device, which is then waited for.

    Returns:
        What each repetition took of each contestant; those of the same number belong together.
    """
    order = np.random.default_rng(0)
    taken: dict[str, list[Taken]] = {name: [] for name in contestants}
    if warm:
        for contestant in contestants.values():
            _turn(contestant, cuda)
    for _ in range(repetitions):
        total = dict.fromkeys(contestants, Taken(0.0, 0.0, 0.0))
        for name in np.concatenate([order.permutation(list(contestants)) for _ in range(rounds)]).tolist():
            turn, so_far = _turn(contestants[name], cuda), total[name]
            total[name] = Taken(so_far.units + turn.units, so_far.wall_s + turn.wall_s, so_far.cpu_s + turn.cpu_s)
        for name, sum_of_turns in total.items():
            taken[name].append(sum_of_turns)
    return taken


def _turn(contestant: Contestant, cuda: bool) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    work = contestant()
    if cuda:
        torch.cuda.synchronize()
    return work if isinstance(work, Taken) else Taken(work, time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def apart(make: Callable[..., Mapping[str, Contestant]], *args: Any) -> Iterator[dict[str, Contestant]]:
    """Contestants in a process of their own: with its memory and its settings, not those of this process.

    Args:
        make: makes them there, from `args`; it is pickled by its name.
        args: small ones.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args))
    process.start()
    there.close()

    def ask(name: str) -> Taken:
        here.send(name)
        turn: Taken = here.recv()
        return turn

    try:
        yield {name: partial(ask, name) for name in here.recv()}
    finally:
        here.close()
        process.join()


def _serve(pipe: Any, make: Callable[..., Mapping[str, Contestant]], args: Sequence[Any]) -> None:
    contestants = make(*args)
    pipe.send(list(contestants))
    while True:
        try:
            name = pipe.recv()
        except EOFError:  # the other end is closed
            return
        pipe.send(_turn(contestants[name], cuda=False))


def ratio(ours: Sequence[Taken], theirs: Sequence[Taken], clock: str = "wall_s") -> Spread:
    """How many times as much work `ours` does in the same time, turn by turn."""
    pairs = zip(ours, theirs, strict=True)
    return spread([(a.units / getattr(a, clock)) / (b.units / getattr(b, clock)) for a, b in pairs])


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        part: of the bench.
        what: was measured.
        value: the result, on the clock; None where it could not be measured, and `what` says why.
        cpu: the same in CPU time, where that means something.
        unit: of both.
        wanted: such as ">= 0.97", or "1+- 0.15"; empty where nothing was promised.
        beside: numbers that go with it.
    """

    part: str
    what: str
    value: Spread | None
    cpu: Spread | None = None
    unit: str = "x"
    wanted: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def number(self) -> str:
        """The median with its unit."""
        return "" if self.value is None else _number(self.value.median, self.unit)

    @property
    def others(self) -> str:
        """What stands beside it."""
        return ", ".join(f"{name} {_number(value, '')}" for name, value in self.beside.items())

    @property
    def met(self) -> str:
        """Whether the median is what was wanted: `yes`, `no`, or nothing where nothing was."""
        if not self.wanted or self.value is None:
            return ""
        sign, number = self.wanted.split()
        limit, value = float(number.replace(",", "")), self.value.median
        checks = {">=": value >= limit, ">": value > limit, "<=": value <= limit, "1+-": abs(value - 1) <= limit}
        return "yes" if checks[sign] else "no"


def as_markdown(lines: Sequence[Line]) -> str:
    """The table."""
    cells: list[tuple[str, ...]] = [("part", "what", "median", "from - to", "CPU time", "beside", "wanted", "met")]
    for line in lines:
        value, between = line.value, ""
        if value is not None and value.num > 1:
            between = f"{_number(value.low, '')} - {_number(value.high, '')}"
        cpu = "" if line.cpu is None else _number(line.cpu.median, line.unit)
        cells.append((line.part, line.what, line.number, between, cpu, line.others, line.wanted, line.met))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells)


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def machine(device: str) -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, lines: Sequence[Line], device: str) -> None:
    """All lines and the machine, for a script to compare."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "lines": [{**asdict(line), "met": line.met} for line in lines]}
    path.write_text(json.dumps(content, indent=1) + "\n")
