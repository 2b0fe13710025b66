"""One list of classes for a run: names as text, their order, and numbers by name."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError

__all__ = ["canonical", "check_numbers", "in_order", "numbers_of", "readable", "shown"]


def readable(path: str) -> str:
    r"""A path as text that can be written: bytes of a name that are not UTF-8 become `\xe9`, the rest stays."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def canonical(name: str) -> str:
    """A name in the one form in which names are compared: Unicode NFC, since file systems differ there."""
    return unicodedata.normalize("NFC", readable(name))


def in_order(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Names of class folders in the order of their labels: as text; numbers 0 to N - 1, or 1 to N, as numbers.

    Raises:
        DataError: for numbers with gaps, or written in two ways: the label could be the number or the place.
    """
    given = sorted(set(names))
    if not given or not all(name.isascii() and name.isdecimal() for name in given):
        return tuple(given)
    width, numbers = min(map(len, given)), sorted(map(int, given))
    ordered = tuple(f"{number:0{width}d}" for number in numbers)
    if numbers not in (list(range(len(given))), list(range(1, len(given) + 1))) or set(ordered) != set(given):
        raise DataError(
            f"{where}: the class folders are numbers, but neither 0 to {len(given) - 1} nor 1 to {len(given)}, each "
            f"written alike ({shown(given)}): label or place in the list? Name all folders in dataset.class_file, in "
            "the order of their labels"
        )
    return ordered


def numbers_of(names: Sequence[str], classes: Sequence[str], whose: str) -> NDArray[np.int64]:
    """For each of `names` its number in the run's list of classes.

    Raises:
        DataError: for a name that is not in the list, or is there (or in `names`) more than once.
    """
    names, classes = [canonical(name) for name in names], [canonical(name) for name in classes]
    place, times, own = {name: number for number, name in enumerate(classes)}, Counter(classes), Counter(names)
    if unknown := sorted(own.keys() - place.keys()):
        raise DataError(
            f"{whose} has {len(unknown)} of its {len(own)} classes that are none of the run's {len(classes)}: "
            f"{shown(unknown)}; the run has {shown([name for name in classes if name not in own] or classes)} "
            "(dataset.class_file, or else the training split); give both the same names, or list all in "
            "dataset.class_file"
        )
    if repeated := [name for name in own if own[name] > 1 or times[name] > 1]:
        raise DataError(
            f"{whose}: the class name {repeated[0]!r} is there twice, here or in the run's list, so that it tells no "
            "label; rename one"
        )
    return np.array([place[name] for name in names], np.int64)


def check_numbers(labels: NDArray[np.int64], names: Sequence[str], whose: str) -> None:
    """Raise DataError for a label that none of `names` belongs to; the message names the row."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        raise DataError(
            f"{whose} row {wrong[0]}: label {labels[wrong[0]]}, expected 0 to {len(names) - 1} (it names {len(names)} "
            "classes); is this a split without labels?"
        )


def shown(names: Sequence[str]) -> str:
    """The first five, for messages."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
