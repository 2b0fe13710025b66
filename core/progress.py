"""Progress of long steps: a bar with rate and ETA in a terminal, one plain line per interval in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

__all__ = ["Progress", "clock"]


class Progress:
    """Context manager that counts finished units.

    Args:
        done: units that an earlier run had finished; they do not count for the rate.
        interval_s: seconds between two lines where stderr is no terminal.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, interval_s: float = 10.0) -> None:
        self.total, self.what, self.unit, self.done, self.interval_s = total, what, unit, done, interval_s
        self._initial, self._start, self._last = done, time.monotonic(), time.monotonic()
        self._note = ""
        self._bar = (
            tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True, smoothing=0.1)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Self:
        return self

    def update(self, num: int, note: str = "") -> None:
        """Count `num` more units; `note` is shown behind the rate (a loss, a number of draws)."""
        self.done += num
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num)
        elif time.monotonic() - self._last >= self.interval_s:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        rate = (self.done - self._initial) / elapsed if elapsed > 0 else 0.0
        eta = f"ETA {clock((self.total - self.done) / rate)}" if rate > 0 else "ETA unknown"
        ending = eta if self.done < self.total else f"took {clock(elapsed)}"
        note = f", {self._note}" if self._note else ""
        share = 100.0 * self.done / max(self.total, 1)
        print(
            f"{self.what}: {self.done:,}/{self.total:,} {self.unit} ({share:.0f}%), {rate:,.1f} {self.unit}/s, "
            f"{ending}{note}",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
