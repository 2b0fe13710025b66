"""The field's log of certificates: the tab-separated file that `certify.py` of Cohen et al. 2019 prints.

One line per example, `idx label predict radius correct time`. Salman, Carlini, Jeong & Shin and others write the same,
some with further columns, and their plotting scripts read it: certified accuracy at r is the mean of
`correct & (radius >= r)`. Two habits of published code are understood: Multiscale (Jeong & Shin 2023) also abstains
with -2, and Carlini et al.'s script for CIFAR-10 writes the running count of correct ones into `correct`.
"""

import csv
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError

__all__ = ["COLUMNS", "CertifyLog", "format_log", "parse_log"]

COLUMNS: Final = ("idx", "label", "predict", "radius", "correct", "time")

_NEEDED: Final = COLUMNS[:-1]
_TRUTH: Final = {"False": 0, "True": 1}


@dataclass(frozen=True, slots=True, eq=False)
class CertifyLog:
    """The lines of a log, N examples.

    Attributes:
        idx: int64 ``(N,)``, number of the example in its data set; distinct.
        label: int64 ``(N,)``.
        predict: int64 ``(N,)``, certified class, negative where abstaining.
        radius: float64 ``(N,)``, certified l2 radius, pixel scale [0, 1]; 0 where abstaining. Published logs round it
            to three significant digits, up or down; ours do not round.
        correct: bool ``(N,)``, whether the certified class is the label.
    """

    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """Where nothing is certified, bool ``(N,)``."""
        return self.predict < 0


def format_log(log: CertifyLog) -> str:
    """The log as text.

    Radii are written so that reading them gives the same float64. `time` is empty (pandas reads NaN): draws of many
    examples share their batches, so no example has a time of its own.
    """
    columns = (log.idx, log.label, log.predict, log.radius, log.correct.astype(np.int64))
    lines = zip(*(column.tolist() for column in columns), strict=True)
    return "\n".join(["\t".join(COLUMNS), *("\t".join([*map(repr, line), ""]) for line in lines)]) + "\n"


def parse_log(text: str, source: str) -> CertifyLog:
    """Read a log; columns may stand in any order, further ones (and `time`) are not read.

    Args:
        text: with a header line.
        source: named in messages.

    Raises:
        DataError: names the line, what it holds and what was expected. A line has to agree with itself: `correct` says
            whether `predict` is the label (or the whole column counts how often it was); abstentions have radius 0.
    """
    lines = csv.reader(text.splitlines(), delimiter="\t")
    header = [name.strip() for name in next(lines, [])]
    if missing := [name for name in _NEEDED if name not in header]:
        hint = "; a log of predict.py certifies no radius" if missing == ["radius"] else ""
        raise DataError(
            f"{source}: line 1 names no column {', '.join(map(repr, missing))}, expected tab-separated "
            f"{' '.join(COLUMNS)}, got {' '.join(header)[:80]!r}{hint}"
        )
    places = [header.index(name) for name in _NEEDED]
    rows: dict[int, tuple[int, int, float]] = {}
    stated: list[tuple[int, str]] = []
    for number, cells in enumerate(lines, 2):
        if not any(cell.strip() for cell in cells):
            continue  # the last line of a file that was edited
        where = f"{source}: line {number}"
        idx, row, correct = _parse_line(cells, places, where)
        if idx in rows:
            raise DataError(f"{where}: idx {idx} was there before; give each example once")
        rows[idx] = row
        stated.append((correct, where))
    if not rows:
        raise DataError(f"{source}: has a header and no line below it")
    label, predict, radius = zip(*rows.values(), strict=True)
    log = CertifyLog(
        idx=np.array(list(rows), np.int64),
        label=np.array(label, np.int64),
        predict=np.array(predict, np.int64),
        radius=np.array(radius, np.float64),
        correct=np.array(predict, np.int64) == np.array(label, np.int64),
    )
    column = np.array([correct for correct, _ in stated])
    wrong = np.flatnonzero(column != log.correct)
    if len(wrong) and not np.array_equal(column, np.cumsum(log.correct)):
        first = int(wrong[0])
        raise DataError(
            f"{stated[first][1]}: correct is {column[first]}, but predict is {predict[first]} and label is "
            f"{label[first]}"
        )
    return log


def _parse_line(cells: list[str], places: list[int], where: str) -> tuple[int, tuple[int, int, float], int]:
    """`idx`, (`label`, `predict`, `radius`) and `correct` as it is written."""
    if len(cells) <= max(places):
        raise DataError(f"{where}: has {len(cells)} columns, expected {max(places) + 1} or more (was it cut off?)")
    texts = [cells[place].strip() for place in places]
    try:
        idx, label, predict, radius = int(texts[0]), int(texts[1]), int(texts[2]), float(texts[3])
        correct = _TRUTH[texts[4]] if texts[4] in _TRUTH else int(texts[4])
    except ValueError as error:
        raise DataError(
            f"{where}: expected whole numbers for idx, label and predict, a number for radius and 0 or 1 for correct, "
            f"got {' '.join(texts)!r}"
        ) from error
    if not 0.0 <= radius < float("inf"):
        raise DataError(f"{where}: radius must be a finite number of at least 0, got {texts[3]}")
    if label < 0 or (predict < 0 and radius > 0.0):
        raise DataError(
            f"{where}: label is a class, predict a class or -1 with radius 0; got label {label}, predict {predict}, "
            f"radius {radius:g}"
        )
    return idx, (label, predict, radius), correct
